"""The scenarios, after those of MLPerf Inference: single-stream, server, offline; and a closed-loop sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cbpt_runtime.bench import measuring, samples
from cbpt_runtime.bench.config import MAX_TRIAL_S, Scenario
from cbpt_runtime.bench.heads import measure_class_counts
from cbpt_runtime.bench.measuring import Workload
from cbpt_runtime.bench.records import Measured, Run, Search, Trial
from cbpt_runtime.errors import ConfigError

_PROBED = 8  # requests at once in the first guess at what a server can do
_SPARE = 1.3  # a trial lasts so much longer than its percentile needs: arrivals are random
_GROWTH = 1.3
_CLOSE_ENOUGH = 1.05
_IN_FLIGHT = 2  # batches on their way at once in the offline scenario of a server
Tell = Callable[[str], None]


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
    """The given rates, or the highest one under the latency bound."""
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
