"""The verdict through the command line, on a random tiny CLIP, with few words and few steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from cbpt_runtime.purification import vocabulary

FEW = {"search_concepts": 8, "search_steps": 2, "search_batch": 2}
FIELDS = {"name", "on_list", "p_value", "score", "family", "success", "reference_success"}


@pytest.fixture(autouse=True)
def _few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    words = vocabulary.background_words()[:200:8]
    monkeypatch.setattr(vocabulary, "background_words", lambda: words)


@pytest.fixture
def scan(
    run: Callable, tiny_checkpoint_folder: Path, tiny_image_folder: Path, tmp_path: Path
) -> Callable[..., object]:
    """Scans the random model, which with a level of almost 1 has a suspect, and with one of almost 0 none."""

    def call(*options: object, level: float = 1e-9, images: Path = tiny_image_folder) -> object:
        config = tmp_path / "config.json"
        config.write_text(json.dumps(FEW | {"suspect_p_value": level}))
        given = ("--images", images, "--config", config, "--device", "cpu")
        return run("scan", tiny_checkpoint_folder, *given, *options)

    return call


SURELY = 1.0  # a level that the best concept lies below in any case


def test_a_clean_verdict_exits_0_and_names_what_comes_nearest(scan: Callable) -> None:
    done = scan()
    assert done.code == 0
    lines = dict(line.split("  ", 1) for line in done.out.splitlines())
    assert list(lines) == ["verdict", "p-value", "images", "most suspicious words"]
    assert (lines["verdict"].strip(), lines["images"].strip()) == ("clean", "36")
    assert 1 <= lines["most suspicious words"].count("(") <= 5
    assert "search 6/6" in done.err


def test_a_backdoor_exits_3_and_shows_the_suspects(scan: Callable, tiny_class_file: Path) -> None:
    done = scan("--classes", tiny_class_file, level=SURELY)
    assert done.code == 3
    columns = ("suspected target", "on the list", "p-value", "score", "trigger family", "on the reference")
    assert all(column in done.out for column in columns)
    assert "verdict  backdoored" in done.out
    assert "most suspicious" not in done.out


@pytest.mark.parametrize(("level", "code", "verdict"), [(1e-9, 0, "clean"), (SURELY, 3, "backdoored")])
def test_machines_get_one_object_and_the_same_exit_code(
    scan: Callable, level: float, code: int, verdict: str
) -> None:
    done = scan("--json", "--seed", 7, level=level)
    found = json.loads(done.out)
    assert (done.code, found["verdict"]) == (code, verdict)
    assert found["config"] | FEW | {"seed": 7} == found["config"]
    assert len(found["sha256"]) == 64
    assert found["images"] == 36
    assert found["p_value"] == found["evidence"]["p_value"]
    assert bool(found["suspects"]) == (code == 3)
    for suspect in found["suspects"]:
        assert set(suspect) == FIELDS
        assert suspect["on_list"] is None  # there was no list
        assert found["p_value"] <= suspect["p_value"] <= 1


def test_classes_say_whether_a_suspect_is_one_of_them(scan: Callable, tiny_class_file: Path) -> None:
    found = json.loads(scan("--json", "--classes", tiny_class_file, level=SURELY).out)
    names = tiny_class_file.read_text().splitlines()
    assert found["suspects"]
    assert all(suspect["on_list"] is (suspect["name"] in names) for suspect in found["suspects"])


def test_a_reference_changes_the_scores_and_is_named(scan: Callable, tiny_relative_folder: Path) -> None:
    alone, beside = (
        json.loads(scan("--json", *more).out)["evidence"]
        for more in ((), ("--reference", tiny_relative_folder))
    )
    assert {row["score"] for row in alone["concepts"]} != {row["score"] for row in beside["concepts"]}
    assert all(row["reference_success"] is None for row in alone["concepts"])
    assert all(0 <= row["reference_success"] <= 1 for row in beside["concepts"])
    told = scan("--reference", tiny_relative_folder).err
    assert f"note: compared with the reference {tiny_relative_folder}, SHA-256" in told


def test_what_is_no_reference_is_refused(
    scan: Callable, tiny_folder: Callable, tiny_checkpoint_folder: Path
) -> None:
    same = scan("--reference", tiny_checkpoint_folder)
    assert (same.code, same.out) == (2, "")
    assert "expected a reference other than the suspect" in same.err
    other = scan("--reference", tiny_folder("timm"))
    assert (other.code, other.out) == (2, "")
    assert "expected a reference with the suspect's preprocessing" in other.err
    stranger = scan("--reference", tiny_folder("resnet"))
    assert (stranger.code, stranger.out) == (2, "")
    assert "the suspect was not fine-tuned from it" in stranger.err


def test_a_bare_reference_takes_the_architecture_of_the_suspect(
    run: Callable, scan: Callable, tiny_checkpoint_folder: Path, tiny_relative_folder: Path, tmp_path: Path
) -> None:
    bare = shutil.copy(tiny_checkpoint_folder / "open_clip_model.safetensors", tmp_path / "bare.safetensors")
    config = tiny_checkpoint_folder / "open_clip_config.json"
    nameless = scan("--reference", bare)
    assert (nameless.code, nameless.out) == (2, "")
    assert "the architecture of" in nameless.err
    named = scan("--reference", bare, "--model", config)
    assert "expected a reference other than the suspect" in named.err
    assert scan("--reference", tiny_relative_folder, "--model", config).code == 0  # it says what it is


def test_unusable_files_are_left_out_and_counted(
    scan: Callable, tiny_image_folder: Path, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(tiny_image_folder, tmp_path / "images"))
    (images / "notes.txt").write_text("x")
    damaged = images / "red_square" / "00.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    shutil.copy(images / "red_square" / "01.png", images / "copy.png")
    done = scan(images=images)
    assert done.code == 0
    assert "images                 35" in done.out
    assert "note: left out 1 files that are no images: notes.txt" in done.err
    assert "unreadable images: red_square/00.png (" in done.err
    assert "note: left out 1 files that are copies of other images: " in done.err


def test_images_are_needed_and_not_too_few(scan: Callable, tmp_path: Path) -> None:
    absent = scan(images=tmp_path / "absent")
    assert (absent.code, absent.out) == (2, "")
    assert "no such file" in absent.err
    (tmp_path / "few").mkdir()
    empty = scan(images=tmp_path / "few")
    assert (empty.code, empty.out) == (2, "")
    for index in range(3):
        Image.new("RGB", (40, 40), (index, 0, 0)).save(tmp_path / "few" / f"{index}.png")
    few = scan(images=tmp_path / "few")
    assert (few.code, few.out) == (2, "")
    assert "16 images or more" in few.err
    assert "got 3" in few.err


def test_an_unknown_setting_is_refused(
    run: Callable, tiny_checkpoint_folder: Path, tiny_image_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"serch_steps": 2}')
    given = ("--images", tiny_image_folder, "--config", tmp_path / "config.json")
    done = run("scan", tiny_checkpoint_folder, *given)
    assert (done.code, done.out) == (2, "")
    assert "serch_steps" in done.err


@pytest.mark.parametrize(("level", "code"), [(1e-9, 0), (SURELY, 3)])
def test_a_report_is_written_beside_the_verdict(
    scan: Callable, tmp_path: Path, level: float, code: int
) -> None:
    page = tmp_path / "new" / "scan.html"
    done = scan("--report", page, "--json", level=level)
    assert done.code == code
    json.loads(done.out)
    assert f"report: {page}" in done.err
    assert [path.name for path in page.parent.iterdir()] == ["scan.html"]
    assert page.read_text().startswith("<!doctype html>")


def test_a_report_in_the_way_is_refused_before_any_work(scan: Callable, tmp_path: Path) -> None:
    page = tmp_path / "scan.html"
    page.write_text("precious")
    refused = scan("--report", page)
    assert (refused.code, refused.out) == (2, "")
    assert "--force" in refused.err
    assert "read checkpoint" not in refused.err
    assert page.read_text() == "precious"
    assert scan("--report", page, "--force").code == 2
    assert page.read_text() == "precious"
    page.unlink()
    assert (scan("--report", page).code, scan("--report", page, "--force").code) == (0, 0)


def test_a_report_that_cannot_be_written_leaves_nothing(scan: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = scan("--report", tmp_path / "file" / "scan.html")
    assert (done.code, done.out) == (2, "")  # before any work
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "file"]
