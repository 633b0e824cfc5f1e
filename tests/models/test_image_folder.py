from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cbpt_runtime.errors import ImageDataError
from cbpt_runtime.models.image_folder import draw_images, find_images, is_flat
from cbpt_runtime.runtime.preprocess import Preprocess

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
