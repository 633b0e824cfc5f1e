"""The graph: what it promises, the same bytes every time, nothing of this machine in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.errors import ExportError
from cbpt_runtime.export import graph
from cbpt_runtime.export.foreign_graph import foreign_parts
from cbpt_runtime.export.graph import check_exportable, export_onnx
from cbpt_runtime.export.onnx import check_portable, read_metadata
from cbpt_runtime.export.repository import Exported
from cbpt_runtime.export.session import open_session, run_session
from cbpt_runtime.export.weights import to_bytes
from cbpt_runtime.runtime import zero_shot


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def test_the_graph_has_the_promised_inputs_and_outputs(tiny_export) -> None:
    session = open_session(to_bytes(tiny_export.model))
    (images,) = session.get_inputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["batch", 32, 32, 3])
    outputs = {output.name: (output.type, output.shape) for output in session.get_outputs()}
    assert outputs == {
        "logits": ("tensor(float)", ["batch", 3]),
        "probabilities": ("tensor(float)", ["batch", 3]),
        "alarm": ("tensor(float)", ["batch"]),
        "alarm_target": ("tensor(int64)", ["batch"]),
    }


def test_the_graph_is_portable(tiny_export) -> None:
    assert 18 <= tiny_export.model.opset_import[0].version <= 20
    assert tiny_export.model.ir_version <= 10
    check_portable(tiny_export.model)


def test_the_graph_says_what_it_is(tiny_export) -> None:
    metadata = read_metadata(tiny_export.model)
    assert json.loads(metadata["cbpt.class_names"]) == list(tiny_export.bundle.class_names)
    assert json.loads(metadata["cbpt.preprocess"]) == tiny_export.bundle.preprocess.to_dict()
    assert metadata["cbpt.bundle_digest"] == tiny_export.bundle.digest
    assert "torch" in json.loads(metadata["cbpt.versions"])


def test_the_same_bundle_gives_the_same_bytes(tiny_export, tiny_repository: Exported) -> None:
    graph = tiny_repository.path / "shapes_classifier" / "1" / "model.onnx"
    assert to_bytes(tiny_export.model) == graph.read_bytes()  # two exports, two loaded networks


def test_the_file_holds_no_path_of_the_machine(tiny_export) -> None:
    content = to_bytes(tiny_export.model)
    for trace in (b".py", b"stack_trace", str(Path.cwd()).encode(), str(Path.home()).encode() + b"/"):
        assert trace not in content


@pytest.mark.parametrize("suspects", [[], [1], [0, 2]])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_the_alarm_of_the_graph_is_that_of_heads(suspects: list[int], sigmoid: bool) -> None:
    generator = np.random.default_rng(0)
    before, after = (10 * generator.standard_normal((6, 4)).astype(np.float32) for _ in range(2))
    got, target = graph.alarm(torch.from_numpy(before), torch.from_numpy(after), suspects, sigmoid=sigmoid)
    assert set(target.tolist()) <= set(suspects or [-1])
    np.testing.assert_allclose(got, zero_shot.alarm(before, after, suspects, sigmoid=sigmoid), atol=1e-6)


def test_without_suspects_the_exported_alarm_is_zero(tiny_export) -> None:
    manifest = tiny_export.bundle.manifest | {"suspects": [], "verdict": "clean"}
    bundle = replace(tiny_export.bundle, manifest=manifest)
    model = export_onnx(BundleClassifier.from_bundle(bundle))
    assert foreign_parts(model, image_size=(32, 32), classes=3) == []
    answers = run_session(open_session(to_bytes(model)), tiny_export.images.pixels, batch_size=5)
    assert answers["alarm"].tolist() == [0.0] * len(tiny_export.images.pixels)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda model: setattr(model.opset_import[0], "version", 23), "operator sets"),
        (lambda model: setattr(model, "ir_version", 11), "IR version 11"),
        (lambda model: setattr(model.graph.node[3], "domain", "com.microsoft"), "operator"),
        (lambda model: setattr(model.graph.output[0], "name", "scores"), "inputs and outputs"),
        (
            lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 1),
            "fixed batch",
        ),
    ],
)
def test_what_older_servers_cannot_load_is_refused(
    damage: Callable[[onnx.ModelProto], None], named: str, tiny_export
) -> None:
    model = copied(tiny_export.model)
    damage(model)
    with pytest.raises(ExportError, match=named):
        check_portable(model)


def test_a_network_too_large_for_one_file_is_refused_before_it_is_exported() -> None:
    huge = torch.nn.Linear(2**15, 2**15, device="meta")
    with pytest.raises(ExportError, match=r"got 4\.00 GiB"):
        check_exportable(huge)


def test_what_cannot_be_exported_says_so(tiny_export) -> None:
    class Capricious(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.flatten(1)[:, :16] * (1.0 if pixels.sum().item() > 0 else 2.0)

    classifier = BundleClassifier.from_bundle(tiny_export.bundle)
    classifier.image_encoder.module = Capricious()
    with pytest.raises(ExportError, match=r"torch\.onnx can export"):
        export_onnx(classifier)
