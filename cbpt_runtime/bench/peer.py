"""perf_analyzer beside our own figures: Triton's own load tool, where it is installed."""

from __future__ import annotations

import base64
import csv
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cbpt_runtime.errors import ConfigError, WorkError

PROGRAM = "perf_analyzer"
_PERCENTILES = ("p50 latency", "p90 latency", "p95 latency", "p99 latency")


def find_peer() -> str:
    """Path of perf_analyzer.

    Raises:
        ConfigError: It is not on PATH.
    """
    found = shutil.which(PROGRAM)
    if found is None:
        raise ConfigError(
            expected=f"{PROGRAM} on PATH for --tool perf-analyzer",
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
    program = find_peer()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.json"
        entries = [
            {"image": {"content": {"b64": base64.b64encode(file).decode()}, "shape": [1]}} for file in files
        ]
        data.write_text(json.dumps({"data": entries}), encoding="utf-8")
        return [
            _run(program, url, model, data, number, duration_s=duration_s, timeout_s=timeout_s)
            for number in concurrencies
        ]


def _run(
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
            expected=f"a table from {PROGRAM}",
            got=said or repr(error),
            fix="Leave --tool out; our own figures do not need it.",
        ) from error
    return {"concurrency": concurrency, "throughput_per_s": rate, "latency_ms": latencies}
