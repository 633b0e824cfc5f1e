"""Two runs side by side: ratios of what they measured alike, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cbpt_runtime.bench import samples
from cbpt_runtime.bench.machine import COMPARED
from cbpt_runtime.errors import ConfigError

_SEED = 0
_FEWEST = 5  # observations below which no interval is given


def compare(
    first: dict[str, Any], second: dict[str, Any], *, across_hardware: bool = False
) -> dict[str, Any]:
    """Ratios second / first of every run both have.

    Targets are matched by name, or simply with each other where each result has one. Latency is compared by
    its median, offline throughput by the median of its passes; both intervals are block bootstraps. A rate
    found by search has no sample: its ratio comes with the worst and best case of the two searches.

    Args:
        first: A result of `bench`.
        second: Another.
        across_hardware: Compare although the machines differ.

    Raises:
        ConfigError: The machines differ and nobody said so, the two have nothing in common, or one was
            changed so that it says something else than `bench` does.
    """
    try:
        return _compared(first, second, across_hardware)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ConfigError(
            expected="two results as `cbpt-runtime bench --output` wrote them",
            got=f"something else in one of them ({type(error).__name__}: {error})",
            fix="Run it again, or take an unchanged copy.",
        ) from error


def _compared(first: dict[str, Any], second: dict[str, Any], across_hardware: bool) -> dict[str, Any]:
    differences = {
        key: [first["machine"].get(key), second["machine"].get(key)]
        for key in COMPARED
        if first["machine"].get(key) != second["machine"].get(key)
    }
    if differences and not across_hardware:
        raise ConfigError(
            expected="two results from the same hardware",
            got="; ".join(f"{key}: {one} and {other}" for key, (one, other) in differences.items()),
            fix="Compare runs of one machine, or say --different-hardware.",
        )
    rows = [row for pair in _pairs(first, second) for row in _rows(*pair)]
    if not rows:
        raise ConfigError(
            expected="two results with targets and runs in common",
            got=f"{_names(first)} and {_names(second)}",
            fix="Run both with the same scenarios, rates and sizes, and targets of the same names.",
        )
    same_images = first["images"]["digest"] == second["images"]["digest"]
    versions = {
        name: [first["versions"].get(name), second["versions"].get(name)]
        for name in sorted({*first["versions"], *second["versions"]})
        if first["versions"].get(name) != second["versions"].get(name)
    }
    return {
        "rows": rows,
        "hardware_differs": differences,
        "versions_differ": versions,
        "same_images": same_images,
    }


def _pairs(first: dict[str, Any], second: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    ones, others = first["targets"], second["targets"]
    if len(ones) == len(others) == 1:
        yield ones[0], others[0]
        return
    by_name = {target["name"]: target for target in others}
    for target in ones:
        if target["name"] in by_name:
            yield target, by_name[target["name"]]


def _rows(one: dict[str, Any], other: dict[str, Any]) -> Iterator[dict[str, Any]]:
    names = (one["name"], other["name"])
    for scenario, measured in one["scenarios"].items():
        again = other["scenarios"].get(scenario)
        if again is None:
            continue
        if "search" in measured and "search" in again:
            row = _searched(measured["search"], again["search"])
            if row is not None:
                yield {"targets": names, "scenario": scenario, **row}
            continue
        by_point = {_point(run): run for run in again["runs"]}
        for run in measured["runs"]:
            if _point(run) in by_point:
                row = _measured(run, by_point[_point(run)])
                if row is not None:
                    yield {"targets": names, "scenario": scenario, "point": _point(run), **row}


def _point(run: dict[str, Any]) -> str:
    """What was asked for in a run, in words."""
    if "target_rate_per_s" in run:
        return f"{run['target_rate_per_s']:g} per second"
    if run["loop"] == "none":
        return f"batch {run['batch_size']}"
    return f"{run['concurrency']} at once" + (f", batch {run['batch_size']}" if run["batch_size"] > 1 else "")


def _measured(run: dict[str, Any], again: dict[str, Any]) -> dict[str, Any] | None:
    is_offline = "passes_per_s" in run
    key = "passes_per_s" if is_offline else "latencies_ms"
    values, others = np.array(run[key], float), np.array(again[key], float)
    if min(len(values), len(others)) < _FEWEST:
        return None
    ratio, low, high = samples.ratio_interval(others, values, np.random.default_rng(_SEED))
    return {
        "quantity": "throughput_per_s" if is_offline else "latency_ms_p50",
        "first": float(np.median(values)),
        "second": float(np.median(others)),
        "ratio": ratio,
        "low": low,
        "high": high,
        "n": [len(values), len(others)],
    }


def _searched(search: dict[str, Any], again: dict[str, Any]) -> dict[str, Any] | None:
    bound = (search["percentile"], search["latency_bound_ms"])
    if bound != (again["percentile"], again["latency_bound_ms"]):
        return None
    ends = [search["held_per_s"], search["failed_per_s"], again["held_per_s"], again["failed_per_s"]]
    if None in ends:
        return None
    held, failed, held_again, failed_again = ends
    return {
        "point": f"highest rate with p{bound[0]:g} within {bound[1]:g} ms",
        "quantity": "rate_per_s",
        "first": held,
        "second": held_again,
        "ratio": held_again / held,
        "low": held_again / failed,
        "high": failed_again / held,
        "n": [len(search["trials"]), len(again["trials"])],
    }


def _names(result: dict[str, Any]) -> str:
    return ", ".join(f"{target['name']} ({', '.join(target['scenarios'])})" for target in result["targets"])
