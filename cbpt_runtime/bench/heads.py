"""The same graph with another head: plain (no reference head, no alarm), or with more classes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from jaxtyping import UInt8
from onnx import numpy_helper

from cbpt_runtime.bench.records import HeadTiming
from cbpt_runtime.errors import ConfigError
from cbpt_runtime.export.onnx import FEATURES, INPUT, nodes_after, tidy
from cbpt_runtime.export.session import open_session
from cbpt_runtime.export.weights import size_bytes

_REPEATS = 15


def plain_head(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that gives logits and probabilities of the purified head alone, as any zero-shot classifier."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = [value for value in copy.graph.output if value.name in ("logits", "probabilities")]
    del copy.graph.output[:]
    copy.graph.output.extend(kept)
    tidy(copy)
    used = {name for node in copy.graph.node for name in node.input}
    weights = [tensor for tensor in copy.graph.initializer if tensor.name in used]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(weights)
    return copy


def with_classes(model: onnx.ModelProto, count: int) -> onnx.ModelProto:
    """A copy with random heads of `count` classes; it answers nonsense as fast as a real one would.

    Raises:
        ConfigError: The graph has no heads that can be told apart, or fewer classes than its suspects need.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    after = set(nodes_after(copy, FEATURES))
    names = {name for node in copy.graph.node if node.name in after for name in node.input}
    classes = _classes(copy)
    heads = [
        tensor
        for tensor in copy.graph.initializer
        if tensor.name in names and len(tensor.dims) == 2 and classes in tensor.dims
    ]
    if not heads:
        raise ConfigError(
            expected="a graph with a head of its own",
            got=f"none of {classes} columns",
            fix="Export the bundle with this version of cbpt-runtime.",
        )
    rng = np.random.default_rng(0)
    for tensor in heads:
        dim = tensor.dims[0] if tensor.dims[1] == classes else tensor.dims[1]
        random = rng.standard_normal((dim, count)).astype(np.float32)
        random /= np.linalg.norm(random, axis=0)
        shaped = random if tensor.dims[1] == classes else random.T.copy()
        tensor.CopyFrom(numpy_helper.from_array(shaped, tensor.name))
    for value in copy.graph.output:
        shape = value.type.tensor_type.shape
        if len(shape.dim) == 2:
            shape.dim[1].dim_value = count
    del copy.graph.value_info[:]
    return copy


def measure_class_counts(
    graph: Path, image: UInt8[np.ndarray, "1 height width 3"], counts: Sequence[int], *, threads: int | None
) -> tuple[HeadTiming, ...]:
    """Latency and size of a graph with heads of several sizes, at batch 1, medians in turns."""
    model = onnx.load(str(graph))
    sizes, sessions = {}, {}
    for count in counts:
        changed = with_classes(model, count)
        sizes[count], sessions[count] = size_bytes(changed), open_session(changed, threads=threads)
    spent: dict[int, list[float]] = {count: [] for count in counts}
    for repeat in range(_REPEATS + 2):
        for count, session in sessions.items():
            start = time.perf_counter()
            session.run(None, {INPUT: image})
            if repeat >= 2:  # the first are to warm up
                spent[count].append(1e3 * (time.perf_counter() - start))
    return tuple(
        HeadTiming(
            classes=count,
            latency_ms=float(np.median(spent[count])),
            latencies_ms=tuple(round(value, 4) for value in spent[count]),
            size_bytes=sizes[count],
        )
        for count in counts
    )


def _classes(model: onnx.ModelProto) -> int:
    logits = next(value for value in model.graph.output if value.name == "logits")
    return int(logits.type.tensor_type.shape.dim[1].dim_value)
