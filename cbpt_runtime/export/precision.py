"""Smaller numbers for the same network: fp16 and int8 graphs, accepted only when they stay as good.

"As good" is measured on labelled images the calibration did not see: clean accuracy may drop by half a
point, and the dummy triggers of the bundle may not succeed half a point more often than in float32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from jaxtyping import Float, UInt8

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.errors import ExportError
from cbpt_runtime.export.images import GateImages
from cbpt_runtime.export.onnx import (
    FEATURES,
    INPUT,
    check_portable,
    describe,
    to_bytes,
    with_features,
    write_metadata,
)
from cbpt_runtime.export.profiles import Profile
from cbpt_runtime.export.session import Provider, open_session, run_session
from cbpt_runtime.types import Progress

MAX_CA_DROP = 0.005
MAX_ASR_RISE = 0.005
CALIBRATION_IMAGES = 64
SENSITIVITY_IMAGES = 8
TIMED_RUNS = 9
_QUANTISED = ("Conv", "MatMul", "Gemm")
# onnxruntime 1.31 dies of a segmentation fault on half-precision attention scales: its NCHWc optimiser.
_KEPT_ON_CPU = ("Mul",)
_KEPT_IN_FP32 = ("LayerNormalization", "Softmax", "ReduceMean", "ReduceL2", "Pow", "Sqrt")


def reduce_precision(
    model: onnx.ModelProto,
    bundle: Bundle,
    images: GateImages,
    profile: Profile,
    *,
    progress: Progress | None = None,
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The same classifier in the profile's precision, and what was measured.

    Args:
        model: The float32 graph.
        bundle: What it was made from.
        images: Labelled images; a part calibrates int8, the others are held out to measure.
        profile: Names the precision and where it will run.
        progress: Told about every layer and every attempt.

    Raises:
        ExportError: No variant stayed within the limits.
    """
    count = min(CALIBRATION_IMAGES, len(images.pixels) // 2)
    judge = _Judge(model, bundle, images, count, profile)
    if profile.precision == "fp16":
        attempts: Iterator[tuple[onnx.ModelProto, list[str]]] = iter([(to_fp16(model, profile.provider), [])])
    else:
        attempts = _int8_attempts(model, images.pixels[:count], progress)
    report: dict[str, Any] = {}
    for number, (candidate, kept) in enumerate(attempts, start=1):
        write_metadata(candidate, describe(bundle, precision=profile.precision))
        report = judge.measure(candidate) | {"layers_kept_in_fp32": kept}
        if progress is not None:
            progress("gate precision", number, number, {"accuracy": report["accuracy"]})
        if judge.accepts(report):
            check_portable(candidate)
            return candidate, report
    raise ExportError(
        expected=f"{profile.precision} within {MAX_CA_DROP:.1%} of float32's clean accuracy and "
        f"{MAX_ASR_RISE:.1%} of its dummy-trigger success",
        got=", ".join(f"{key} {value:.4f}" for key, value in report.items() if isinstance(value, float)),
        fix="Nothing was written. Export with --precision fp32, or give more --calibration images.",
    )


def to_fp16(model: onnx.ModelProto, provider: Provider = "cpu") -> onnx.ModelProto:
    """The network in half precision; norms, softmax and everything after the features stay in float32."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    converted: onnx.ModelProto = convert_float_to_float16(
        onnx.shape_inference.infer_shapes(copy),
        keep_io_types=True,
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, *_KEPT_IN_FP32, *(_KEPT_ON_CPU if provider == "cpu" else ())],
        node_block_list=_nodes_after(model, FEATURES),
    )
    return _tidy(converted)


def _int8_attempts(
    model: onnx.ModelProto, calibration: UInt8[np.ndarray, "batch height width 3"], progress: Progress | None
) -> Iterator[tuple[onnx.ModelProto, list[str]]]:
    """int8 graphs, each with twice as many of the most sensitive layers in float32, to half of them."""
    heads = set(_nodes_after(model, FEATURES))
    layers = [n.name for n in model.graph.node if n.op_type in _QUANTISED and n.name not in heads]
    quantise = _quantiser(model, calibration)
    few = calibration[:SENSITIVITY_IMAGES]
    reference = _features(model, few)
    losses: dict[str, float] = {}
    for number, layer in enumerate(layers, start=1):
        features = _features(quantise([layer]), few)
        losses[layer] = float((1 - (features * reference).sum(axis=1)).mean())
        if progress is not None:
            progress("measure sensitivity", number, len(layers), {})
    ranked = sorted(layers, key=lambda layer: -losses[layer])
    kept = 0
    while kept <= len(layers) // 2:
        yield quantise(ranked[kept:]), sorted(ranked[:kept])
        kept = 2 * kept or 1


def _quantiser(
    model: onnx.ModelProto, calibration: UInt8[np.ndarray, "batch height width 3"]
) -> Callable[[Sequence[str]], onnx.ModelProto]:
    """Static QDQ, signed and per channel, of chosen layers; activation ranges are collected once."""
    from tempfile import TemporaryDirectory

    from onnxruntime import quantization
    from onnxruntime.quantization.calibrate import create_calibrator
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    shaped = onnx.shape_inference.infer_shapes(model)
    with TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        onnx.save(shaped, path)
        calibrator = create_calibrator(
            path, list(_QUANTISED), augmented_model_path=f"{folder}/augmented.onnx"
        )
        calibrator.collect_data(_reader(calibration))
        ranges = calibrator.compute_data()
        del calibrator

    def quantise(layers: Sequence[str]) -> onnx.ModelProto:
        copy = onnx.ModelProto()
        copy.CopyFrom(shaped)
        quantizer = QDQQuantizer(
            copy,
            per_channel=True,
            reduce_range=False,
            weight_qType=quantization.QuantType.QInt8,
            activation_qType=quantization.QuantType.QInt8,
            tensors_range=ranges,
            nodes_to_quantize=list(layers),
            nodes_to_exclude=[],
            op_types_to_quantize=list(_QUANTISED),
            extra_options={},
        )
        quantizer.quantize_model()
        return _tidy(quantizer.model.model)

    return quantise


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
    session = open_session(to_bytes(with_features(model)))
    return run_session(session, images, batch_size=len(images), outputs=[FEATURES])[FEATURES]


def _nodes_after(model: onnx.ModelProto, tensor: str) -> list[str]:
    """Names of the nodes that depend on a tensor."""
    reached, names = {tensor}, []
    for node in model.graph.node:  # ONNX keeps them in topological order
        if reached & set(node.input):
            reached |= set(node.output)
            names.append(node.name)
    return names


def _tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """Put right what converters leave behind: stale shapes, casts made twice, lost order, unused sets."""
    del model.graph.value_info[:]
    nodes = _in_order(model.graph)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {node.domain or "" for node in model.graph.node}
    unused = [entry for entry in model.opset_import if entry.domain not in used]
    for entry in unused:
        model.opset_import.remove(entry)
    return model


def _in_order(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes, each after those it depends on, and each tensor computed once."""
    makers = {name: node for node in reversed(graph.node) for name in node.output if name}
    ordered: list[onnx.NodeProto] = []
    done: set[str] = set()
    stack = [value.name for value in reversed(graph.output)]
    while stack:
        node = makers.get(stack[-1])
        missing = [] if node is None else [name for name in node.input if name in makers and name not in done]
        if stack[-1] in done or node is None:
            stack.pop()
        elif missing:
            stack.extend(reversed(missing))
        else:
            ordered.append(node)
            done.update(node.output)
            stack.pop()
    return ordered


class _Judge:
    """Measures candidates against the float32 graph on the held-out images."""

    def __init__(
        self, model: onnx.ModelProto, bundle: Bundle, images: GateImages, seen: int, profile: Profile
    ) -> None:
        if images.labels is None:
            raise ExportError(expected="labelled images", got="drawn pictures", fix="Give --calibration.")
        self._profile = profile
        self._pixels, self._labels = images.pixels[seen:], images.labels[seen:]
        from cbpt_runtime.dummies import paint_dummy_triggers  # with torch; the rest here needs none

        self._triggered = paint_dummy_triggers(bundle, self._pixels)
        self._model = model
        self._before = self._answers(model)

    def measure(self, candidate: onnx.ModelProto) -> dict[str, Any]:
        """Accuracy, dummy-trigger success and speed of both graphs."""
        after = self._answers(candidate)
        seconds = {size: (self._time(self._model, size), self._time(candidate, size)) for size in (1, 8)}
        return {
            "heldout_images": len(self._pixels),
            "accuracy_fp32": self._before["accuracy"],
            "accuracy": after["accuracy"],
            "dummy_trigger_success_fp32": self._before["success"],
            "dummy_trigger_success": after["success"],
            "labels_equal": float((after["labels"] == self._before["labels"]).mean()),
            **{f"speed_up_batch_{size}": before / now for size, (before, now) in seconds.items()},
            "size_ratio": candidate.ByteSize() / self._model.ByteSize(),
        }

    def accepts(self, report: dict[str, Any]) -> bool:
        """Whether a candidate stays within both limits."""
        drop = report["accuracy_fp32"] - report["accuracy"]
        rise = report["dummy_trigger_success"] - report["dummy_trigger_success_fp32"]
        return bool(drop <= MAX_CA_DROP and rise <= MAX_ASR_RISE)

    def _answers(self, model: onnx.ModelProto) -> dict[str, Any]:
        session = open_session(to_bytes(model), self._profile.provider)
        batch = min(32, self._profile.max_batch)
        logits = run_session(session, self._pixels, batch_size=batch, outputs=["logits"])["logits"]
        success = 0.0
        for painted in self._triggered:
            others = painted.images[self._labels != painted.target]
            found = run_session(session, others, batch_size=batch, outputs=["logits"])["logits"]
            success = max(success, float((found.argmax(axis=1) == painted.target).mean()))
        labels = logits.argmax(axis=1)
        return {"labels": labels, "accuracy": float((labels == self._labels).mean()), "success": success}

    def _time(self, model: onnx.ModelProto, batch_size: int) -> float:
        session = open_session(to_bytes(model), self._profile.provider)
        batch = self._pixels[np.arange(batch_size) % len(self._pixels)]
        seconds = []
        for _ in range(TIMED_RUNS + 2):
            start = time.perf_counter()
            run_session(session, batch, batch_size=batch_size)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[2:])
