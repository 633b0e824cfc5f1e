from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cbpt_runtime.errors import ConfigError, ImageDataError
from cbpt_runtime.models.clip import DualEncoder
from cbpt_runtime.models.data import ClassList
from cbpt_runtime.models.labelling import (
    UnlabelledImages,
    draw_images,
    find_images,
    images_to_draw,
    is_flat,
    label_images,
    reference_probabilities,
    split_by_confidence,
)
from cbpt_runtime.runtime.preprocess import Preprocess

NAMES = ("cat", "dog", "owl")


def unlabelled(n: int) -> UnlabelledImages:
    """Images whose pixels are all their number."""
    images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 32, 32, 3)).copy()
    files = tuple(f"{index}.png" for index in range(n))
    return UnlabelledImages(images=images, files=files, digests=files, found=n + 5, notes=("a note",))


def calls(*rows: tuple[int, float]) -> np.ndarray:
    """Probabilities of three classes from the likeliest class and its ratio to each of the others."""
    table = np.ones((len(rows), 3), np.float32)
    for row, (label, ratio) in enumerate(rows):
        table[row, label] = ratio
    return table / table.sum(axis=1, keepdims=True)


def test_only_images_the_head_is_sure_of_are_used() -> None:
    sure = calls((0, 3), (0, 1.9), (1, 9), (1, 2.1), (2, 1.2), (0, 5))
    split = split_by_confidence(unlabelled(6), sure, NAMES, shots=4, heldout_shots=0)
    assert sorted(split.tune_images[:, 0, 0, 0].tolist()) == [0, 2, 3, 5]
    assert split.tune_labels.tolist() == [0, 0, 1, 1]
    assert split.tune_labels.dtype == np.int64
    assert split.labelled_by == "suspect"


def test_the_surest_images_of_a_class_come_first() -> None:
    sure = calls(*((label, 2 + rank) for label in (0, 1) for rank in range(1, 6)))
    split = split_by_confidence(unlabelled(10), sure, NAMES, shots=2, heldout_shots=1)
    used = np.concatenate([split.tune_images, split.heldout_images])[:, 0, 0, 0]
    assert sorted(used.tolist()) == [2, 3, 4, 7, 8, 9]
    assert split.heldout_labels.tolist() == [0, 1]


def test_the_seed_decides_which_images_are_held_out() -> None:
    sure = calls(*((label, 2 + rank) for label in (0, 1) for rank in range(1, 21)))
    first, again, other = (
        split_by_confidence(unlabelled(40), sure, NAMES, shots=12, heldout_shots=8, seed=seed)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first.tune_images, again.tune_images)
    assert first.digest == again.digest != other.digest
    assert not set(first.tune_images[:, 0, 0, 0]) & set(first.heldout_images[:, 0, 0, 0])


def test_the_digest_follows_names_bytes_and_labels() -> None:
    drawn, sure = unlabelled(4), calls((0, 9), (0, 9), (1, 9), (1, 9))

    def digest(images: UnlabelledImages, probabilities: np.ndarray) -> str:
        return split_by_confidence(images, probabilities, NAMES, shots=2, heldout_shots=0).digest

    original = digest(drawn, sure)
    assert digest(replace(drawn, files=("x", *drawn.files[1:])), sure) != original
    assert digest(replace(drawn, digests=("x", *drawn.digests[1:])), sure) != original
    assert digest(drawn, sure[:, [0, 2, 1]]) != original
    assert digest(replace(drawn, notes=()), sure) == original


def test_the_notes_count_what_was_used_and_what_was_left_out() -> None:
    sure = calls((0, 9), (0, 9), (0, 9), (0, 9), (1, 9), (2, 1.5))
    note, meaning, counts, per_class, none = split_by_confidence(
        unlabelled(6), sure, NAMES, shots=2, heldout_shots=1
    ).notes
    assert note == "a note"
    assert "not how often it is right" in meaning
    assert counts.startswith("of 11 images 6 were looked at, 4 are used, 1 were left out as unsure")
    assert counts.endswith("and 1 as more than 2 + 1 held out of a class")
    assert per_class == "images used per class, fewest first: dog 1, cat 3"
    assert none == "no images of 1 of 3 classes: owl"


@pytest.mark.parametrize(
    ("rows", "message"),
    [(((0, 9.0), (0, 9.0)), "got sure images of cat only"), (((0, 1.5), (1, 1.0)), "got none it is sure of")],
)
def test_images_of_fewer_than_two_classes_are_refused(
    rows: tuple[tuple[int, float], ...], message: str
) -> None:
    with pytest.raises(ImageDataError, match=f"two or more classes .*{message}.*one folder per class"):
        split_by_confidence(unlabelled(2), calls(*rows), NAMES, shots=2)


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected shots of at least 1"):
        split_by_confidence(unlabelled(1), calls((0, 9)), NAMES, shots=0)


def test_small_class_lists_still_have_sixty_four_images_looked_at() -> None:
    assert images_to_draw(2, shots=4, heldout_shots=4) == 64
    assert images_to_draw(100, shots=16, heldout_shots=8) == 2400


def test_the_head_that_labels_is_the_zero_shot_head_of_the_model(tiny_encoder: DualEncoder) -> None:
    classes = ClassList(names=NAMES, templates=(("a photo of a {}.",),) * 3)
    drawn = unlabelled(20)
    pixels = torch.as_tensor(drawn.images).permute(0, 3, 1, 2).float() / 255
    cosines = tiny_encoder.encode_images(pixels) @ tiny_encoder.class_embeddings(classes).T
    expected = (tiny_encoder.logit_scale * cosines).softmax(dim=1).numpy()
    found = reference_probabilities(drawn, tiny_encoder, classes)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_no_images_the_model_is_sure_of_is_an_error_with_a_way_out(tiny_encoder: DualEncoder) -> None:
    classes = ClassList(names=NAMES, templates=(("a photo of a thing.",),) * 3)
    with pytest.raises(ImageDataError, match=r"among 20; got none it is sure of\. Add images"):
        label_images(unlabelled(20), tiny_encoder, classes)


