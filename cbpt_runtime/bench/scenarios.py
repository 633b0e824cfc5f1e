"""The scenarios, after those of MLPerf Inference: single-stream, server, offline; and a closed-loop sweep.

Beside them the same graph with another head: plain (no reference head, no alarm), or with more classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from jaxtyping import UInt8
from onnx import numpy_helper

from cbpt_runtime.bench import measuring, samples
from cbpt_runtime.bench.inputs import MAX_TRIAL_S, Scenario
from cbpt_runtime.bench.measuring import Workload
from cbpt_runtime.bench.records import HeadTiming, Measured, Run, Search, Trial
from cbpt_runtime.errors import ConfigError
from cbpt_runtime.export.onnx import FEATURES, INPUT, nodes_after, tidy
from cbpt_runtime.export.session import open_session
from cbpt_runtime.export.weights import size_bytes

_REPEATS = 15
_PROBED = 8  # requests at once in the first guess at what a server can do
_SPARE = 1.3  # a trial lasts so much longer than its percentile needs: arrivals are random
_GROWTH = 1.3
_CLOSE_ENOUGH = 1.05
_IN_FLIGHT = 2  # batches on their way at once in the offline scenario of a server
Tell = Callable[[str], None]


def plain_head(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy that answers with the purified head alone, as any zero-shot classifier does."""
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
    """Return a copy with random heads of `count` classes; it answers nonsense as fast as a real one would.

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


def run_scenario(scenario: Scenario, work: Workload, tell: Tell) -> Measured:
    """Measure one scenario; `server` takes a server."""
    match scenario:
        case "single-stream":
            tell("one request after the other")
            return Measured(runs=(measuring.closed_loop(work, 1),))
        case "server":
            return _server(work, tell)
        case "sweep":
            return Measured(runs=tuple(_swept(work, number, tell) for number in work.config.concurrencies))
        case "offline":
            return _offline(work, tell)


def _server(work: Workload, tell: Tell) -> Measured:
    """Measure the given rates, or find the highest one under the latency bound."""
    config = work.config
    runs: list[Run] = []
    for rate in config.rates_per_s:
        tell(f"Poisson arrivals, {rate:g} per second")
        runs.append(measuring.open_loop(work, rate))
    if runs:
        return Measured(runs=tuple(runs))
    tell("first guess at the highest rate")
    probe = measuring.closed_loop(work, _PROBED, duration_s=min(3.0, config.duration_s))
    guess = 0.8 * probe.throughput_per_s
    needed = _SPARE * samples.needed(config.percentile)
    lowest = needed / max(MAX_TRIAL_S, config.duration_s)
    if guess < lowest:
        raise ConfigError(
            expected=f"at least {lowest:.2g} answers per second, to have enough for p{config.percentile:g} "
            f"within {MAX_TRIAL_S:g} s",
            got=f"{guess:.2g} in a first closed-loop run",
            fix="Search at a lower --percentile, or measure chosen rates with --rate.",
        )

    def holds(rate: float) -> bool:
        tell(f"searching: Poisson arrivals, {rate:.4g} per second")
        run = measuring.open_loop(work, rate, duration_s=max(config.duration_s, needed / rate))
        held = is_held(run, bound_ms=config.latency_bound_ms, percentile=config.percentile)
        runs.append(replace(run, held=held))
        return held

    highest, failed, trials = search_rate(holds, guess, lowest_per_s=lowest)
    search = Search(
        percentile=config.percentile,
        latency_bound_ms=config.latency_bound_ms,
        held_per_s=highest,
        failed_per_s=failed,
        trials=trials,
    )
    return Measured(runs=tuple(runs), search=search)


def is_held(run: Run, *, bound_ms: float, percentile: float) -> bool:
    """Whether a run kept up, lost nothing, and stayed under the bound at a percentile its size carries."""
    latency_ms = run.ms(f"p{percentile:g}")
    return bool(not run.lost and run.kept_up and latency_ms is not None and latency_ms <= bound_ms)


def search_rate(
    holds: Callable[[float], bool], start_per_s: float, *, lowest_per_s: float = 0.0, max_trials: int = 8
) -> tuple[float | None, float | None, tuple[Trial, ...]]:
    """Grow or shrink from a first guess until one rate held and one did not, then halve the gap.

    Args:
        holds: Tries a rate. What it says need not be monotone, as measurements are not; a rate above one
            that failed is never tried again.
        start_per_s: First guess.
        lowest_per_s: Rates below are not tried; the search ends without one that held.
        max_trials: Trials at most; the search also ends when the gap is within 5 %.

    Returns:
        The highest rate that held, the lowest above it that did not, and every trial.
    """
    trials: list[Trial] = []
    held: float | None = None
    failed: float | None = None
    rate = start_per_s
    while len(trials) < max_trials and rate >= lowest_per_s:
        good = holds(rate)
        trials.append(Trial(rate_per_s=rate, held=good))
        if good:
            held = rate
        else:
            failed = rate
        if held is None:
            rate /= _GROWTH**2
        elif failed is None:
            rate *= _GROWTH
        elif failed / held <= _CLOSE_ENOUGH:
            break
        else:
            rate = (held * failed) ** 0.5
    return held, failed, tuple(trials)


def _swept(work: Workload, concurrency: int, tell: Tell) -> Run:
    tell(f"closed loop, {concurrency} at once")
    return measuring.closed_loop(work, concurrency)


def _offline(work: Workload, tell: Tell) -> Measured:
    """Throughput over batch sizes; over sizes of the head, too, where they are asked for."""
    config, system = work.config, work.system
    sizes = [size for size in config.batch_sizes if size <= system.max_batch] or [system.max_batch]
    runs = []
    for size in sizes:
        tell(f"batches of {size}")
        if system.url is None:
            runs.append(measuring.passes(work, size))
        else:
            seconds = max(2.0, config.duration_s / len(sizes))
            runs.append(measuring.closed_loop(work, _IN_FLIGHT, batch_size=size, duration_s=seconds))
    if not config.class_counts or system.graph is None:
        return Measured(runs=tuple(runs))
    tell(f"heads of {', '.join(map(str, config.class_counts))} classes")
    heads = measure_class_counts(
        system.graph,
        system.classifier.read(work.pictures.files[:1]),
        config.class_counts,
        threads=system.facts.get("threads"),
    )
    return Measured(runs=tuple(runs), classes=heads)
