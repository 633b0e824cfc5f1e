"""Scales of int8 weights with which no x86 processor saturates.

Without VNNI an x86 processor multiplies uint8 by int8 with ``vpmaddubsw``, which adds the products of two
neighbours in int16: 255 · 127 + 255 · 127 does not fit, and the sum is cut off at 32,767 in silence. Halving
the range of all weights (onnxruntime's ``reduce_range``) prevents it for half of the precision. But only two
neighbours of one sign that are both large overflow, so here the scale of each channel is the smallest with
which no two of its neighbours can. Most channels keep a good part of their eighth bit; nothing gets slower.

Neighbours are weights that follow one another in a sum as onnxruntime computes it: rows of a matrix; input
channels at one place, then the next place, of a convolution. Depthwise kernels add in int32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from jaxtyping import Float
from onnx import numpy_helper

LARGEST = 127  # of one weight, and of two neighbours before rounding: then 128 · 255 = 32,640 fits in int16


def scale_overrides(model: onnx.ModelProto, layers: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """A range for each output channel of layers, as ``TensorQuantOverrides`` of onnxruntime's quantiser.

    Products with weights of more than two axes get none: `reduce_range` is for them.
    """
    chosen, weights = set(layers), {tensor.name: tensor for tensor in model.graph.initializer}
    overrides = {}
    for node in model.graph.node:
        if node.name not in chosen or (node.op_type != "Conv" and len(weights[node.input[1]].dims) != 2):
            continue
        weight = numpy_helper.to_array(weights[node.input[1]])
        axis, sums = _in_order_of_sums(node, weight)
        overrides[node.input[1]] = [
            {"axis": axis, "reduce_range": False, "symmetric": True, "rmin": -limit, "rmax": limit}
            for limit in channel_limits(sums, _is_depthwise(node, weight)).astype(np.float32)
        ]
    return overrides


def channel_limits(
    weights: Float[np.ndarray, "outputs terms"], are_alone: bool = False
) -> Float[np.ndarray, " outputs"]:
    """What becomes `LARGEST` in each channel: its largest weight, or sum of two neighbours if that is more.

    Args:
        weights: Each row the weights of one output, in the order in which they are summed.
        are_alone: Whether products are not added in pairs.
    """
    limits: np.ndarray = np.abs(weights).max(axis=1)
    if are_alone or weights.shape[1] < 2:
        return limits
    return np.maximum(limits, np.abs(weights[:, 1:] + weights[:, :-1]).max(axis=1))


def _in_order_of_sums(node: onnx.NodeProto, weight: np.ndarray) -> tuple[int, np.ndarray]:
    """The axis of the output channels, and the weights with that axis first and the rest in order."""
    if node.op_type == "Conv":
        return 0, np.moveaxis(weight, 1, -1).reshape(len(weight), -1)
    is_transposed = any(each.name == "transB" and each.i for each in node.attribute)
    return (0, weight) if is_transposed else (1, weight.T)


def _is_depthwise(node: onnx.NodeProto, weight: np.ndarray) -> bool:
    groups = next((each.i for each in node.attribute if each.name == "group"), 1)
    return node.op_type == "Conv" and groups > 1 and weight.shape[1] == 1
