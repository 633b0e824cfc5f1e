"""Does a served classifier stay right, and the same size, under hours of good and bad requests?

    python benchmarks/soak.py model_repository/ --seconds 3600 --output benchmarks/results/soak.json

Starts a real tritonserver and asks it over HTTP and gRPC at once: image files and pixels whose answers are
known, and one bad request in twenty. Memory (heaps and shared memory of all its processes) and open files
are sampled all along; growth is that of the medians of the last fifth against the second fifth, the first
being warm-up. Exits 1 when an answer was wrong or missing, memory grew by 2 % or files grew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np

from cbpt_runtime.errors import RequestError, ServingError
from cbpt_runtime.export.golden import GoldenSet, read_golden
from cbpt_runtime.export.manifest import read_repository
from cbpt_runtime.serving import AsyncClient, RunningServer, ServeConfig, running_server
from cbpt_runtime.serving.triton.process import group_usage

MAX_MEMORY_GROWTH = 0.02
BAD_RATE = 0.05
BAD_FILES = (b"", b"\xff\xd8\xff\xe0 not a JPEG", bytes(1000), b"https://example.org/photo.jpg")
SAMPLES = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much is asked; `rate` is in requests per second, None is as fast as they are answered."""

    seconds: float
    clients: int
    rate: float | None


@dataclass
class Tally:
    """What happened to the requests."""

    sent: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    latencies_ms: list[float] = field(default_factory=list)
    largest_difference: float = 0.0


def main() -> None:
    """Run the soak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--clients", type=int, default=8, help="requests on their way at once")
    parser.add_argument("--rate", type=float, help="requests per second of all clients together at most")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/soak.json"))
    arguments = parser.parse_args()
    load = Load(seconds=arguments.seconds, clients=arguments.clients, rate=arguments.rate)
    result = soak(arguments.repository, load)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "samples"}, indent=1))
    sys.exit(0 if result["passed"] else 1)


def soak(path: Path, load: Load) -> dict[str, object]:
    """Serve a repository and load it; the counts, the growth and the verdict."""
    commit = _commit()
    repository = read_repository(path)
    golden = read_golden(repository.golden)
    pixels = golden.pixels(repository.manifest.preprocess)
    config = ServeConfig(http_port=0, grpc_port=0, metrics_port=0, instances=1)
    with running_server(path, config) as server:
        tally, samples = asyncio.run(_ask_all(server, golden, pixels, load))
        server.require_running()
        about = {"restarts": server.restarts, "tritonserver": server.version, "commit": commit}
    return _result(tally, samples, load, about)


async def _ask_all(
    server: RunningServer, golden: GoldenSet, pixels: np.ndarray, load: Load
) -> tuple[Tally, list[dict[str, float]]]:
    tally = Tally()
    async with asyncio.TaskGroup() as group:
        for number in range(load.clients):
            url = (server.config.grpc_url, server.config.http_url)[number % 2]
            group.create_task(_client(url, number, golden, pixels, tally, load))
        samples = await _sample(server, load.seconds)
    return tally, samples


async def _client(
    url: str, number: int, golden: GoldenSet, pixels: np.ndarray, tally: Tally, load: Load
) -> None:
    dice = random.Random(number)
    rows = golden.answers["images"]
    next_start = time.monotonic()
    end = next_start + load.seconds
    async with AsyncClient(url, timeout_s=60, retries=5) as client:
        while time.monotonic() < end:
            if load.rate is not None:
                await asyncio.sleep(next_start - time.monotonic())
                next_start += dice.uniform(0.5, 1.5) * load.clients / load.rate
            tally.sent += 1
            if dice.random() < BAD_RATE:
                tally.outcomes[await _ask_badly(client, dice.choice(BAD_FILES))] += 1
                continue
            chosen = [dice.randrange(len(rows)) for _ in range(dice.randint(1, 4))]
            start = time.perf_counter()
            try:
                if dice.random() < 0.7:
                    found = await client.predict_files([golden.files[row] for row in chosen])
                else:
                    found = await client.predict_pixels(np.ascontiguousarray(pixels[chosen]))
            except ServingError as error:
                is_clean = getattr(error.__cause__, "kind", "") == "busy"
                tally.outcomes["cleanly refused" if is_clean else "no answer"] += 1
                continue
            tally.latencies_ms.append(1000 * (time.perf_counter() - start))
            expected = np.array([rows[row]["probabilities"] for row in chosen])
            difference = float(np.abs(found.probabilities - expected).max())
            tally.largest_difference = max(tally.largest_difference, difference)
            is_right = difference <= golden.answers["tolerance"]
            tally.outcomes["right answer" if is_right else "wrong answer"] += 1


async def _ask_badly(client: AsyncClient, file: bytes) -> str:
    try:
        await client.predict_files([file])
    except RequestError:
        return "bad request refused"
    except ServingError:
        return "no answer"
    return "bad request answered"


async def _sample(server: RunningServer, seconds: float) -> list[dict[str, float]]:
    samples = []
    start = time.monotonic()
    while (passed_s := time.monotonic() - start) < seconds:
        usage = await asyncio.to_thread(group_usage, server.process.pid)
        samples.append(
            {
                "seconds": round(passed_s, 1),
                "memory_bytes": usage.memory_bytes,
                "descriptors": usage.descriptors,
                "processes": len(usage.pids),
            }
        )
        await asyncio.sleep(seconds / SAMPLES)
    return samples


def _result(
    tally: Tally, samples: list[dict[str, float]], load: Load, about: dict[str, object]
) -> dict[str, object]:
    fifth = max(1, len(samples) // 5)
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]

    def median(part: list[dict[str, float]], name: str) -> float:
        return statistics.median(sample[name] for sample in part)

    memory_growth_rate = median(late, "memory_bytes") / median(early, "memory_bytes") - 1
    descriptor_growth = median(late, "descriptors") - median(early, "descriptors")
    bad = {name: tally.outcomes[name] for name in ("wrong answer", "no answer", "bad request answered")}
    is_complete = sum(tally.outcomes.values()) == tally.sent
    return {
        "passed": is_complete
        and not any(bad.values())
        and memory_growth_rate < MAX_MEMORY_GROWTH
        and descriptor_growth <= 0
        and about["restarts"] == 0,
        **asdict(load),
        "sent": tally.sent,
        "outcomes": dict(sorted(tally.outcomes.items())),
        "largest_difference": tally.largest_difference,
        "memory_growth_rate": memory_growth_rate,
        "descriptor_growth": descriptor_growth,
        "latency_ms": {
            f"p{share}": round(float(np.percentile(tally.latencies_ms, share)), 2) for share in (50, 90, 99)
        }
        | {"n": len(tally.latencies_ms)},
        **about,
        "versions": {name: version(name) for name in ("cbpt-runtime", "onnxruntime", "numpy", "pillow")},
        "machine": {"cpus": len(os.sched_getaffinity(0)), "system": platform.platform()},
        "samples": samples,
    }


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
