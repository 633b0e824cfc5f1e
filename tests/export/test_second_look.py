"""A repository exported with a second look: what is written, checked and opened."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cbpt_runtime.bench.systems import open_system
from cbpt_runtime.bundle import Bundle
from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.classification.classifier import SecondLook
from cbpt_runtime.errors import ConfigError, ExportError, RepositoryError
from cbpt_runtime.export import repository
from cbpt_runtime.export.images import GateImages, example_of_second_look
from cbpt_runtime.export.manifest import read_repository
from cbpt_runtime.export.profiles import Profile
from cbpt_runtime.export.repository import export_bundle
from cbpt_runtime.export.session import look_twice
from cbpt_runtime.export.triton import LOOKERS, parse_config
from cbpt_runtime.export.verify import verify_repository
from cbpt_runtime.loading import open_classifier
from cbpt_runtime.runtime.prediction import Prediction


def golden_rows(repository: Path) -> list[dict]:
    return json.loads((repository / "shapes/1/golden/answers.json").read_text())["images"]


def test_the_ensemble_hands_pixels_on_and_answers_where_it_looked(twice_served: Path) -> None:
    ensemble = parse_config((twice_served / "shapes/config.pbtxt").read_text())
    *_, count = ensemble.ensemble_scheduling.step
    assert (count.model_name, count.input_map["images"]) == ("shapes_alarm", "pixels")
    assert {count.output_map[name] for name in ("looked_twice", "box")} == {"looked_twice", "box"}
    assert [list(output.dims) for output in ensemble.output][-2:] == [[1], [4]]
    alarm = parse_config((twice_served / "shapes_alarm/config.pbtxt").read_text())
    assert alarm.instance_group[0].count == LOOKERS > 1
    assert alarm.parameters["classifier"].string_value == "shapes_classifier"


def test_the_alarm_model_imports_nothing_but_what_travels_with_it(twice_served: Path) -> None:
    code = """
import json, sys
for name in ("torch", "open_clip", "safetensors", "typer", "jaxtyping", "onnx", "onnxruntime"):
    sys.modules[name] = None
