"""The scenarios, after those of MLPerf Inference: single-stream, server, offline; and a closed-loop sweep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cbpt_runtime.bench import measuring, samples
from cbpt_runtime.bench.config import MAX_TRIAL_S, Scenario
from cbpt_runtime.bench.heads import measure_class_counts
from cbpt_runtime.bench.measuring import Run, Subject
from cbpt_runtime.bench.search import search_rate
from cbpt_runtime.errors import ConfigError

_PROBED = 8  # requests at once in the first guess at what a server can do
_SPARE = 1.3  # arrivals are random: a trial lasts so much longer than its percentile needs
_IN_FLIGHT = 2  # batches on their way at once in the offline scenario of a server
Tell = Callable[[str], None]


def run_scenario(scenario: Scenario, subject: Subject, tell: Tell) -> dict[str, Any]:
    """Measure one scenario.

    Returns:
        'runs'; 'search' where a rate was searched for; 'classes' where other heads were timed.
    """
    match scenario:
        case "single-stream":
            tell("one request after the other")
            return {"runs": [measuring.one_after_the_other(subject)]}
        case "server":
            return _server(subject, tell)
        case "sweep":
            return {"runs": [_swept(subject, number, tell) for number in subject.config.concurrencies]}
        case "offline":
            return _offline(subject, tell)


def _server(subject: Subject, tell: Tell) -> dict[str, Any]:
    """The given rates, or the highest one under the latency bound."""
    config = subject.config
    if config.rates_per_s:
        runs = []
        for rate in config.rates_per_s:
            tell(f"Poisson arrivals, {rate:g} per second")
            runs.append(measuring.open_loop(subject, rate))
        return {"runs": runs}
    tell("first guess at the highest rate")
    probe = measuring.closed_loop(subject, _PROBED, duration_s=min(3.0, config.duration_s))
    guess = 0.8 * probe["throughput_per_s"]
    lowest = _SPARE * samples.needed(config.percentile) / max(MAX_TRIAL_S, config.duration_s)
    if guess < lowest:
        raise ConfigError(
            expected=f"at least {lowest:.2g} answers per second, to have enough for p{config.percentile:g} "
            f"within {MAX_TRIAL_S:g} s",
            got=f"{guess:.2g} in a first closed-loop run",
            fix="Search at a lower --percentile, or measure chosen rates with --rate.",
        )
    trials: list[Run] = []

    def holds(rate: float) -> bool:
        tell(f"searching: Poisson arrivals, {rate:.4g} per second")
        run = measuring.open_loop(subject, rate, duration_s=_trial_s(subject, rate))
        run["held"] = is_held(run, bound_ms=config.latency_bound_ms, percentile=config.percentile)
        trials.append(run)
        return bool(run["held"])

    found = search_rate(holds, guess, lowest_per_s=lowest)
    search = {
        "percentile": config.percentile,
        "latency_bound_ms": config.latency_bound_ms,
        "held_per_s": found.held_per_s,
        "failed_per_s": found.failed_per_s,
        "trials": [{"rate_per_s": rate, "held": held} for rate, held in found.trials],
    }
    return {"runs": trials, "search": search}


def is_held(run: Run, *, bound_ms: float, percentile: float) -> bool:
    """Whether a run kept up, lost nothing, and stayed under the bound at a percentile its size carries."""
    is_lossless = set(run["outcomes"]) <= {"answered"}
    latency = run["latency_ms"].get(f"p{percentile:g}")
    return bool(is_lossless and run["kept_up"] and latency is not None and latency <= bound_ms)


def _trial_s(subject: Subject, rate: float) -> float:
    """As long as was asked for, or as the percentile needs at this rate; some more, arrivals being random."""
    return max(subject.config.duration_s, _SPARE * samples.needed(subject.config.percentile) / rate)


def _swept(subject: Subject, concurrency: int, tell: Tell) -> Run:
    tell(f"closed loop, {concurrency} at once")
    return measuring.closed_loop(subject, concurrency)


def _offline(subject: Subject, tell: Tell) -> dict[str, Any]:
    """Throughput over batch sizes; over sizes of the head, too, where they are asked for."""
    config, target = subject.config, subject.target
    sizes = [size for size in config.batch_sizes if size <= target.max_batch] or [target.max_batch]
    runs = []
    for size in sizes:
        tell(f"batches of {size}")
        if target.url is None:
            runs.append(measuring.passes(subject, size))
        else:
            seconds = max(2.0, config.duration_s / len(sizes))
            runs.append(measuring.closed_loop(subject, _IN_FLIGHT, batch_size=size, duration_s=seconds))
    found: dict[str, Any] = {"runs": runs}
    if config.class_counts and target.graph is not None and target.preprocess is not None:
        tell(f"heads of {', '.join(map(str, config.class_counts))} classes")
        found["classes"] = measure_class_counts(
            target.graph,
            target.decode(subject.pictures.files[:1]),
            config.class_counts,
            threads=target.facts.get("threads"),
        )
    return found
