"""fp16 and int8: smaller, measured, and refused when they are worse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.errors import ConfigError, ExportError
from cbpt_runtime.export import precision
from cbpt_runtime.export.images import GateImages, HeldOut, Quality, compare, find_gate_images, is_good_enough
from cbpt_runtime.export.onnx import check_portable, read_metadata
from cbpt_runtime.export.precision import find_layers, make_quantiser, rank_by_sensitivity, reduce_precision
from cbpt_runtime.export.profiles import Profile
from cbpt_runtime.export.session import open_session, run_session
from cbpt_runtime.export.weights import to_bytes
from cbpt_runtime.purification.dummy_triggers import TriggeredImages


@pytest.fixture(scope="module")
def images(bundle_with_images: Bundle) -> GateImages:
    return find_gate_images(bundle_with_images)


@pytest.fixture(scope="module")
def heldout(bundle_with_images: Bundle, images: GateImages) -> HeldOut:
    return HeldOut(bundle_with_images, images)


def reduced(tiny_export, images: GateImages, heldout: HeldOut, name: str):
    profile = Profile(precision=name, max_batch=8)
    return reduce_precision(tiny_export.model, tiny_export.bundle, images, heldout, profile)


def test_the_images_of_the_bundle_are_used_unless_a_folder_is_given(
    bundle_with_images: Bundle, tiny_bundle: Bundle, tiny_image_folder: Path
) -> None:
    own = find_gate_images(bundle_with_images)
    assert (own.source, len(own.pixels), len(own.calibration)) == ("bundle", 8, 8)
    given = find_gate_images(bundle_with_images, tiny_image_folder)
    assert (given.source, len(given.pixels), len(given.calibration)) == ("folder", 18, 18)
    drawn = find_gate_images(tiny_bundle)
    assert (drawn.source, drawn.labels, len(drawn.calibration)) == ("drawn", None, 0)


def test_fp16_halves_the_weights_and_keeps_the_labels(tiny_export, images, heldout) -> None:
    before = to_bytes(tiny_export.model)
    model, report = reduced(tiny_export, images, heldout, "fp16")
    check_portable(model)
    assert read_metadata(model)["cbpt.precision"] == "fp16"
    assert report["size_ratio"] < 0.7
    assert report["accuracy"] == report["accuracy_fp32"] == 1.0
    assert to_bytes(tiny_export.model) == before


def test_int8_keeps_measured_layers_in_fp32_until_it_is_good_enough(tiny_export, images, heldout) -> None:
    model, report = reduced(tiny_export, images, heldout, "int8")
    check_portable(model)
    kinds = {node.op_type for node in model.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert report["accuracy_fp32"] - report["accuracy"] <= 0.005
    assert set(report["speed_ups"]) == {"1", "8"}
    assert min(report["speed_ups"].values()) > 0
    assert isinstance(report["layers_kept_in_fp32"], list)
    assert report["layers"] == len(find_layers(tiny_export.model))


def test_the_same_images_give_the_same_int8_bytes(tiny_export, images) -> None:
    layers = find_layers(tiny_export.model)
    one, two = (make_quantiser(tiny_export.model, images.calibration)(layers) for _ in range(2))
    assert to_bytes(one) == to_bytes(two)


def test_the_layer_that_hurts_most_is_ranked_first(tiny_export, images, monkeypatch) -> None:
    layers = find_layers(tiny_export.model)
    quantise = make_quantiser(tiny_export.model, images.calibration)
    worst = layers[-2]

    def damaging(chosen):
        model = quantise(chosen)
        if chosen == [worst]:
            scale = next(n.input[1] for n in model.graph.node if n.op_type == "QuantizeLinear")
            tensor = next(t for t in model.graph.initializer if t.name == scale)
            wide = np.asarray(numpy_helper.to_array(tensor) * 50, np.float32)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
        return model

    assert rank_by_sensitivity(tiny_export.model, damaging, images.calibration)[0] == worst


def test_a_stage_of_convolutions_runs_without_a_float(tmp_path: Path) -> None:
    """onnxruntime's own optimised graph: convolution, ReLU, residual sum and pooling all in int8."""
    model = residual_stage()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    quantised = make_quantiser(model, pixels)(find_layers(model))
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    settings.log_severity_level = 3
    onnxruntime.InferenceSession(to_bytes(quantised), settings, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert kinds.count("QLinearConv") == 3
    assert {"QLinearAdd", "QLinearAveragePool", "MatMulIntegerToFloat"} <= set(kinds)
    assert not {"Conv", "Relu", "AveragePool", "MatMul"} & set(kinds)
    got, expected = (
        run_session(open_session(to_bytes(each)), pixels, batch_size=4)["features"]
        for each in (quantised, model)
    )
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


def residual_stage() -> onnx.ModelProto:
    """images → conv → ReLU → (conv + conv) → ReLU → average pool → product with weights → features."""
    generator = np.random.default_rng(1)
    weights = {f"w{i}": generator.standard_normal((8, 3 if i == 0 else 8, 3, 3)) / 5 for i in range(3)}
    weights |= {"m": generator.standard_normal((8, 4))}
    pads = [1, 1, 1, 1]
    nodes = [
        helper.make_node("Transpose", ["images"], ["t"], "t", perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["t"], ["x"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Conv", ["x", "w0"], ["a"], "conv0", pads=pads),
        helper.make_node("Relu", ["a"], ["b"], "relu0"),
        helper.make_node("Conv", ["b", "w1"], ["c"], "conv1", pads=pads),
        helper.make_node("Conv", ["b", "w2"], ["d"], "conv2", pads=pads),
        helper.make_node("Add", ["c", "d"], ["e"], "sum"),
        helper.make_node("Relu", ["e"], ["f"], "relu1"),
        helper.make_node("AveragePool", ["f"], ["g"], "pool", kernel_shape=[8, 8]),
        helper.make_node("Flatten", ["g"], ["h"], "flat"),
        helper.make_node("MatMul", ["h", "m"], ["features"], "project"),
    ]
    graph = helper.make_graph(
        nodes,
        "stage",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 8, 8, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def ruined(model: onnx.ModelProto, _: str) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    head = next(tensor for tensor in copy.graph.initializer if tensor.name == "class_embeddings")
    head.CopyFrom(numpy_helper.from_array(np.roll(numpy_helper.to_array(head), 1, axis=1), head.name))
    return copy


def test_a_variant_that_is_worse_is_refused(tiny_export, images, heldout, monkeypatch) -> None:
    monkeypatch.setattr(precision, "to_fp16", ruined)
    with pytest.raises(ExportError, match=r"fp16 within 0\.5% of float32's clean accuracy"):
        reduced(tiny_export, images, heldout, "fp16")


def test_a_variant_that_lets_a_trigger_through_is_refused(
    tiny_export, images, bundle_with_images: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same clean answers; but pictures with the dummy trigger become its target."""
    black = np.zeros_like(images.pixels)
    stamped = [TriggeredImages(family="patch", target=2, images=black)]
    monkeypatch.setattr("cbpt_runtime.purification.dummy_triggers.paint_dummy_triggers", lambda *_: stamped)
    heldout = HeldOut(bundle_with_images, images)

    def answer(weak: bool) -> Callable[[np.ndarray], np.ndarray]:
        def logits(pixels: np.ndarray) -> np.ndarray:
            hit = (pixels == 0).all(axis=(1, 2, 3)) & weak
            return np.eye(3, dtype=np.float32)[np.where(hit, 2, 0)]

        return logits

    report = compare(heldout.measure(answer(False)), heldout.measure(answer(True)))
    assert report["accuracy"] == report["accuracy_fp32"]
    assert (report["dummy_trigger_success_fp32"], report["dummy_trigger_success"]) == (0.0, 1.0)
    assert not is_good_enough(report)


@pytest.mark.parametrize(
    ("accuracy", "success", "good"),
    [(0.5, 0.1, True), (0.495, 0.105, True), (0.494, 0.1, False), (0.5, 0.106, False), (0.6, 0.0, True)],
)
def test_the_limits_are_half_a_point(accuracy: float, success: float, good: bool) -> None:
    labels = np.zeros(1000, np.int64)
    before = Quality(labels=labels, accuracy=0.5, successes=(0.9, 0.1))
    after = Quality(labels=labels, accuracy=accuracy, successes=(0.0, success))
    assert is_good_enough(compare(before, after)) is good


def test_without_labelled_images_lower_precisions_are_refused(tiny_bundle: Bundle, images) -> None:
    with pytest.raises(ConfigError, match="labelled images to measure fp16 and int8 on"):
        HeldOut(tiny_bundle, replace(images, labels=None))


def test_without_calibration_images_int8_is_refused(tiny_export, images, heldout) -> None:
    with pytest.raises(ConfigError, match="clean images to calibrate int8 on"):
        reduced(tiny_export, replace(images, calibration=images.calibration[:0]), heldout, "int8")
