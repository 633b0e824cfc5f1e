"""What does Triton cost: against the same graph in one process, at saturation, at low load, and at the start?

    python benchmarks/serving.py --images PHOTOS --bundle BUNDLE

PHOTOS is a folder of full-size JPEGs; they are sent as they are, over gRPC. BUNDLE is a purified victim (its
repository is also what is started); ViT-B-32 has random weights. Triton and the same graph in this process
take turns, five rounds; a figure is the median of the rounds. Needs the `server` extra, or another
tritonserver. Parts already in the results file are kept; the tables of benchmarks/serving.md are written anew
at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tables import write_tables

from cbpt_runtime.bench import measuring
from cbpt_runtime.bench.inputs import BenchConfig, Pictures, read_pictures
from cbpt_runtime.bench.measuring import Workload
from cbpt_runtime.bench.results import describe_machine, describe_versions
from cbpt_runtime.bench.systems import open_system
from cbpt_runtime.bundle import Bundle, read_bundle
from cbpt_runtime.export.cpus import usable_cpus
from cbpt_runtime.export.profiles import Profile
from cbpt_runtime.export.repository import export_bundle
from cbpt_runtime.serving import RunningServer, ServeConfig, running_server
from cbpt_runtime.serving.triton.process import group_members
from export import random_bundle

RESULTS = Path(__file__).parent / "results" / "serving.json"
PARTS = ("saturated", "overhead", "start")
ROUNDS = 5
STARTS = 5
IN_FLIGHT = 32
BATCH = 16


def main() -> None:
    """Measure what is asked for and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", default=["ViT-B-32", "victim"])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each round")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    found |= {"machine": describe_machine(), "versions": describe_versions()}
    pictures = read_pictures(options.images, most=100, seed=0)
    found["images"] = pictures.describe() | {"folder": options.images.name}
    with tempfile.TemporaryDirectory() as scratch:
        for model in options.models:
            repository = Path(scratch) / f"{model}-repository"
            bundle = (
                read_bundle(options.bundle)
                if model == "victim"
                else random_bundle(model, Path(scratch) / model)
            )
            export(bundle, repository)
            for part in options.only:
                if part == "start" and model != "victim":
                    continue
                result = {"saturated": saturated, "overhead": overhead, "start": start}[part](
                    repository, pictures, options.seconds
                )
                result["load_average"] = round(os.getloadavg()[0], 2)
                found.setdefault(part, {})[model] = result
                print(part, model, json.dumps(result))
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(found, indent=1) + "\n")
    if options.output == RESULTS:
        write_tables()


def export(bundle: Bundle, repository: Path) -> None:
    """Make the repository as `cbpt-runtime export` does it."""
    export_bundle(bundle, repository, profile=Profile(max_batch=BATCH))


@contextmanager
def served(
    repository: Path, pictures: Pictures, seconds: float, *, warmup_s: float = 1.0
) -> Iterator[tuple[Workload, Workload, RunningServer]]:
    """Open the same graph behind Triton and in this process, and compare their answers before the timing."""
    config = BenchConfig(duration_s=seconds, warmup_s=warmup_s)
    with running_server(repository, ServeConfig(http_port=0, grpc_port=0, metrics_port=0)) as server:
        systems = [open_system(server.config.grpc_url), open_system(str(repository))]
        answers = [system.answer(pictures.files) for system in systems]
        if answers[0].difference(answers[1]) > measuring.TOLERANCE:
            raise SystemExit("Triton and onnxruntime in process disagree")
        remote, local = (
            Workload(system=system, pictures=pictures, expected=each, config=config)
            for system, each in zip(systems, answers, strict=True)
        )
        with remote.system.classifier:
            yield remote, local, server


