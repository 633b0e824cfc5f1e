"""What was measured on; results read back, and two of them side by side: ratios with 95 % intervals."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from cbpt_runtime.artifacts import read_json_file, shape_problems
from cbpt_runtime.artifacts.names import is_folder
from cbpt_runtime.bench import samples
from cbpt_runtime.bench.records import KIND, SCHEMA_VERSION
from cbpt_runtime.errors import ConfigError
from cbpt_runtime.export.cpus import instructions, read_cpuinfo, usable_cpus

_PACKAGES = ("cbpt-runtime", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "open_clip_torch", "pillow",
             "torch", "tritonclient")  # fmt: skip
COMPARED = ("processor", "instructions", "usable_cpus", "gpus")  # what makes two machines the same
RESULT = "bench.json"
_MAX_BYTES = 1 << 30
_SHAPE = {
    "machine": dict,
    "images": {"digest": str},
    "versions": dict,
    "targets": [{"name": str, "scenarios": {str: {"runs": [dict]}}}],
}
_SEED = 0
_FEWEST = 5  # observations below which no interval is given


def describe_machine() -> dict[str, Any]:
    """Processor, instructions that matter, cores and affinity, memory, GPUs, load and system."""
    return {
        "processor": _processor(read_cpuinfo()),
        "instructions": instructions(),
        "cpus": os.cpu_count(),
        "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "usable_cpus": usable_cpus(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": _gpus(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def describe_versions() -> dict[str, str]:
    """Installed packages whose version matters for speed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor(cpuinfo: dict[str, str]) -> str:
    """Name, family and model: virtual machines often hide the rest of the name."""
    name = cpuinfo.get("model name") or platform.processor() or platform.machine()
    family = [f"{key} {cpuinfo[key]}" for key in ("cpu family", "model", "stepping") if key in cpuinfo]
    return f"{name} ({', '.join(family)})" if family else name


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One quantity that two results measured alike.

    Attributes:
        targets: Its systems' names.
        scenario: Where it was measured ...
        point: ... and what was asked for.
        quantity: What it is, with its unit.
        first: Of the first result.
        second: Of the second.
        ratio: Second / first.
        low: Lower end of the ratio's interval.
        high: Its upper end.
        n: Observations of both.
    """

    targets: tuple[str, str]
    scenario: str
    point: str
    quantity: str
    first: float
    second: float
    ratio: float
    low: float
    high: float
    n: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two results side by side.

    Attributes:
        rows: What both measured alike.
        hardware_differs: What is not the same about the machines, first and second.
        versions_differ: The same of packages.
        same_images: Whether the same files were sent.
    """

    rows: tuple[Ratio, ...]
    hardware_differs: dict[str, tuple[Any, Any]]
    versions_differ: dict[str, tuple[Any, Any]]
    same_images: bool

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def read_results(path: str | Path) -> dict[str, Any]:
    """Read ``bench.json``, named itself or by its folder; it may be of an earlier version of the package.

    Raises:
        ConfigError: Not results of a run, or of another version.
    """
    path = Path(path)
    file = path / RESULT if is_folder(path) else path
    fix = f"Name the {RESULT} (or its folder) that `cbpt-runtime bench --output` wrote."
    try:
        _, content = read_json_file(file, max_bytes=_MAX_BYTES)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(expected="results of a bench run", got=f"{file} ({reason})", fix=fix) from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not isinstance(content, dict) or content.get("kind") != KIND or version != SCHEMA_VERSION:
        raise ConfigError(
            expected=f"results of a bench run, schema version {SCHEMA_VERSION}",
            got=f"something else in {file}",
            fix=fix,
        )
    if problems := shape_problems(content, _SHAPE):
        raise ConfigError(expected=f"complete results in {file}", got="; ".join(problems), fix=fix)
    return content


