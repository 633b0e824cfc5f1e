from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cbpt_runtime.errors import ConfigError, ImageDataError
from cbpt_runtime.models.data import (
    CleanSplit,
    draw_clean_split,
    find_class_folders,
    read_images,
)
from cbpt_runtime.runtime.preprocess import Preprocess

PREPROCESS = Preprocess(image_size=(32, 32), resize_mode="squash")
NAMES = ("red_square", "green disc", "Blue Stripes")


@pytest.fixture
def images(tiny_image_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny image folder that a test may change."""
    return Path(shutil.copytree(tiny_image_folder, tmp_path / "images"))


# Class folders --------------------------------------------------------------------------------------


def test_folders_match_whatever_the_case_and_underscores(images: Path) -> None:
    (images / "green_disc").rename(images / "Green DISC")
    (images / ".cache").mkdir()
    (images / "readme.txt").write_text("not a class")
    found = find_class_folders(images, ("RED square", "green_disc", "blue_stripes"))
    assert [path.parent.name for path, *_ in found] == ["red_square", "Green DISC", "Blue_Stripes"]
    assert [[path.name for path in files] for files in found] == [[f"{i:02}.png" for i in range(12)]] * 3


def test_files_that_are_no_images_are_left_out(images: Path) -> None:
    (images / "red_square" / "notes.txt").write_text("x")
    (images / "red_square" / ".hidden.png").write_text("x")
    (images / "red_square" / "folder.png").mkdir()
    (images / "red_square" / "00.png").rename(images / "red_square" / "00.PNG")
    assert len(find_class_folders(images, NAMES)[0]) == 12


def test_all_mismatches_are_in_one_message(images: Path) -> None:
    shutil.rmtree(images / "red_square")
    (images / "surprise").mkdir()
    (images / "Green Disc").mkdir()
    (images / "lonely_class").mkdir()
    with pytest.raises(ImageDataError) as caught:
        find_class_folders(images, (*NAMES, "lonely class"))
    text = str(caught.value)
    assert "missing: red_square" in text
    assert "not in the class list: surprise" in text
    assert "doubled: Green Disc = green_disc" in text
    assert "without images: " in text
    assert "lonely class" in text


def test_long_lists_of_mismatches_are_shortened(images: Path) -> None:
    with pytest.raises(ImageDataError, match=r"class 9 and 90 more"):
        find_class_folders(images, (*NAMES, *(f"class {index}" for index in range(100))))


def test_missing_classes_may_be_allowed(images: Path) -> None:
    shutil.rmtree(images / "red_square")
    shutil.rmtree(images / "green_disc")
    (images / "green_disc").mkdir()
    files = find_class_folders(images, NAMES, allow_missing=True)
    assert [len(paths) for paths in files] == [0, 0, 12]
    shutil.rmtree(images / "Blue_Stripes")
    with pytest.raises(ImageDataError, match="no images at all"):
        find_class_folders(images, NAMES, allow_missing=True)


def test_a_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageDataError, match=r"a folder of class folders at .*; got no such file"):
        find_class_folders(tmp_path / "absent", NAMES)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ImageDataError, match="got not a directory"):
        find_class_folders(tmp_path / "file", NAMES)


def test_folders_without_permission_are_refused(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ImageDataError, match="got permission denied"):
        find_class_folders(images, NAMES)


# Images ---------------------------------------------------------------------------------------------


def test_images_are_read_in_order(images: Path) -> None:
    paths = [path for files in find_class_folders(images, NAMES) for path in files]
    batch = read_images(paths, PREPROCESS)
    assert batch.shape == (36, 32, 32, 3)
    assert batch.dtype == np.uint8
    assert batch.mean(axis=(1, 2)).argmax(axis=1).tolist() == [0] * 12 + [1] * 12 + [2] * 12
    np.testing.assert_array_equal(read_images(paths[20:21], PREPROCESS)[0], batch[20])


def test_no_paths_give_an_empty_batch() -> None:
    assert read_images([], PREPROCESS).shape == (0, 32, 32, 3)


def test_all_unusable_images_are_in_one_message(images: Path) -> None:
    paths = sorted((images / "red_square").iterdir())
    paths[1].write_bytes(paths[1].read_bytes()[:100])
    paths[2].write_text("not an image")
    Image.new("RGB", (1, 500)).save(paths[3])
    paths[4].unlink()
    with pytest.raises(ImageDataError) as caught:
        read_images(paths, PREPROCESS)
    text = str(caught.value)
    assert "expected 12 readable images; got 4 that are not" in text
    for path in paths[1:5]:
        assert str(path) in text
    assert "no such file" in text


# Clean splits ---------------------------------------------------------------------------------------


def drawn(split: CleanSplit) -> set[bytes]:
    return {image.tobytes() for image in split.tune_images}


def held_out(split: CleanSplit) -> set[bytes]:
    return {image.tobytes() for image in split.heldout_images}


def test_a_split_draws_per_class_and_never_overlaps(images: Path) -> None:
    split = draw_clean_split(images, NAMES, PREPROCESS, shots=5, heldout_shots=4)
    assert split.tune_images.shape == (15, 32, 32, 3)
    assert split.heldout_images.shape == (12, 32, 32, 3)
    assert np.bincount(split.tune_labels).tolist() == [5, 5, 5]
    assert np.bincount(split.heldout_labels).tolist() == [4, 4, 4]
    assert split.tune_labels.dtype == np.int64
    assert split.tune_images.mean(axis=(1, 2)).argmax(axis=1).tolist() == split.tune_labels.tolist()
    assert not drawn(split) & held_out(split)
    assert split.notes == ()


def test_the_seed_decides_the_draw(images: Path) -> None:
    first, again, other = (
        draw_clean_split(images, NAMES, PREPROCESS, shots=4, heldout_shots=2, seed=seed) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first.tune_images, again.tune_images)
    np.testing.assert_array_equal(first.heldout_images, again.heldout_images)
    assert first.digest == again.digest
    assert drawn(first) != drawn(other)
    assert first.digest != other.digest


def test_the_digest_follows_bytes_names_and_roles_but_not_the_place(images: Path, tmp_path: Path) -> None:
    def digest(root: Path, shots: int = 8, heldout_shots: int = 4) -> str:
        return draw_clean_split(root, NAMES, PREPROCESS, shots=shots, heldout_shots=heldout_shots).digest

    original = digest(images)
    moved = Path(shutil.copytree(images, tmp_path / "elsewhere"))
    assert digest(moved) == original
    assert digest(images, 9, 3) != original
    Image.new("RGB", (40, 36), "white").save(moved / "red_square" / "03.png")
    assert digest(moved) != original


@pytest.mark.parametrize(
    ("n", "n_tune", "n_heldout"), [(1, 1, 0), (2, 1, 1), (6, 5, 1), (7, 6, 1), (10, 6, 4)]
)
def test_classes_with_few_images_keep_one_held_out(images: Path, n: int, n_tune: int, n_heldout: int) -> None:
    for path in sorted((images / "green_disc").iterdir())[n:]:
        path.unlink()
    split = draw_clean_split(images, NAMES, PREPROCESS, shots=6, heldout_shots=4)
    assert (split.tune_labels == 1).sum() == n_tune
    assert (split.heldout_labels == 1).sum() == n_heldout
    short = (f"fewer than 6 + 4 held out images in 1 of 3 classes: green disc ({n})",)
    assert split.notes == (short if n < 10 else ())


def test_nothing_is_held_out_where_nothing_is_asked_for(images: Path) -> None:
    split = draw_clean_split(images, NAMES, PREPROCESS, shots=12, heldout_shots=0)
    assert len(split.tune_images) == 36
    assert split.heldout_images.shape == (0, 32, 32, 3)
    assert split.notes == ()


def test_the_same_file_under_two_names_is_noticed(images: Path) -> None:
    for path in sorted((images / "red_square").iterdir())[1:]:
        shutil.copy(images / "red_square" / "00.png", path)
    split = draw_clean_split(images, NAMES, PREPROCESS, shots=4, heldout_shots=2)
    assert split.notes == ("1 files are in both the tuning and the held-out part under different names",)


@pytest.mark.parametrize(("option", "value"), [("shots", 0), ("heldout_shots", -1), ("seed", -1)])
def test_numbers_out_of_range_are_refused(images: Path, option: str, value: int) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(ConfigError, match=f"expected {option} of at least"):
        draw_clean_split(images, NAMES, PREPROCESS, **options)


def test_real_photographs_of_a_hundred_classes_are_drawn(shared_data: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(shared_data / "data" / "tiny-imagenet-100.zip") as archive:
        names = sorted(name for name in archive.namelist() if "/val/" in name and name.endswith(".JPEG"))
        archive.extractall(tmp_path, members=names[::10])
    root = tmp_path / "tiny-imagenet-100" / "val"
    classes = [path.name.replace("_", " ") for path in sorted(root.iterdir())]
    assert len(classes) == 100
    split = draw_clean_split(root, classes, PREPROCESS, shots=2, heldout_shots=1)
    assert np.bincount(split.tune_labels).tolist() == [2] * 100
    assert np.bincount(split.heldout_labels).tolist() == [1] * 100
