"""Does the demo hang on luck? It is told many seeds, each from nothing, on the precision and processor given.

    python benchmarks/demo.py --seeds 0 1 2

Runs that are in the results are kept, so that an interrupted one goes on; another processor, precision or
number of threads makes other weights and is another run. Only the demo's last step, the measuring, knows the
trigger. A seed that fails is a row, too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from cbpt_runtime.bundle import read_bundle
from cbpt_runtime.cli.output import shown_progress
from cbpt_runtime.config import is_mixed
from cbpt_runtime.demo.story import run_demo
from cbpt_runtime.errors import CbptError
from cbpt_runtime.export.cpus import kind_of_processor

RESULTS = Path(__file__).parent / "results" / "demo.json"


def main() -> None:
    """Run what is missing and print a line per run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(20)))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    runs = json.loads(options.output.read_text()) if options.output.exists() else []
    where = {
        "processor": kind_of_processor(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "bfloat16": is_mixed("auto", torch.device("cpu")),
    }
    for seed in options.seeds:
        key = {"seed": seed, **where}
        if not any(key.items() <= run.items() for run in runs):
            runs.append({**key, **run(seed)})
            options.output.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")
        print(next(line for line in runs if key.items() <= line.items()))


def run(seed: int) -> dict[str, Any]:
    """One demo: what was found, the rates before and after, and the seconds of its stages."""
    with tempfile.TemporaryDirectory() as folder, shown_progress() as progress:
        output = Path(folder, "demo")
        try:
            result = run_demo(output, seed=seed, progress=progress)
        except CbptError as error:
            return {"passed": False, "error": str(error)}
        bundle = read_bundle(result.bundle)
        before, after = result.evaluation.before, result.evaluation.after or result.evaluation.before
        return {
            "passed": True,
            "suspects": [[suspect["name"], suspect["p_value"]] for suspect in bundle.suspects],
            "target": result.target,
            **{
                name: [round(getattr(rates, name).rate, 4) for rates in (before, after)]
                for name in ("clean_accuracy", "attack_success_rate", "poisoned_accuracy", "target_recall")
            },
            "seconds": {stage: round(seconds, 1) for stage, seconds in result.stage_seconds.items()},
        }


if __name__ == "__main__":
    main()