def compare(first: dict[str, Any], second: dict[str, Any], *, across_hardware: bool = False) -> Comparison:
    """Ratios second / first of every run both have.

    Systems are matched by name, or simply with each other where each result has one. Latency is compared by
    its median, offline throughput by the median of its passes; both intervals are block bootstraps. A rate
    found by search has no sample: its ratio comes with the worst and best case of the two searches.

    Args:
        first: Results as `read_results` gives them.
        second: Others.
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


def _compared(first: dict[str, Any], second: dict[str, Any], across_hardware: bool) -> Comparison:
    hardware = _differences(first["machine"], second["machine"], COMPARED)
    if hardware and not across_hardware:
        raise ConfigError(
            expected="two results from the same hardware",
            got="; ".join(f"{key}: {one} and {other}" for key, (one, other) in hardware.items()),
            fix="Compare runs of one machine, or say --different-hardware.",
        )
    rows = tuple(row for pair in _pairs(first, second) for row in _rows(*pair))
    if not rows:
        raise ConfigError(
            expected="two results with systems and runs in common",
            got=f"{_names(first)} and {_names(second)}",
            fix="Run both with the same scenarios, rates and sizes, and systems of the same names.",
        )
    packages = sorted({*first["versions"], *second["versions"]})
    return Comparison(
        rows=rows,
        hardware_differs=hardware,
        versions_differ=_differences(first["versions"], second["versions"], packages),
        same_images=first["images"]["digest"] == second["images"]["digest"],
    )


def _differences(
    first: dict[str, Any], second: dict[str, Any], keys: Iterable[str]
) -> dict[str, tuple[Any, Any]]:
    values = {key: (first.get(key), second.get(key)) for key in keys}
    return {key: (one, other) for key, (one, other) in values.items() if one != other}


def _pairs(first: dict[str, Any], second: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    ones, others = first["targets"], second["targets"]
    if len(ones) == len(others) == 1:
        yield ones[0], others[0]
        return
    by_name = {target["name"]: target for target in others}
    for target in ones:
        if target["name"] in by_name:
            yield target, by_name[target["name"]]


def _rows(one: dict[str, Any], other: dict[str, Any]) -> Iterator[Ratio]:
    names = (one["name"], other["name"])
    for scenario, measured in one["scenarios"].items():
        again = other["scenarios"].get(scenario)
        if again is None:
            continue
        if "search" in measured and "search" in again:
            found = [_searched(measured["search"], again["search"])]
        else:
            others = {_point(run): run for run in again["runs"]}
            points = [(_point(run), run) for run in measured["runs"]]
            found = [_measured(point, run, others[point]) for point, run in points if point in others]
        for values in found:
            if values is not None:
                yield Ratio(targets=names, scenario=scenario, **values)


def _point(run: dict[str, Any]) -> str:
    """Return what was asked for in a run, in words."""
    if "target_rate_per_s" in run:
        return f"{run['target_rate_per_s']:g} per second"
    if run["loop"] == "none":
        return f"batch {run['batch_size']}"
    return f"{run['concurrency']} at once" + (f", batch {run['batch_size']}" if run["batch_size"] > 1 else "")


def _measured(point: str, run: dict[str, Any], again: dict[str, Any]) -> dict[str, Any] | None:
    is_offline = "passes_per_s" in run
    key = "passes_per_s" if is_offline else "latencies_ms"
    values, others = np.array(run[key], float), np.array(again[key], float)
    if min(len(values), len(others)) < _FEWEST:
        return None
    ratio, low, high = samples.ratio_interval(others, values, np.random.default_rng(_SEED))
    return {
        "point": point,
        "quantity": "throughput_per_s" if is_offline else "latency_ms_p50",
        "first": float(np.median(values)),
        "second": float(np.median(others)),
        "ratio": ratio,
        "low": low,
        "high": high,
        "n": (len(values), len(others)),
    }


def _searched(search: dict[str, Any], again: dict[str, Any]) -> dict[str, Any] | None:
    bound = (search["percentile"], search["latency_bound_ms"])
    ends = [search["held_per_s"], search["failed_per_s"], again["held_per_s"], again["failed_per_s"]]
    if bound != (again["percentile"], again["latency_bound_ms"]) or None in ends:
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
        "n": (len(search["trials"]), len(again["trials"])),
    }


def _names(result: dict[str, Any]) -> str:
    return ", ".join(f"{target['name']} ({', '.join(target['scenarios'])})" for target in result["targets"])
