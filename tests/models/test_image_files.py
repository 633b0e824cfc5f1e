"""What lies in image folders of real people: everything is used, or counted and named."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cbpt_runtime.bundle import Bundle, read_bundle
from cbpt_runtime.errors import ConfigError, ImageDataError
from cbpt_runtime.models.data import draw_clean_split, find_class_folders, read_images
from cbpt_runtime.models.image_files import sort_files
from cbpt_runtime.runtime import preprocess
from cbpt_runtime.runtime.preprocess import MAX_PIXELS_VARIABLE, Preprocess, decode_image

PREPROCESS = Preprocess(image_size=(32, 32), resize_mode="squash")
NAMES = ("red_square", "green disc", "Blue Stripes")
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
AVIF = b"\0\0\0\x18ftypavif\0\0\0\0mif1avif"


@pytest.fixture(autouse=True)
def no_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    """No decoder of HEIC and AVIF, whatever is installed; test_heif.py has one."""
    few = tuple(name for name in preprocess._formats() if name not in ("HEIF", "AVIF"))
    monkeypatch.setattr(preprocess, "_formats", lambda: few)


@pytest.fixture
def messy(tiny_image_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny image folder with what cameras, browsers, systems and people leave in folders."""
    root = Path(shutil.copytree(tiny_image_folder, tmp_path / "messy"))
    first = root / "red_square"
    (first / "00.png").rename(first / "00.jfif")
    (first / "01.png").rename(first / "01")
    (first / "02.png").rename(first / "02.jpg_large")
    (first / "deep" / "deeper").mkdir(parents=True)
    shutil.copy(first / "03.png", first / "deep" / "deeper" / "03.png")
    (first / "gone.png").symlink_to("nowhere.png")
    (first / "phone.heic").write_bytes(HEIC)
    (first / "web.avif").write_bytes(AVIF)
    (first / "notes.txt").write_text("x")
    (first / ".04.png").write_bytes((first / "04.png").read_bytes())
    (first / "Thumbs.db").write_text("x")
    os.mkfifo(first / "pipe.png")
    (root / "readme.md").write_text("x")
    (root / "lost+found").mkdir()
    (root / ".DS_Store").write_text("x")
    return root


LEFT_OUT = {
    "are hidden or the system's": {".DS_Store", "lost+found", "red_square/.04.png", "red_square/Thumbs.db"},
    "lie beside the folders of the classes": {"readme.md"},
    "lie in folders further down": {"red_square/deep/deeper/03.png"},
    "are links that lead nowhere": {"red_square/gone.png"},
    "are no plain files": {"red_square/pipe.png"},
    "are no images": {"red_square/notes.txt"},
    "are HEIC, which needs the package pillow-heif": {"red_square/phone.heic"},
    "are AVIF, which needs a newer Pillow": {"red_square/web.avif"},
}


def left_out(notes: list[str]) -> dict[str, set[str]]:
    found = {}
    for note in notes:
        head, _, names = note.partition(": ")
        words = head.removeprefix("left out ").split(" files that ")
        found[words[1]] = set(names.split(", "))
        assert int(words[0]) == len(found[words[1]])
    return found


def test_content_decides_and_the_rest_is_counted_and_named(messy: Path) -> None:
    files = find_class_folders(messy, NAMES)
    assert [len(own) for own in files] == [12, 12, 12]
    assert {"00.jfif", "01", "02.jpg_large"} <= {path.name for path in files[0]}
    assert left_out(list(files.notes)) == LEFT_OUT
    assert read_images(files[0], PREPROCESS).shape == (12, 32, 32, 3)


def test_every_verb_counts_all_images_and_says_what_it_left_out(
    run: Callable, messy: Path, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    bundle = tiny_bundle.path
    found = json.loads(run("evaluate", bundle, "--images", messy, "--json").out)
    assert found["clean_images"] == 36
    assert left_out(found["notes"]) == LEFT_OUT
    assert "note: left out 1 files that are no images" in run("evaluate", bundle, "--images", messy).err
    below = {kind: names for kind, names in LEFT_OUT.items() if "folders" not in kind}
    applied = json.loads(
        run("attack", "apply", "badnet", "--images", messy, "--output", tmp_path / "applied", "--json").out
    )
    assert applied["images"] == 37
    assert left_out(applied["notes"]).keys() == below.keys()
    fast = ("--scenario", "single-stream", "--duration-s", 0.05, "--warmup-s", 0)
    assert (
        json.loads(run("bench", "run", bundle, "--images", messy, *fast, "--json").out)["images"]["count"]
        == 37
    )
    classified = run("classify", bundle, messy, "--json")
    assert len(json.loads(classified.out)["images"]) == 37
    assert "note: left out 1 files that are HEIC" in classified.err


def test_a_split_notes_what_was_left_out(messy: Path) -> None:
    split = draw_clean_split(messy, NAMES, PREPROCESS, shots=4, heldout_shots=8)
    assert left_out(list(split.notes)) == LEFT_OUT
    assert len(split.tune_images) + len(split.heldout_images) == 36


def test_a_folder_reached_twice_by_links_is_read_once(tiny_image_folder: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny_image_folder, tmp_path / "images"))
    (root / "loop").symlink_to(root)
    assert len(sort_files(root, recursive=True).images) == 36


def test_sockets_are_not_opened(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "a.png"))
        found = sort_files(tmp_path, recursive=False)
    assert found.images == ()
    assert [path.name for path in found.left_out["are no plain files"]] == ["a.png"]


# Images that cannot be read ---------------------------------------------------------------------------


