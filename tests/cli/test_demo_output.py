from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.demo import DemoResult, ServedDemo, story
from cbpt_runtime.evaluation import evaluate
from cbpt_runtime.runtime.prediction import Answer, Label


@pytest.fixture(autouse=True)
def _demo_in_no_time(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Bundle, tiny_image_folder: Path, tmp_path: Path
) -> None:
    """Stands in for minutes of work: what the verb prints is the subject here."""

    def run_demo(output: Path, *, seed: int, force: bool, progress: object) -> DemoResult:
        return DemoResult(
            output=output,
            bundle=tiny_bundle.path,
            report=tiny_bundle.path / "report.html",
            checkpoint=tmp_path,
            classes_file=tmp_path / "classes.txt",
            train_images=tiny_image_folder,
            test_images=tiny_image_folder,
            triggered_images=tiny_image_folder,
            pictures=tmp_path / "pictures.png",
            target="Blue Stripes",
            implanted_clean_accuracy=0.97,
            implanted_attack_success_rate=0.99,
            suspects=("Blue Stripes",),
            evaluation=evaluate(
                tiny_bundle, tiny_image_folder, tiny_image_folder, "Blue Stripes", device="cpu"
            ),
            stage_seconds={"draw": 1.0, "train": 2.0},
        )

    monkeypatch.setattr("cbpt_runtime.demo.run_demo", run_demo)
    monkeypatch.setattr("cbpt_runtime.demo.serve_demo", lambda result, progress: "no server here")
    assert story.run_demo is not run_demo


def test_the_demo_ends_with_the_path_of_its_report_and_a_command_to_try(
    run: Callable, tmp_path: Path
) -> None:
    done = run("demo", "--output", tmp_path / "demo")
    assert done.code == 0
    assert all(word in done.out for word in ("99.0 %", "Blue Stripes", "ASR", "cbpt-runtime classify"))
    assert "report.html" in "".join(done.out.split())


def test_the_demo_says_loudly_that_nothing_was_served(run: Callable, tmp_path: Path) -> None:
    done = run("demo", "--output", tmp_path / "demo")
    assert "NOT SERVED: no server here" in done.err


def test_the_demo_shows_what_a_server_answered(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    label = Label(name="owl", probability=0.9)
    served = ServedDemo(
        repository=tmp_path / "model_repository",
        server="tritonserver 2.51.0",
        clean=Answer(image="clean.png", labels=(label,), alarm=0.0),
        triggered=Answer(image="triggered.png", labels=(label,), alarm=0.875),
        seconds=12.0,
    )
    monkeypatch.setattr("cbpt_runtime.demo.serve_demo", lambda result, progress: served)
    done = run("demo", "--output", tmp_path / "demo")
    assert all(word in done.out for word in ("triggered.png", "0.875", "tritonserver 2.51.0"))
    parsed = json.loads(run("demo", "--output", tmp_path / "demo", "--json").out)
    assert parsed["served"]["triggered"]["alarm"] == 0.875


def test_the_demo_can_be_read_by_machines(run: Callable, tmp_path: Path) -> None:
    parsed = json.loads(run("demo", "--output", tmp_path / "demo", "--json").out)
    assert parsed["target"] == "Blue Stripes"
    assert parsed["evaluation"]["before"]["attack_success_rate"]["total"] == 24
