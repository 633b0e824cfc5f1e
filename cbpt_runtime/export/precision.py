"""Smaller numbers for the same network: fp16 and int8 graphs, accepted only when they stay as good.

int8 graphs are static QDQ: signed per-channel weights, unsigned activations, ranges from calibration images.
Weights are scaled so that they saturate on no processor: a graph may be made on one machine and
served on another.

What onnxruntime makes of Q/DQ pairs decides the speed. Convolutions answer in int8, and what stands between
two of them (ReLU, residual sums, pooling) stays in int8 too, so that whole stages run without a float.
Products with weights take int8 and answer in float (MatMulIntegerToFloat, QGemm), because norms, GELU and
softmax follow. Products of two activations (attention) stay in float32.

Without VNNI an x86 processor multiplies uint8 by int8 with ``vpmaddubsw``, which adds the products of two
neighbours in int16: 255 · 127 + 255 · 127 does not fit, and the sum is cut off at 32,767 in silence. Halving
the range of all weights (onnxruntime's ``reduce_range``) prevents it for half of the precision. But only two
neighbours of one sign that are both large overflow, so here the scale of each channel is the smallest with
which no two of its neighbours can. Most channels keep a good part of their eighth bit; nothing gets slower.

Neighbours are weights that follow one another in a sum as onnxruntime computes it: rows of a matrix; input
channels at one place, then the next place, of a convolution. Depthwise kernels add in int32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from jaxtyping import Float, UInt8
from onnx import numpy_helper

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.errors import ConfigError
from cbpt_runtime.export.images import Answer, GateImages, HeldOut, compare, is_good_enough, refusal
from cbpt_runtime.export.onnx import (
    FEATURES,
    INPUT,
    check_portable,
    describe,
    nodes_after,
    tidy,
    with_features,
    write_metadata,
)
from cbpt_runtime.export.profiles import Profile
from cbpt_runtime.export.session import Provider, open_session, run_session
from cbpt_runtime.export.weights import infer_shapes, needs_two_files, size_bytes
from cbpt_runtime.progress import Progress

ANSWERED_AT_ONCE = 32
TIMED_BATCHES = (1, 8)
TIMED_RUNS = 9
# onnxruntime 1.31 dies of a segmentation fault on half-precision attention scales: its NCHWc optimiser.
_KEPT_ON_CPU = ("Mul",)
_KEPT_IN_FP32 = ("LayerNormalization", "Softmax", "ReduceMean", "ReduceL2", "Pow", "Sqrt")
LARGEST = 127  # of one weight, and of two neighbours before rounding: then 128 · 255 = 32,640 fits in int16
SENSITIVITY_IMAGES = 8
_PRODUCTS = ("MatMul", "Gemm")
_LAYERS = ("Conv", *_PRODUCTS)
_BETWEEN = ("Relu", "Clip", "Add", "MaxPool", "AveragePool", "GlobalAveragePool")

Quantise = Callable[[Sequence[str]], onnx.ModelProto]


def reduce_precision(
    model: onnx.ModelProto,
    bundle: Bundle,
    images: GateImages,
    heldout: HeldOut,
    profile: Profile,
    *,
    progress: Progress | None = None,
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Return the same classifier in the profile's precision, and what was measured.

    Args:
        model: The float32 graph.
        bundle: What it was made from.
        images: Its calibration images give int8 its ranges; the others are used to time.
        heldout: What the loss is measured on.
        profile: Names the precision and where it will run.
        progress: Told about every layer and every attempt.

    Raises:
        ConfigError: There is nothing to calibrate int8 on.
        ExportError: No variant stayed within the limits.
    """
    provider, largest = profile.provider, profile.max_batch
    before = heldout.measure(answers(open_session(model, provider), largest))
    layers = find_layers(model)
    if profile.precision == "fp16":
        attempts: Iterator[tuple[onnx.ModelProto, list[str]]] = iter([(to_fp16(model, provider), [])])
    else:
        attempts = _int8_attempts(model, layers, images.calibration, progress)
    report: dict[str, Any] = {}
    for number, (candidate, kept) in enumerate(attempts, start=1):
        write_metadata(candidate, describe(bundle, precision=profile.precision))
        session = open_session(candidate, provider)
        report = compare(before, heldout.measure(answers(session, largest)))
        if progress is not None:
            progress("gate precision", number, number, {"accuracy": report["accuracy"]})
        if is_good_enough(report):
            check_portable(candidate)
            return candidate, report | {
                "layers": len(layers) if profile.precision == "int8" else 0,
                "layers_kept_in_fp32": kept,
                "calibration_images": len(images.calibration) if profile.precision == "int8" else 0,
                "size_ratio": size_bytes(candidate) / size_bytes(model),
                "speed_ups": _speed_ups(model, candidate, images, provider),
            }
    raise refusal(report, profile.precision)


