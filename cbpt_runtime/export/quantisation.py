"""int8 graphs: static QDQ, signed per-channel weights, unsigned activations, ranges from calibration images.

Weights are scaled so that they saturate on no processor (`cbpt_runtime.export.saturation`): a graph may be
made on one machine and served on another.

What onnxruntime makes of Q/DQ pairs decides the speed. Convolutions answer in int8, and what stands between
two of them (ReLU, residual sums, pooling) stays in int8 too, so that whole stages run without a float.
Products with weights take int8 and answer in float (MatMulIntegerToFloat, QGemm), because norms, GELU and
softmax follow. Products of two activations (attention) stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from jaxtyping import Float, UInt8

from cbpt_runtime.export.onnx import FEATURES, INPUT, nodes_after, tidy, with_features
from cbpt_runtime.export.saturation import scale_overrides
from cbpt_runtime.export.session import open_session, run_session
from cbpt_runtime.progress import Progress

SENSITIVITY_IMAGES = 8
_PRODUCTS = ("MatMul", "Gemm")
_LAYERS = ("Conv", *_PRODUCTS)
_BETWEEN = ("Relu", "Clip", "Add", "MaxPool", "AveragePool", "GlobalAveragePool")

Quantise = Callable[[Sequence[str]], onnx.ModelProto]


def find_layers(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes with weights that can be quantised: all but the heads."""
    heads = set(nodes_after(model, FEATURES))
    constant = {tensor.name for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in _LAYERS and node.input[1] in constant and node.name not in heads
    ]


def make_quantiser(
    model: onnx.ModelProto, calibration: UInt8[np.ndarray, "batch height width 3"]
) -> Quantise:
    """Collects activation ranges once; returns a function that quantises chosen layers."""
    from tempfile import TemporaryDirectory

    from onnxruntime import quantization
    from onnxruntime.quantization.calibrate import create_calibrator
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    kinds = [*_LAYERS, *_BETWEEN]
    shaped = onnx.shape_inference.infer_shapes(model)
    with TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        onnx.save(shaped, path)
        calibrator = create_calibrator(path, kinds, augmented_model_path=f"{folder}/augmented.onnx")
        calibrator.collect_data(_reader(calibration))
        ranges = calibrator.compute_data()
        del calibrator

    def quantise(layers: Sequence[str]) -> onnx.ModelProto:
        copy = onnx.ModelProto()
        copy.CopyFrom(shaped)
        quantizer = QDQQuantizer(
            copy,
            per_channel=True,
            reduce_range=True,  # where no override says better
            weight_qType=quantization.QuantType.QInt8,
            activation_qType=quantization.QuantType.QUInt8,
            tensors_range=ranges,
            nodes_to_quantize=[*layers, *_between(model, set(layers))],
            nodes_to_exclude=[],
            op_types_to_quantize=kinds,
            extra_options={
                "OpTypesToExcludeOutputQuantization": list(_PRODUCTS),
                "TensorQuantOverrides": scale_overrides(model, layers),
            },
        )
        quantizer.quantize_model()
        return tidy(quantizer.model.model)

    return quantise


def rank_by_sensitivity(
    model: onnx.ModelProto,
    quantise: Quantise,
    images: UInt8[np.ndarray, "batch height width 3"],
    progress: Progress | None = None,
) -> list[str]:
    """The layers, the one first that moves the features most when it alone is quantised."""
    layers, few = find_layers(model), images[:SENSITIVITY_IMAGES]
    reference = _features(model, few)
    losses: dict[str, float] = {}
    for number, layer in enumerate(layers, start=1):
        features = _features(quantise([layer]), few)
        losses[layer] = float((1 - (features * reference).sum(axis=1)).mean())
        if progress is not None:
            progress("measure sensitivity", number, len(layers), {})
    return sorted(layers, key=lambda layer: -losses[layer])


def _between(model: onnx.ModelProto, layers: set[str]) -> list[str]:
    """Nodes all of whose inputs come in int8 out of convolutions, directly or through each other."""
    in_int8: set[str] = set()
    found = []
    constant = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:  # ONNX keeps them in topological order
        inputs = {name for name in node.input if name}
        sources = inputs - constant if node.op_type == "Clip" else inputs
        if node.op_type in _BETWEEN and sources and sources <= in_int8:
            found.append(node.name)
            in_int8 |= set(node.output)
        elif node.op_type == "Conv" and node.name in layers:
            in_int8 |= set(node.output)
    return found


def _reader(images: UInt8[np.ndarray, "batch height width 3"]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Gives the images one by one, as onnxruntime's calibration wants them."""

        def __init__(self) -> None:
            self._rest = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self._rest, None)
            return None if image is None else {INPUT: image[None]}

    return Reader()


def _features(
    model: onnx.ModelProto, images: UInt8[np.ndarray, "batch height width 3"]
) -> Float[np.ndarray, "batch dim"]:
    session = open_session(with_features(model))
    return run_session(session, images, batch_size=len(images), outputs=[FEATURES])[FEATURES]
