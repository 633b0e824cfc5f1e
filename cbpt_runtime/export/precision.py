"""Smaller numbers for the same network: fp16 and int8 graphs, accepted only when they stay as good."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
from jaxtyping import UInt8

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.errors import ConfigError
from cbpt_runtime.export.images import GateImages
from cbpt_runtime.export.onnx import (
    FEATURES,
    check_portable,
    describe,
    nodes_after,
    tidy,
    write_metadata,
)
from cbpt_runtime.export.profiles import Profile
from cbpt_runtime.export.quality import Answer, HeldOut, compare, is_good_enough, refusal
from cbpt_runtime.export.quantisation import find_layers, make_quantiser, rank_by_sensitivity
from cbpt_runtime.export.session import Provider, open_session, run_session
from cbpt_runtime.export.weights import infer_shapes, needs_two_files, size_bytes
from cbpt_runtime.progress import Progress

ANSWERED_AT_ONCE = 32
TIMED_BATCHES = (1, 8)
TIMED_RUNS = 9
# onnxruntime 1.31 dies of a segmentation fault on half-precision attention scales: its NCHWc optimiser.
_KEPT_ON_CPU = ("Mul",)
_KEPT_IN_FP32 = ("LayerNormalization", "Softmax", "ReduceMean", "ReduceL2", "Pow", "Sqrt")


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
