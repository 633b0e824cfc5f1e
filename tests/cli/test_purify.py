"""The real purification through the command line, on a random tiny CLIP and with as few steps as possible."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cbpt_runtime.bundle import HEAD, read_bundle
from cbpt_runtime.models import labelling
from cbpt_runtime.models.labelling import UnlabelledImages
from cbpt_runtime.purification import cbpt as purification


@pytest.fixture
def arguments(
    tiny_checkpoint_folder: Path, tiny_class_file: Path, tiny_image_folder: Path, tmp_path: Path
) -> list[object]:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps({"search_steps": 1, "inversion_steps": 2, "tuning_steps": 2, "suspect_p_value": 0.999})
    )
    return [
        *(
            "--checkpoint",
            tiny_checkpoint_folder,
            "--classes",
            tiny_class_file,
            "--images",
            tiny_image_folder,
        ),
        *("--template", "a photo of a {}.", "--shots", 4, "--device", "cpu", "--config", config),
    ]


def test_the_result_is_printed_for_people_and_for_machines(
    run: Callable, arguments: list[object], tmp_path: Path
) -> None:
    text = run("purify", *arguments, "--output", tmp_path / "text")
    assert text.code == 0
    assert all(word in text.out for word in ("verdict", "held-out clean accuracy", "seconds", "report.html"))
    assert "read checkpoint" in text.err
    parsed = json.loads(run("purify", *arguments, "--output", tmp_path / "json", "--json").out)
    keys = {"bundle", "digest", "verdict", "suspects", "metrics", "stage_seconds", "odd_words"}
    assert keys == set(parsed)
    assert parsed["digest"] == read_bundle(tmp_path / "json").digest


def test_an_interrupted_run_resumes_to_the_same_bytes(
    run: Callable, arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("purify", *arguments, "--output", tmp_path / "whole").code == 0
    invert = purification.invert
    calls = []

    def interrupt_later(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return invert(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(purification, "invert", interrupt_later)
        stopped = run("purify", *arguments, "--output", tmp_path / "resumed")
    assert stopped.code == 130
    assert "--resume" in stopped.err
    assert not (tmp_path / "resumed").exists()
    assert run("purify", *arguments, "--output", tmp_path / "resumed", "--resume").code == 0
    heads = [(tmp_path / name / HEAD).read_bytes() for name in ("whole", "resumed")]
    assert heads[0] == heads[1]


def test_an_existing_output_needs_force(run: Callable, arguments: list[object], tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    done = run("purify", *arguments, "--output", tmp_path / "bundle")
    assert (done.code, done.out) == (2, "")
    assert "--force" in done.err


def test_an_unknown_setting_lists_the_known_ones(
    run: Callable, arguments: list[object], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"sede": 1}')
    done = run("purify", *arguments, "--output", tmp_path / "bundle")
    assert done.code == 2
    assert "sede" in done.err
    assert "seed" in done.err


def test_unlabelled_images_are_counted_on_stderr(
    run: Callable,
    arguments: list[object],
    tiny_image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for index, path in enumerate(sorted(tiny_image_folder.glob("*/*.png"))):
        shutil.copy(path, flat / f"{index}.png")
    arguments[arguments.index(tiny_image_folder)] = flat
    refused = run("purify", *arguments, "--output", tmp_path / "bundle")
    assert (refused.code, refused.out) == (2, "")
    assert "one folder per class" in refused.err

    def two_classes(drawn: UnlabelledImages, *_: object) -> np.ndarray:
        reds = drawn.images.mean(axis=(1, 2)).argmax(axis=1) == 0
        return np.where(reds[:, None], np.float32([0.8, 0.1, 0.1]), np.float32([0.1, 0.8, 0.1]))

    monkeypatch.setattr(labelling, "reference_probabilities", two_classes)
    done = run("purify", *arguments, "--output", tmp_path / "bundle")
    assert done.code == 0
    assert "agreement with the suspect's labels" in done.out
    assert "of 36 images 36 were looked at, 24 are used, 0 were left out as unsure" in done.err
    assert "no images of 1 of 3 classes: Blue Stripes" in done.err
