from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from cbpt_runtime.bench.scenarios import measure_class_counts, plain_head, with_classes
from cbpt_runtime.export.session import open_session
from cbpt_runtime.export.weights import to_bytes


@pytest.fixture(scope="module")
def model(tiny_served: Path) -> onnx.ModelProto:
    return onnx.load(tiny_served / "shapes_classifier" / "1" / "model.onnx")


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def test_the_plain_head_gives_the_same_logits_with_less(model: onnx.ModelProto) -> None:
    plain = plain_head(model)
    assert [output.name for output in plain.graph.output] == ["logits", "probabilities"]
    assert len(plain.graph.node) < len(model.graph.node)
    assert len(plain.graph.initializer) < len(model.graph.initializer)
    full, less = open_session(to_bytes(model)), open_session(to_bytes(plain))
    given = {"images": images(3)}
    for name in ("logits", "probabilities"):
        assert np.allclose(full.run([name], given)[0], less.run([name], given)[0], atol=1e-6)


def test_a_head_of_any_size_runs_and_keeps_the_alarm(model: onnx.ModelProto) -> None:
    larger = with_classes(model, 1000)
    logits, alarm = open_session(to_bytes(larger)).run(["logits", "alarm"], {"images": images(2)})
    assert (logits.shape, alarm.shape) == ((2, 1000), (2,))
    assert len({len(tensor.raw_data) for tensor in model.graph.initializer}) > 1  # the original is as it was
    assert open_session(to_bytes(model)).run(["logits"], {"images": images(1)})[0].shape == (1, 3)


def test_class_counts_are_timed_one_by_one(model: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(to_bytes(model))
    found = measure_class_counts(path, images(1), (10, 500), threads=1)
    assert [entry.classes for entry in found] == [10, 500]
    assert found[1].size_bytes > found[0].size_bytes
    assert all(entry.latency_ms > 0 for entry in found)
