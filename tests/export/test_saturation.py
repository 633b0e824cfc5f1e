"""int8 weights: no sum of two products overflows int16, which is where x86 without VNNI adds them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper

from cbpt_runtime.export.precision import LARGEST, channel_limits, find_layers, make_quantiser
from cbpt_runtime.export.session import open_session, run_session


def worst_int16_sum(rows: np.ndarray) -> int:
    """Largest |255·a + 255·b| over pairs (2i, 2i + 1) of rows; an input of 0 takes away what would cancel."""
    even = rows.astype(int)[:, : rows.shape[1] // 2 * 2].reshape(len(rows), -1, 2)
    return 255 * max(even.clip(min=0).sum(axis=2).max(), -even.clip(max=0).sum(axis=2).min())


def quantised_weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """By layer that is not depthwise, one row per output, in the order in which onnxruntime sums."""
    constant = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    dequantised = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    found = {}
    for node in model.graph.node:
        source = dequantised.get(node.input[1]) if node.op_type in ("Conv", "MatMul", "Gemm") else None
        weight = constant.get(source.input[0]) if source is not None else None
        if weight is None or weight.dtype != np.int8 or (node.op_type == "Conv" and weight.shape[1] == 1):
            continue
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        if node.op_type == "Conv":
            found[node.name] = weight.transpose(0, *range(2, weight.ndim), 1).reshape(len(weight), -1)
        else:
            found[node.name] = weight if attributes.get("transB") else weight.T
    return found


def every_kind_of_layer() -> onnx.ModelProto:
    """images → conv, plain, grouped and depthwise → mean → MatMul → Gemm, plain and transposed → features."""
    generator = np.random.default_rng(2)
    shapes = {"plain": (8, 3, 3, 3), "grouped": (8, 2, 3, 3), "depthwise": (8, 1, 3, 3), "product": (8, 6),
              "gemm": (6, 6), "transposed": (4, 6)}  # fmt: skip
    weights = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    pads = [1, 1, 1, 1]
    nodes = [
        helper.make_node("Transpose", ["images"], ["t"], "t", perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["t"], ["x"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Conv", ["x", "plain"], ["a"], "plain", pads=pads),
        helper.make_node("Conv", ["a", "grouped"], ["b"], "grouped", pads=pads, group=4),
        helper.make_node("Conv", ["b", "depthwise"], ["c"], "depthwise", pads=pads, group=8),
        helper.make_node("GlobalAveragePool", ["c"], ["d"], "pool"),
        helper.make_node("Flatten", ["d"], ["e"], "flat"),
        helper.make_node("MatMul", ["e", "product"], ["f"], "product"),
        helper.make_node("Gemm", ["f", "gemm"], ["g"], "gemm"),
        helper.make_node("Gemm", ["g", "transposed"], ["features"], "transposed", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 8, 8, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


PIXELS = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)


def quantised() -> Any:
    model = every_kind_of_layer()
    return make_quantiser(model, PIXELS)(find_layers(model))


def test_no_layer_of_any_kind_can_saturate_on_a_processor_without_vnni() -> None:
    weights = quantised_weights(quantised())
    assert list(weights) == ["plain", "grouped", "product", "gemm", "transposed"]
    for name, rows in weights.items():
        assert worst_int16_sum(rows) <= 32_767, name


def test_no_layer_of_an_exported_classifier_can_saturate(tiny_export) -> None:
    model = make_quantiser(tiny_export.model, tiny_export.images.pixels)(find_layers(tiny_export.model))
    weights = quantised_weights(model)
    assert set(weights) == set(find_layers(tiny_export.model))
    for name, rows in weights.items():
        assert worst_int16_sum(rows) <= 32_767, name


def test_the_oracle_finds_what_the_full_range_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    full = {name: [{"reduce_range": False}] for name in ("plain", "grouped", "product", "gemm", "transposed")}
    axes = {"product": 1, "gemm": 1}
    for name, (override,) in full.items():
        override["axis"] = axes.get(name, 0)
    monkeypatch.setattr("cbpt_runtime.export.precision.scale_overrides", lambda *_: full)
    assert any(worst_int16_sum(rows) > 32_767 for rows in quantised_weights(quantised()).values())


def test_most_of_the_eighth_bit_is_kept() -> None:
    """Half the range, 63.5, would do too, and cost a bit everywhere."""
    largest = np.concatenate([np.abs(rows).max(axis=1) for rows in quantised_weights(quantised()).values()])
    assert largest.mean() > 85


def test_depthwise_weights_keep_the_whole_range() -> None:
    """Their kernels add in int32."""
    (weight,) = (
        numpy_helper.to_array(t) for t in quantised().graph.initializer if t.name == "depthwise_quantized"
    )
    assert (np.abs(weight.astype(int)).max(axis=(1, 2, 3)) == LARGEST).all()


def test_answers_stay_near_float32() -> None:
    model = every_kind_of_layer()
    got, expected = (
        run_session(open_session(each.SerializeToString()), PIXELS, batch_size=4)["features"]
        for each in (quantised(), model)
    )
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 9)),
        elements=st.floats(-8, 8, width=32, allow_subnormal=False),
    )
)
def test_no_neighbours_overflow_after_rounding_whatever_the_weights(weights: np.ndarray) -> None:
    limits = channel_limits(weights)
    scales = np.where(limits > 0, limits, 1)[:, None] / LARGEST
    rows = np.rint(weights / scales).clip(-128, 127)
    assert np.abs(rows).max() <= LARGEST
    for start in (0, 1):
        if rows.shape[1] > start + 1:
            assert worst_int16_sum(rows[:, start:]) <= 32_767


def test_a_large_weight_among_small_ones_keeps_its_scale() -> None:
    weights = np.array([[0.1, 0, -1, 0, 0.2], [0.5, -1, 0.5, -1, 0.5], [1, 1, 0, 0, 0]])
    assert channel_limits(weights).tolist() == [1, 1, 2]
    assert channel_limits(weights, are_alone=True).tolist() == [1, 1, 1]
