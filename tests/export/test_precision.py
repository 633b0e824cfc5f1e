"""fp16 and int8: smaller, measured, and refused when they are worse."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from cbpt_runtime.errors import ExportError
from cbpt_runtime.export import precision
from cbpt_runtime.export.images import GateImages
from cbpt_runtime.export.onnx import check_portable, read_metadata
from cbpt_runtime.export.precision import reduce_precision
from cbpt_runtime.export.profiles import Profile


@pytest.fixture(scope="module")
def labelled(tiny_export) -> GateImages:
    """The drawn pictures, labelled by the classifier itself: its accuracy is 1."""
    images = tiny_export.images
    labels = tiny_export.classifier.predict(images.pixels).labels
    return GateImages(pixels=images.pixels, labels=labels, encoded=images.encoded, source="folder")


def test_fp16_halves_the_weights_and_keeps_the_labels(tiny_export, labelled: GateImages) -> None:
    before = tiny_export.model.SerializeToString(deterministic=True)
    model, report = reduce_precision(
        tiny_export.model, tiny_export.bundle, labelled, Profile(precision="fp16")
    )
    check_portable(model)
    assert read_metadata(model)["cbpt.precision"] == "fp16"
    assert report["size_ratio"] < 0.7
    assert report["accuracy"] == report["accuracy_fp32"] == 1.0
    assert tiny_export.model.SerializeToString(deterministic=True) == before


def test_int8_keeps_measured_layers_in_fp32_until_it_is_good_enough(
    tiny_export, labelled: GateImages
) -> None:
    model, report = reduce_precision(
        tiny_export.model, tiny_export.bundle, labelled, Profile(precision="int8")
    )
    check_portable(model)
    kinds = {node.op_type for node in model.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert report["accuracy_fp32"] - report["accuracy"] <= 0.005
    assert report["speed_up_batch_1"] > 0
    assert isinstance(report["layers_kept_in_fp32"], list)


def test_a_variant_that_is_worse_is_refused(
    tiny_export, labelled: GateImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ruined(model: onnx.ModelProto, _: str) -> onnx.ModelProto:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        head = next(tensor for tensor in copy.graph.initializer if tensor.name == "class_embeddings")
        values = onnx.numpy_helper.to_array(head)
        head.CopyFrom(onnx.numpy_helper.from_array(np.roll(values, 1, axis=1), head.name))
        return copy

    monkeypatch.setattr(precision, "to_fp16", ruined)
    with pytest.raises(ExportError, match=r"fp16 within 0\.5% of float32's clean accuracy"):
        reduce_precision(tiny_export.model, tiny_export.bundle, labelled, Profile(precision="fp16"))
