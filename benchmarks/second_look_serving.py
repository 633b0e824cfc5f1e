"""What does a server's second look cost: on clean traffic, with 1 % of triggered images, with nothing else?

    python benchmarks/second_look_serving.py --bundle BUNDLE --clean IMAGES --triggered IMAGES

The bundle is exported twice, with a second look and without, and both repositories are served by a Triton of
their own. They take turns on the same files, sent over gRPC, one request at a time and several at once; who
is first changes from round to round. A ratio is that of neighbouring runs, a figure the median of the rounds.
TRIGGERED holds images with the trigger on them, as files; those of 1 % are spread over the clean ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tables

from cbpt_runtime.bench import measuring
from cbpt_runtime.bench.inputs import BenchConfig, Pictures, read_pictures
from cbpt_runtime.bench.measuring import Workload
from cbpt_runtime.bench.results import describe_machine, describe_versions
from cbpt_runtime.bench.systems import open_system
from cbpt_runtime.bundle import read_bundle
from cbpt_runtime.export.profiles import Profile
from cbpt_runtime.export.repository import export_bundle
from cbpt_runtime.serving import ServeConfig, running_server

RESULTS = Path(__file__).parent / "results" / "second-look-serving.json"
FILES = 200
SHARES = {"clean": 0.0, "1 % triggered": 0.01, "all triggered": 1.0}
AT_ONCE = (1, 8)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("bundle", "clean", "triggered"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each run")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    bundle = read_bundle(options.bundle)
    clean, triggered = (
        read_pictures(folder, most=FILES, seed=0) for folder in (options.clean, options.triggered)
    )
    config = BenchConfig(duration_s=options.seconds, warmup_s=1.0)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        systems = {}
        for name, twice in (("head alone", False), ("second look", True)):
            repository = Path(scratch) / name.replace(" ", "-")
            export_bundle(bundle, repository, profile=Profile(second_look=twice))
            ports = ServeConfig(http_port=0, grpc_port=0, metrics_port=0)
            server = stack.enter_context(running_server(repository, ports))
            systems[name] = open_system(server.config.grpc_url)
            stack.enter_context(systems[name].classifier)
        for traffic, share in SHARES.items():
            pictures = mixed(clean, triggered, share)
            works = {
                name: Workload(
                    system=system, pictures=pictures, expected=system.answer(pictures.files), config=config
                )
                for name, system in systems.items()
            }
            for at_once in AT_ONCE:
                row = in_turns(works, at_once, options.rounds)
                found[f"{traffic}, {at_once} at once"] = row
                print(traffic, at_once, json.dumps({name: row[name] for name in works}), row["ratio"])
    result = {
        "machine": describe_machine(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": describe_versions(),
        "classes": len(bundle.class_names),
        "clean": clean.describe() | {"folder": options.clean.name},
        "triggered": triggered.describe() | {"folder": options.triggered.name},
        "seconds": options.seconds,
        "runs": found,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(found))


def mixed(clean: Pictures, triggered: Pictures, share: float) -> Pictures:
    """Return as many files as before, so large a share of them triggered and spread evenly."""
    count = len(clean.files)
    names, files = list(clean.names), list(clean.files)
    places = np.linspace(0, count, round(share * count), endpoint=False).astype(int)
    for number, place in enumerate(places.tolist()):
        names[place] = triggered.names[number % len(triggered.files)]
        files[place] = triggered.files[number % len(triggered.files)]
    return Pictures(folder=clean.folder, names=tuple(names), files=tuple(files))


def in_turns(works: dict[str, Workload], at_once: int, rounds: int) -> dict[str, Any]:
    """Return medians of both, the ratios of second look to head alone, and every run."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in works}
    for number in range(rounds):
        for name in sorted(works, reverse=bool(number % 2)):
            run = measuring.closed_loop(works[name], at_once)
            latencies = np.array(run.latencies_ms)
            runs[name].append(
                {
                    "images_per_s": round(run.throughput_per_s, 3),
                    "p50_ms": round(float(np.median(latencies)), 3),
                    "p95_ms": round(float(np.percentile(latencies, 95)), 3),
                    "p99_ms": round(float(np.percentile(latencies, 99)), 3),
                    "requests": len(latencies),
                    "lost": run.lost,
                    "answers": asdict(run.answers),
                }
            )
    figures = ("images_per_s", "p50_ms", "p95_ms", "p99_ms")
    row: dict[str, Any] = {
        name: {figure: statistics.median(run[figure] for run in each) for figure in figures}
        for name, each in runs.items()
    }
    pairs = list(zip(runs["second look"], runs["head alone"], strict=True))
    ratios = {figure: [round(twice[figure] / once[figure], 4) for twice, once in pairs] for figure in figures}
    row["ratio"] = {figure: statistics.median(each) for figure, each in ratios.items()}
    return row | {"ratios": ratios, "rounds": runs}


def table(found: dict[str, Any]) -> str:
    """One row per traffic, as Markdown."""
    rows = []
    for traffic, row in found.items():
        once, twice, ratios = row["head alone"], row["second look"], row["ratios"]["images_per_s"]
        cells = [traffic, f"{once['images_per_s']:.1f} → {twice['images_per_s']:.1f}"]
        cells.append(f"{row['ratio']['images_per_s']:.3f} ({min(ratios):.2f} to {max(ratios):.2f})")
        cells += [f"{once[figure]:.1f} → {twice[figure]:.1f}" for figure in ("p50_ms", "p95_ms")]
        rows.append(tuple(cells))
    return tables.table(("traffic", "images/s", "ratio (all)", "p50, ms", "p95, ms"), rows)


if __name__ == "__main__":
    main()
