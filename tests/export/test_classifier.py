"""A graph as a classifier: what it says about itself is checked before it runs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors import numpy as safetensors_numpy

from cbpt_runtime.bundle import ENCODER, Bundle, BundleContent, write_bundle
from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.classification.classifier import SecondLook
from cbpt_runtime.errors import ConfigError, ExportError
from cbpt_runtime.export.classifier import GraphClassifier, RepositoryClassifier
from cbpt_runtime.export.graph import export_onnx
from cbpt_runtime.export.manifest import write_manifest
from cbpt_runtime.export.onnx import read_metadata, write_metadata
from cbpt_runtime.export.weights import to_bytes


def test_a_file_is_known_by_its_own_digest_and_a_repository_by_its_manifests(
    tiny_graph: Path, tiny_served: Path
) -> None:
    graph, repository = GraphClassifier(tiny_graph, threads=1), RepositoryClassifier(tiny_served, threads=1)
    digest = hashlib.sha256(tiny_graph.read_bytes()).hexdigest()
    assert graph.digest == graph.graph_sha256 == repository.graph_sha256 == digest
    assert repository.digest == repository.repository.digest != digest
    assert repository.golden.images > 0
    assert repository.notes == ()


def test_many_images_are_answered_as_few_are(tiny_graph: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)
    classifier = GraphClassifier(tiny_graph, threads=1)
    found = classifier.predict(images)
    assert found.logits.shape == (70, 3)
    np.testing.assert_allclose(found.logits[66:], classifier.predict(images[66:]).logits, atol=1e-4)


@pytest.mark.parametrize("suspects", ["[3]", "[-1]", "[true]", "{}", "[0.5]"])
def test_suspects_that_are_no_classes_are_refused(suspects: str, tiny_graph: Path, tmp_path: Path) -> None:
    model = onnx.load(tiny_graph)
    write_metadata(model, read_metadata(model) | {"cbpt.suspects": suspects})
    (tmp_path / "model.onnx").write_bytes(to_bytes(model))
    with pytest.raises(ConfigError, match="no classes"):
        GraphClassifier(tmp_path / "model.onnx")


def test_a_repository_that_answers_its_golden_images_otherwise_is_refused(
    tiny_served: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_served, tmp_path / "repository"))
    answers = copy / "shapes" / "1" / "golden" / "answers.json"
    content = json.loads(answers.read_text())
    content["images"][0]["probabilities"] = content["images"][0]["probabilities"][::-1]
    answers.write_text(json.dumps(content))
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").unlink()
    known = ("kind", "schema_version", "files")
    write_manifest(copy, {key: value for key, value in manifest.items() if key not in known})
    with pytest.raises(ExportError, match="golden answers"):
        RepositoryClassifier(copy, threads=1)


@pytest.fixture
def with_level(tiny_graph: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Returns a function that writes the tiny graph with a level of the alarm in its metadata."""

    def write(level: str) -> Path:
        model = onnx.load(tiny_graph)
        write_metadata(model, read_metadata(model) | {"cbpt.alarm_threshold": level})
        (tmp_path / "levelled.onnx").write_bytes(to_bytes(model))
        return tmp_path / "levelled.onnx"

    return write


@pytest.mark.parametrize("level", ["1.5", "-0.1", "nan", "high"])
def test_a_level_of_the_alarm_that_is_none_is_refused(level: str, with_level: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="level of the alarm"):
        GraphClassifier(with_level(level))


def test_a_graph_without_a_level_calls_nothing_suspicious_and_cannot_look_twice(tiny_graph: Path) -> None:
    graph = GraphClassifier(tiny_graph, threads=1)
    assert graph.alarm_threshold is None
    assert graph.predict(np.zeros((1, 32, 32, 3), np.uint8)).suspicious is None
    with pytest.raises(ConfigError, match="calls no image suspicious"):
        SecondLook(graph)


def test_the_second_look_of_a_graph_is_that_of_its_bundle(tiny_bundle: Bundle, tmp_path: Path) -> None:
    clean = np.random.default_rng(2).integers(124, 133, (12, 32, 32, 3), dtype=np.uint8)
    triggered = clean.copy()
    triggered[:, 4:10, 4:10] = (255, 0, 0)
    bundle = write_bundle(tmp_path / "bundle", content=_told_apart(tiny_bundle, clean, triggered))
    first = BundleClassifier.from_bundle(bundle)
    (tmp_path / "model.onnx").write_bytes(to_bytes(export_onnx(first)))
    images = np.concatenate([clean, triggered])
    expected = SecondLook(first).predict(images)
    found = SecondLook(GraphClassifier(tmp_path / "model.onnx", threads=1)).predict(images)
    assert expected.looked_twice is not None
    assert expected.boxes is not None
    assert found.boxes is not None
    np.testing.assert_array_equal(expected.looked_twice, np.arange(24) >= 12)
    assert expected.boxes[12:].any()
    np.testing.assert_array_equal(found.suspicious, expected.suspicious)
    np.testing.assert_array_equal(found.looked_twice, expected.looked_twice)
    np.testing.assert_array_equal(found.boxes.any(axis=1), expected.boxes.any(axis=1))  # two may tie
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=5e-3)
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert (found.labels[12:] != expected.head_labels[12:]).all()


def _told_apart(bundle: Bundle, clean: np.ndarray, triggered: np.ndarray) -> BundleContent:
    """The content of a bundle whose original head calls triggered images the suspect."""
    classifier = BundleClassifier.from_bundle(bundle)
    without, within = (classifier.features(images).mean(axis=0) for images in (clean, triggered))
    middle = (without + within) / np.linalg.norm(without + within)
    apart = within - without - middle * float(middle @ (within - without))
    apart /= np.linalg.norm(apart)
    (suspect,) = bundle.suspect_indices
    reference = np.tile(middle - apart, (len(bundle.class_names), 1))
    reference[suspect] = middle + apart
    purified = np.tile(middle, (len(bundle.class_names), 1))
    purified[suspect] = -middle
    purified[0] += 0.01 * apart
    return BundleContent(
        **{part: bundle.manifest[part] for part in ("verdict", "model", "method", "versions")},
        class_names=bundle.class_names,
        templates=tuple(map(tuple, bundle.manifest["classes"]["templates"])),
        suspects=bundle.suspects,
        class_embeddings=_unit(purified),
        reference_embeddings=_unit(reference),
        logit_scale=100.0,
        encoder=safetensors_numpy.load(bundle.read_file(ENCODER)),
        alarm={"threshold": 0.5, "false_alarm_rate": 0.01},
    )


def _unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