@pytest.fixture
def damaged(tiny_image_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny image folder with 20 of its 36 images cut off."""
    root = Path(shutil.copytree(tiny_image_folder, tmp_path / "damaged"))
    for path in sorted(root.glob("*/*.png")):
        if int(path.stem) >= (2 if path.parent.name != "red_square" else 12):
            path.write_bytes(path.read_bytes()[:200])
    return root


def test_all_unreadable_images_are_named_at_once(
    run: Callable, damaged: Path, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(ImageDataError, match="expected 36 readable images; got 20 that are not") as caught:
        draw_clean_split(damaged, NAMES, PREPROCESS, shots=2, heldout_shots=1)
    names = [str(path) for path in damaged.glob("*/*.png") if path.stat().st_size == 200]
    assert len(names) == 20
    assert all(name in str(caught.value) for name in names)
    bundle = tiny_bundle.path
    for words in (
        ("evaluate", bundle, "--images", damaged),
        ("export", bundle, "--calibration", damaged, "--output", tmp_path / "out"),
        ("attack", "apply", "badnet", "--images", damaged, "--output", tmp_path / "out"),
        ("bench", "run", bundle, "--images", damaged, "--output", tmp_path / "out"),
        ("classify", bundle, damaged),
    ):
        done = run(*words)
        assert done.code == 2, words
        assert all(name in done.err for name in names), words
        assert not (tmp_path / "out").exists()


def test_unreadable_images_can_be_skipped_and_are_counted(
    run: Callable, damaged: Path, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    split = draw_clean_split(damaged, NAMES, PREPROCESS, shots=2, heldout_shots=2, skip_unreadable=True)
    assert np.bincount(split.tune_labels).tolist() == [2, 1, 1]
    assert np.bincount(split.heldout_labels).tolist() == [2, 1, 1]
    assert split.notes[0].startswith("left out 20 files that are unreadable images: green_disc/02.png (")
    bundle = tiny_bundle.path
    found = json.loads(run("evaluate", bundle, "--images", damaged, "--skip-unreadable", "--json").out)
    assert found["clean_images"] == 16
    assert found["notes"][0].startswith("left out 20 files that are unreadable images")
    applied = tmp_path / "applied"
    words = ("attack", "apply", "badnet", "--images", damaged, "--output", applied, "--skip-unreadable")
    assert run(*words).code == 0
    assert len(list(applied.glob("*/*.png"))) == 16
    classified = run("classify", bundle, damaged, "--skip-unreadable", "--json")
    assert len(json.loads(classified.out)["images"]) == 16
    assert "note: left out 20 files that are unreadable images" in classified.err


def test_a_class_without_a_readable_image_is_named_even_when_skipping(damaged: Path) -> None:
    for path in (damaged / "green_disc").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ImageDataError, match="without readable images: green disc"):
        draw_clean_split(damaged, NAMES, PREPROCESS, shots=2, skip_unreadable=True)


def test_the_limit_of_pixels_is_named_and_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (100, 100)).save(tmp_path / "a.png")
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "9999")
    with pytest.raises(ImageDataError, match=r"got 100×100, more than the 9,999 pixels allowed \(CBPT_MAX_P"):
        decode_image(tmp_path / "a.png")
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "10000")
    assert decode_image(tmp_path / "a.png").size == (100, 100)
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "many")
    with pytest.raises(ConfigError, match="CBPT_MAX_PIXELS as a whole number from 1 to"):
        decode_image(tmp_path / "a.png")


def test_a_format_without_its_decoder_is_named() -> None:
    with pytest.raises(ImageDataError, match="got HEIC, which needs the package pillow-heif"):
        decode_image(HEIC)
    with pytest.raises(ImageDataError, match="got AVIF, which needs a newer Pillow"):
        decode_image(AVIF)


# Class lists and folders ------------------------------------------------------------------------------


def test_classes_and_their_folders_may_have_different_names(
    run: Callable, tiny_checkpoint_folder: Path, tiny_image_folder: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(tiny_image_folder, tmp_path / "images"))
    for number, name in enumerate(("red_square", "green_disc", "Blue_Stripes")):
        (root / name).rename(root / f"n{number:08}")
    classes = tmp_path / "imagenet_class_index.json"
    classes.write_text(
        json.dumps({str(i): [f"n{i:08}", name] for i, name in enumerate(("crane", "shark_fin", "crane"))})
    )
    quick = tmp_path / "quick.json"
    quick.write_text(
        '{"search_steps": 1, "search_concepts": 8, "inversion_steps": 1, "tuning_steps": 1,'
        ' "background_words": false}'
    )
    done = run(
        *("purify", "--checkpoint", tiny_checkpoint_folder, "--classes", classes, "--images", root),
        *("--output", tmp_path / "bundle", "--template", "a {}", "--shots", 2, "--config", quick),
    )
    assert done.code == 0, done.err
    bundle = read_bundle(tmp_path / "bundle")
    assert bundle.class_names == ("crane (n00000000)", "shark_fin", "crane (n00000002)")
    assert bundle.class_folders == ("n00000000", "n00000001", "n00000002")
    assert bundle.manifest["classes"]["templates"][0] == ["a crane"]
    found = json.loads(run("evaluate", bundle.path, "--images", root, "--json").out)
    assert found["clean_images"] == 36


def test_a_wrong_list_for_the_folders_says_how_to_join_them(tiny_image_folder: Path) -> None:
    with pytest.raises(ImageDataError, match="a list with the columns folder and name says which is whose"):
        find_class_folders(tiny_image_folder, ("tench", "green disc", "goldfish"))