def saturated(repository: Path, pictures: Pictures, seconds: float) -> dict[str, Any]:
    """Files in over gRPC, many on their way, against the graph on decoded tensors and the cost of decoding.

    Decoding runs on all processors at once, computing on all threads; in one process they would take turns,
    so an image costs decode / processors + compute. Where others use the machine, too, that compares who
    waits worse; so the processor time of an image is compared as well, with all of the server counted.
    """
    rounds = []
    with served(repository, pictures, seconds, warmup_s=0.0) as (remote, local, server):
        for _ in range(ROUNDS):
            before_s = group_processor_s(server.process.pid)
            run = measuring.closed_loop(remote, IN_FLIGHT)
            outcomes, triton = run.outcomes or {}, run.triton or {}
            spent_ms = 1e3 * (group_processor_s(server.process.pid) - before_s) / outcomes["answered"]
            here = parts_in_process(local, BATCH, seconds / 2)
            here_s = (here["decode_ms"] / usable_cpus() + here["compute_ms"]) / 1e3
            rounds.append(
                {
                    "triton_per_s": run.throughput_per_s,
                    "in_process_per_s": 1 / here_s,
                    "ratio": run.throughput_per_s * here_s,
                    "triton_processor_ms": spent_ms,
                    "ratio_of_processor_time": here["in_process_processor_ms"] / spent_ms,
                    "mean_batch_size": triton["clip_classifier"]["mean_batch_size"],
                    "client_cpu_share": run.generator.cpu_share,
                    "lost": run.lost,
                    "wrong": run.answers.wrong,
                    **here,
                }
            )
        facts = {"tritonserver": server.version, **remote.system.facts}
    return medians(rounds) | {"in_flight": IN_FLIGHT, "facts": plain(facts), "rounds": rounds}


def overhead(repository: Path, pictures: Pictures, seconds: float) -> dict[str, Any]:
    """One request at a time: what the answer takes beyond decoding and the graph in this process.

    The difference of the tenth percentiles is that of undisturbed requests, should others use the machine.
    """
    rounds = []
    with served(repository, pictures, seconds) as (remote, local, server):
        for _ in range(ROUNDS):
            run = measuring.closed_loop(remote, 1)
            here = measuring.closed_loop(local, 1)
            steps = {name.removeprefix("clip_"): entry for name, entry in (run.triton or {}).items()}
            theirs, ours = (np.array(each.latencies_ms) for each in (run, here))
            rounds.append(
                {
                    "triton_p50_ms": float(np.median(theirs)),
                    "in_process_p50_ms": float(np.median(ours)),
                    "overhead_ms": float(np.median(theirs) - np.median(ours)),
                    "overhead_p10_ms": float(np.percentile(theirs, 10) - np.percentile(ours, 10)),
                    "max_ms": float(theirs.max()),
                    "longer_than_400_ms": int((theirs > 400).sum()),
                    "n": [len(theirs), len(ours)],
                    "alarm_step_ms": steps["alarm"]["total_ms"],
                    "steps_ms": {
                        name: {part: round(entry[part], 3) for part in entry if part.endswith("_ms")}
                        for name, entry in steps.items()
                    },
                }
            )
        facts = {"tritonserver": server.version, **remote.system.facts}
    return medians(rounds) | {"facts": plain(facts), "rounds": rounds}


def start(repository: Path, _pictures: Pictures, _seconds: float) -> dict[str, Any]:
    """From the command to the line that says ready: imports, hashes, loading, warming up, self-test."""
    command = [sys.executable, "-m", "cbpt_runtime", "serve", str(repository)]
    command += [word for kind in ("http", "grpc", "metrics") for word in (f"--{kind}-port", "0")]
    spent = []
    for _ in range(STARTS):
        began = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            if process.stdout is None or not process.stdout.readline().startswith("ready"):
                raise SystemExit("the server did not get ready")
            spent.append(round(time.perf_counter() - began, 2))
            process.terminate()
            process.communicate()
    return {"median_s": statistics.median(spent), "seconds": spent}


def parts_in_process(work: Workload, batch: int, seconds: float) -> dict[str, float]:
    """Milliseconds per image: decoding by one thread, computing in batches by all; and processor time."""
    files = work.pictures.files[:batch]
    decode: list[float] = []
    compute: list[float] = []
    spent = time.process_time()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(compute) < 3:
        _, timing = work.system.timed(files)
        decode.append(1e3 * timing.decode_s / batch)
        compute.append(1e3 * timing.compute_s / batch)
    return {
        "decode_ms": statistics.median(decode),
        "compute_ms": statistics.median(compute),
        "in_process_processor_ms": 1e3 * (time.process_time() - spent) / batch / len(compute),
    }


def group_processor_s(group: int) -> float:
    """Processor time all living processes of a group have used."""
    ticks = 0
    for pid in group_members(group):
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        )
        ticks += int(fields[11]) + int(fields[12])  # utime and stime
    return ticks / os.sysconf("SC_CLK_TCK")


def medians(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median over the rounds of everything that is one number."""
    numbers = [key for key, value in rounds[0].items() if isinstance(value, int | float)]
    return {key: round(statistics.median(each[key] for each in rounds), 4) for key in numbers}


def plain(facts: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from run to run."""
    return {key: value for key, value in facts.items() if key not in ("source", "name")}


if __name__ == "__main__":
    main()