def answers(session: onnxruntime.InferenceSession, max_batch: int) -> Answer:
    """Return the logits a session gives, as a function of pixels."""
    batch = min(ANSWERED_AT_ONCE, max_batch)
    return lambda pixels: run_session(session, pixels, batch_size=batch, outputs=["logits"])["logits"]


def to_fp16(model: onnx.ModelProto, provider: Provider = "cpu") -> onnx.ModelProto:
    """Halve the network's precision; norms, softmax and everything after the features stay in float32."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    converted: onnx.ModelProto = convert_float_to_float16(
        infer_shapes(copy),
        keep_io_types=True,
        disable_shape_infer=needs_two_files(copy),
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, *_KEPT_IN_FP32, *(_KEPT_ON_CPU if provider == "cpu" else ())],
        node_block_list=nodes_after(model, FEATURES),
    )
    return tidy(converted)


def _int8_attempts(
    model: onnx.ModelProto,
    layers: list[str],
    calibration: UInt8[np.ndarray, "batch height width 3"],
    progress: Progress | None,
) -> Iterator[tuple[onnx.ModelProto, list[str]]]:
    """int8 graphs: of all layers, then with ever more of the most sensitive in float32, to half of them."""
    if not len(calibration):
        raise ConfigError(
            expected="clean images to calibrate int8 on",
            got="none",
            fix="Give a folder of clean images, one folder per class, with --calibration.",
        )
    quantise = make_quantiser(model, calibration)
    yield quantise(layers), []
    ranked = rank_by_sensitivity(model, quantise, calibration, progress)
    kept = 1
    while kept <= len(layers) // 2:
        yield quantise(ranked[kept:]), sorted(ranked[:kept])
        kept *= 2


def _speed_ups(
    before: onnx.ModelProto, after: onnx.ModelProto, images: GateImages, provider: Provider
) -> dict[str, float]:
    """How many times faster one graph is than another by batch size; medians of runs in turns."""
    sessions = [open_session(model, provider) for model in (before, after)]
    ratios = {}
    for size in TIMED_BATCHES:
        batch = images.repeated(size)
        seconds: tuple[list[float], list[float]] = ([], [])
        for run in range(TIMED_RUNS + 2):
            for session, spent in zip(sessions, seconds, strict=True):
                start = time.perf_counter()
                run_session(session, batch, batch_size=size)
                if run >= 2:  # the first are to warm up
                    spent.append(time.perf_counter() - start)
        ratios[str(size)] = statistics.median(seconds[0]) / statistics.median(seconds[1])
    return ratios


def scale_overrides(model: onnx.ModelProto, layers: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return a range for each output channel of layers, as ``TensorQuantOverrides`` of onnxruntime.

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
    """Return what becomes `LARGEST` in each channel: its largest weight or sum of two neighbours.

    Args:
        weights: Each row the weights of one output, in the order in which they are summed.
        are_alone: Whether products are not added in pairs.
    """
    limits: np.ndarray = np.abs(weights).max(axis=1)
    if are_alone or weights.shape[1] < 2:
        return limits
    return np.maximum(limits, np.abs(weights[:, 1:] + weights[:, :-1]).max(axis=1))


def _in_order_of_sums(node: onnx.NodeProto, weight: np.ndarray) -> tuple[int, np.ndarray]:
    """Return the axis of the output channels, and the weights with that axis first and the rest in order."""
    if node.op_type == "Conv":
        return 0, np.moveaxis(weight, 1, -1).reshape(len(weight), -1)
    is_transposed = any(each.name == "transB" and each.i for each in node.attribute)
    return (0, weight) if is_transposed else (1, weight.T)


def _is_depthwise(node: onnx.NodeProto, weight: np.ndarray) -> bool:
    groups = next((each.i for each in node.attribute if each.name == "group"), 1)
    return node.op_type == "Conv" and groups > 1 and weight.shape[1] == 1


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
    """Collect activation ranges once; return a function that quantises chosen layers."""
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
    """Return the layers, the one first that moves the features most when it alone is quantised."""
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