sys.path = [p for p in sys.path if "cbpt" not in p]
sys.path.insert(0, sys.argv[1])
import model
from runtime import second_look
print(second_look.__file__)
"""
    folder = twice_served / "shapes_alarm" / "1"
    command = [sys.executable, "-B", "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(folder))


def test_the_golden_answers_of_a_second_look_are_those_of_pytorch(
    twice_served: Path, levelled_bundle: Bundle
) -> None:
    rows = golden_rows(twice_served)
    classifier = SecondLook(BundleClassifier.from_bundle(levelled_bundle, "cpu"))
    said = classifier.predict(
        classifier.read([twice_served / "shapes/1/golden" / row["file"] for row in rows])
    )
    assert said.looked_twice.tolist() == ["second_look" in row for row in rows]
    again = [(row["second_look"], place) for place, row in enumerate(rows) if "second_look" in row]
    assert any(any(row["box"]) for row, _ in again)
    for row, place in again:
        assert row["box"] == said.boxes[place].tolist()
        np.testing.assert_allclose(row["probabilities"], said.probabilities[place], atol=1e-4)


def test_verify_and_the_gate_look_twice(
    twice_served: Path, levelled_bundle: Bundle, tiny_triggered_folder: Path
) -> None:
    found = verify_repository(twice_served, levelled_bundle, images=tiny_triggered_folder)
    assert found.foreign == ()
    assert [row["quantity"] for row in found.parity["comparisons"]].count("second look") == 1


def test_the_gate_and_the_golden_answers_share_one_second_look(
    levelled_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []

    def listening(*args: Any, **keywords: Any) -> Prediction:
        said.append(look_twice(*args, **keywords))
        return said[-1]

    monkeypatch.setattr(repository, "look_twice", listening)
    profile = Profile(second_look=True, max_batch=2)
    export_bundle(levelled_bundle, tmp_path / "out", name="shapes", profile=profile)
    (prediction,) = said
    rows = golden_rows(tmp_path / "out")
    assert [row["second_look"]["box"] for row in rows if "second_look" in row] == [
        box.tolist() for box in prediction.boxes[prediction.looked_twice]
    ]


@pytest.mark.parametrize("change", ["box", "probabilities"])
def test_another_answer_after_a_second_look_is_found(
    change: str, twice_served: Path, tmp_path: Path, resealed: Callable[[Path], None]
) -> None:
    copy = Path(shutil.copytree(twice_served, tmp_path / "repository"))
    file = copy / "shapes/1/golden/answers.json"
    answers = json.loads(file.read_text())
    twice = next(row["second_look"] for row in answers["images"] if "second_look" in row)
    twice[change][0] += 1
    file.write_text(json.dumps(answers))
    resealed(copy)
    with pytest.raises(ExportError, match="looked at twice"):
        verify_repository(copy)


@pytest.mark.parametrize("twice", [{}, {"box": [1], "probabilities": [0, 1, 0]}, 7])
def test_golden_second_looks_of_no_shape_are_refused(
    twice: object, twice_served: Path, tmp_path: Path, resealed: Callable[[Path], None]
) -> None:
    copy = Path(shutil.copytree(twice_served, tmp_path / "repository"))
    file = copy / "shapes/1/golden/answers.json"
    answers = json.loads(file.read_text())
    answers["images"][0]["second_look"] = twice
    file.write_text(json.dumps(answers))
    resealed(copy)
    with pytest.raises(RepositoryError, match="golden images"):
        verify_repository(copy)


@pytest.mark.parametrize("without", [{"alarm_threshold": None}, {"suspects": []}])
def test_a_manifest_that_looks_twice_at_nothing_is_refused(
    without: dict[str, Any], twice_served: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(twice_served, tmp_path / "repository"))
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | without))
    with pytest.raises(RepositoryError, match="a second look without"):
        read_repository(copy)


def test_a_repository_looks_twice_as_exported_and_its_graph_alone_does_not(
    twice_served: Path, tiny_triggered_folder: Path
) -> None:
    files = sorted(tiny_triggered_folder.rglob("*.png"))[:6]
    answers = [
        open_classifier(source)(files) for source in (twice_served, next(twice_served.rglob("*.onnx")))
    ]
    assert any(answer.box for answer in answers[0])
    assert {answer.looked_twice for answer in answers[1]} == {None}
    asked = open_classifier(twice_served)
    assert open_classifier(asked) is asked


def test_a_benchmark_measures_the_repository_as_it_is_served(twice_served: Path) -> None:
    system = open_system(str(twice_served), threads=1)
    assert isinstance(system.classifier, SecondLook)
    assert system.facts["second_look"] is True
    assert system.graph is not None


def test_a_bundle_that_calls_nothing_suspicious_is_refused_before_any_work(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="calls no image suspicious"):
        export_bundle(tiny_bundle, tmp_path / "out", profile=Profile(second_look=True))
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_whether_the_server_looks_twice(
    tiny_bundle: Bundle, levelled_bundle: Bundle, tmp_path: Path, run: Callable
) -> None:
    refused = run("export", tiny_bundle.path, "--output", tmp_path / "out", "--second-look")
    assert (refused.code, "calls no image suspicious" in refused.err) == (2, True)
    done = run(
        "export", levelled_bundle.path, "--output", tmp_path / "out", "--second-look", "--max-batch", "2"
    )
    assert done.code == 0, done.err
    assert read_repository(tmp_path / "out").manifest.profile.second_look
    rows = json.loads(next((tmp_path / "out").glob("*/1/golden/answers.json")).read_text())["images"]
    seen = sum("second_look" in row for row in rows)
    assert f"second look on; {seen or 'no'} golden image" in " ".join(done.out.split())


def test_an_image_under_a_dummy_trigger_joins_the_golden_set(
    levelled_bundle: Bundle, tiny_image_folder: Path, tiny_triggered_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    classifier = SecondLook(BundleClassifier.from_bundle(levelled_bundle, "cpu"))
    clean, triggered = (
        classifier.read(sorted(folder.rglob("*.png"))[12:16])
        for folder in (tiny_image_folder, tiny_triggered_folder)
    )
    images = GateImages(pixels=clean, labels=None, calibration=clean[:0], encoded=(), source="bundle")
    assert example_of_second_look(levelled_bundle, images, classifier) == ()
    painted = type("Painted", (), {"images": triggered})
    monkeypatch.setattr("cbpt_runtime.purification.dummy_triggers.paint_dummy_triggers", lambda *_: [painted])
    (file,) = example_of_second_look(levelled_bundle, images, classifier)
    said = classifier.predict(classifier.read([file]))
    assert said.boxes.any()