PREPROCESS = Preprocess(image_size=(32, 32), resize_mode="squash")


def names(paths: list[Path], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


def test_images_without_folders_are_flat_and_class_folders_are_not(
    flat: Path, tiny_image_folder: Path
) -> None:
    assert is_flat(flat)
    assert not is_flat(tiny_image_folder)


def test_hidden_folders_and_files_that_are_no_images_change_nothing(
    flat: Path, tiny_image_folder: Path, tmp_path: Path
) -> None:
    (flat / ".thumbnails").mkdir()
    (flat / "notes.txt").write_text("x")
    assert is_flat(flat)
    folders = Path(shutil.copytree(tiny_image_folder, tmp_path / "folders"))
    (folders / "list.png").write_text("not an image, whatever its name says")
    assert not is_flat(folders)


def test_images_beside_folders_are_refused(flat: Path) -> None:
    (flat / "red_square").mkdir()
    with pytest.raises(
        ImageDataError, match=r"or images and no folders.*both: red_square beside the image 00"
    ):
        is_flat(flat)


def test_folders_with_neither_images_nor_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageDataError, match="got an empty folder"):
        is_flat(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ImageDataError, match="got files that are no images"):
        is_flat(tmp_path)
    with pytest.raises(ImageDataError, match=r"a folder of images at .*; got no such file"):
        is_flat(tmp_path / "absent")


def test_what_a_file_holds_makes_it_an_image(flat: Path) -> None:
    (flat / "00.png").rename(flat / "no suffix")
    (flat / "01.png").rename(flat / "wrong.txt")
    (flat / "02.png").write_text("not an image")
    (flat / ".03.png").write_bytes((flat / "03.png").read_bytes())
    found = names(find_images(flat, recursive=False)[0], flat)
    assert found == [*(f"{index:02}.png" for index in range(3, 36)), "no suffix", "wrong.txt"]


def test_folders_below_are_searched_when_asked_for(tiny_image_folder: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny_image_folder, tmp_path / "images" / "deep" / "deeper")).parents[1]
    shutil.copytree(tiny_image_folder, root / ".hidden")
    shutil.copy(tiny_image_folder / "red_square" / "00.png", root / "top.png")
    (root / "deep" / "loop").symlink_to(root)
    found = names(find_images(root, recursive=True)[0], root)
    assert len(found) == 37
    assert found == sorted(found)
    assert names(find_images(root, recursive=False)[0], root) == ["top.png"]


def test_folders_without_images_say_where_they_were_looked_for(tiny_image_folder: Path) -> None:
    with pytest.raises(ImageDataError, match="itself, not in a folder below it; got none"):
        find_images(tiny_image_folder, recursive=False)


def test_the_seed_decides_which_images_are_drawn(flat: Path) -> None:
    first, again, other = (draw_images(flat, PREPROCESS, count=20, seed=seed) for seed in (0, 0, 1))
    assert first.images.shape == (20, 32, 32, 3)
    assert first.images.dtype == np.uint8
    assert (first.files, first.digests) == (again.files, again.digests)
    np.testing.assert_array_equal(first.images, again.images)
    assert set(first.files) != set(other.files)
    assert (first.found, first.notes) == (36, ())


def test_a_folder_with_fewer_images_is_drawn_whole(flat: Path) -> None:
    assert sorted(draw_images(flat, PREPROCESS, count=64).files) == names(sorted(flat.iterdir()), flat)


def test_what_is_of_no_use_is_named_and_makes_room_for_others(flat: Path) -> None:
    (flat / "list.csv").write_text("x")
    (flat / "00.png").write_bytes((flat / "00.png").read_bytes()[:200])
    shutil.copy(flat / "01.png", flat / "02.png")
    drawn = draw_images(flat, PREPROCESS, count=34)
    assert len(drawn.files) == len(set(drawn.digests)) == 34
    assert drawn.found == 36
    others, damaged, copies = drawn.notes
    assert others == "left out 1 files that are no images: list.csv"
    assert damaged.startswith("left out 1 files that are unreadable images: 00.png (")
    assert copies.startswith("left out 1 files that are copies of other images: 0")


def test_nothing_but_damaged_images_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(ImageDataError, match=r"one or more readable images in .*1 that are not: a\.png"):
        draw_images(tmp_path, PREPROCESS, count=4)


def test_a_draw_goes_into_folders_when_asked_for(tiny_image_folder: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny_image_folder, tmp_path / "images"))
    (root / "Blue_Stripes" / "deep").mkdir()
    (root / "green_disc" / "list.csv").write_text("x")
    damaged = root / "red_square" / "00.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    shutil.copy(root / "red_square" / "01.png", root / "Blue_Stripes" / "deep" / "01.png")
    drawn = draw_images(root, PREPROCESS, count=64, recursive=True)
    assert (drawn.found, len(drawn.images)) == (37, 35)
    assert {name.rpartition("/")[0] for name in drawn.files} >= {"red_square", "green_disc"}
    others, damaged_note, copies = drawn.notes
    assert others == "left out 1 files that are no images: green_disc/list.csv"
    assert damaged_note.startswith("left out 1 files that are unreadable images: red_square/00.png (")
    assert copies.endswith(("Blue_Stripes/deep/01.png", "red_square/01.png"))
    few = [draw_images(root, PREPROCESS, count=8, seed=3, recursive=True).files for _ in range(2)]
    assert few[0] == few[1]
    assert len(set(few[0])) == 8
