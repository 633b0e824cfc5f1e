"""Triton's own account of a run, what it says of itself, and its own load tool beside our figures."""

from __future__ import annotations

import asyncio
import base64
import csv
import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cbpt_runtime.errors import ConfigError, ServingError, WorkError
from cbpt_runtime.serving.client.wire import Wire, WireError, open_wire

PERF_ANALYZER = "perf_analyzer"
_PERCENTILES = ("p50 latency", "p90 latency", "p95 latency", "p99 latency")
_TIMEOUT_S = 10.0
_PARTS = ("queue", "compute_input", "compute_infer", "compute_output")


def server_facts(url: str, model: str) -> dict[str, Any]:
    """Version of the server, and what its classifier runs on."""
    return asyncio.run(_facts(url, model))


def read_statistics(url: str, models: Sequence[str]) -> dict[str, Any]:
    """Return the counters of a few models as they stand, for `difference`."""
    return asyncio.run(_statistics(url, models))


def served_models(model: str) -> tuple[str, ...]:
    """Return the models one classifier is served as: the whole, and its steps."""
    return (model, f"{model}_preprocess", f"{model}_classifier", f"{model}_alarm")


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return what happened in between, per model: requests, mean batch, and mean milliseconds of each part.

    The decoding time of a classifier is the compute time of its ``_preprocess`` model.
    """
    return {name: _one(before.get(name, {}), entry) for name, entry in after.items()}


def _one(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    def grown(*path: str) -> int:
        return _number(after, path) - _number(before, path)

    images, executions = grown("inference_count"), grown("execution_count")
    answered = grown("inference_stats", "success", "count")
    found: dict[str, Any] = {
        "images": images,
        "answered": answered,
        "failed": grown("inference_stats", "fail", "count"),
        "executions": executions,
        "mean_batch_size": images / executions if executions else None,
    }
    if answered:
        found["total_ms"] = grown("inference_stats", "success", "ns") / answered / 1e6
        for part in _PARTS:
            found[f"{part}_ms"] = grown("inference_stats", part, "ns") / answered / 1e6
    return found


def _number(entry: Mapping[str, Any], path: Sequence[str]) -> int:
    value: Any = entry
    for key in path:
        value = value.get(key, {})
    return int(value or 0)


async def _statistics(url: str, models: Sequence[str]) -> dict[str, Any]:
    wire = open_wire(url)
    try:
        return {name: await _asked(wire, url, name) for name in models}
    finally:
        await wire.close()


async def _asked(wire: Wire, url: str, name: str) -> dict[str, Any]:
    try:
        return await wire.statistics(name, _TIMEOUT_S)
    except WireError as error:
        raise ServingError(
            expected=f"the statistics of {name} from {url}",
            got=str(error),
            fix="Serve a repository of `cbpt-runtime export` there, with its statistics endpoint reachable.",
        ) from error


async def _facts(url: str, model: str) -> dict[str, Any]:
    wire = open_wire(url)
    try:
        server = await wire.server(_TIMEOUT_S)
        config = await wire.config(f"{model}_classifier", _TIMEOUT_S)
    except WireError as error:
        raise ServingError(
            expected=f"an answer from {url}", got=str(error), fix="Check that `cbpt-runtime serve` runs."
        ) from error
    finally:
        await wire.close()
    parameters = {
        key: entry.get("string_value", entry.get("stringValue"))
        for key, entry in config.get("parameters", {}).items()
    }
    groups = config.get("instance_group", config.get("instanceGroup", []))
    return {
        "server": f"{server.get('name', 'triton')} {server.get('version', 'unknown')}",
        "backend": config.get("backend"),
        "provider": parameters.get("provider"),
        "threads": parameters.get("intra_op_thread_count"),
        "instances": sum(int(group.get("count", 1)) for group in groups),
    }


def find_perf_analyzer() -> str:
    """Path of perf_analyzer.

    Raises:
        ConfigError: It is not on PATH.
    """
    found = shutil.which(PERF_ANALYZER)
    if found is None:
        raise ConfigError(
            expected=f"{PERF_ANALYZER} on PATH for --tool perf-analyzer",
            got="none",
            fix="Install it (Triton's SDK image has it), or leave --tool out.",
        )
    return found


def cross_check(
    url: str,
    model: str,
    files: Sequence[bytes],
    concurrencies: Sequence[int],
    *,
    duration_s: float,
    timeout_s: float,
) -> list[dict[str, Any]]:
    """Closed-loop runs of perf_analyzer on the same files.

    Its latency counts from the actual send, so it belongs beside our closed-loop sweep, not beside the server
    scenario.

    Raises:
        WorkError: It failed, or wrote what cannot be read.
    """
    program = find_perf_analyzer()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.json"
        entries = [
            {"image": {"content": {"b64": base64.b64encode(file).decode()}, "shape": [1]}} for file in files
        ]
        data.write_text(json.dumps({"data": entries}), encoding="utf-8")
        return [
            _perf_analyzer(program, url, model, data, number, duration_s=duration_s, timeout_s=timeout_s)
            for number in concurrencies
        ]


def _perf_analyzer(
    program: str, url: str, model: str, data: Path, concurrency: int, *, duration_s: float, timeout_s: float
) -> dict[str, Any]:
    parts = urlsplit(url)
    table = data.with_name(f"{concurrency}.csv")
    command = [program, "-m", model, "-u", parts.netloc, "-i", parts.scheme.removesuffix("s"), "-b", "1",
               "--input-data", str(data), "--concurrency-range", str(concurrency), "--measurement-interval",
               str(int(1e3 * duration_s)), "--max-trials", "3", "-f", str(table)]  # fmt: skip
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=60 + 10 * (duration_s + timeout_s), check=False
        )
        rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines())) if table.exists() else []
        row = rows[0]
        latencies = {name.split()[0]: float(row[name]) / 1e3 for name in _PERCENTILES if row.get(name)}
        rate = float(row["Inferences/Second"])
    except (subprocess.TimeoutExpired, OSError, IndexError, KeyError, ValueError) as error:
        said = " ".join((done.stderr or done.stdout).split())[-300:] if "done" in locals() else str(error)
        raise WorkError(
            expected=f"a table from {PERF_ANALYZER}",
            got=said or repr(error),
            fix="Leave --tool out; our own figures do not need it.",
        ) from error
    return {"concurrency": concurrency, "throughput_per_s": rate, "latency_ms": latencies}
