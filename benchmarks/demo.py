"""Does the demo hang on luck? It is told many seeds, each from nothing, and searched in both precisions.

    python benchmarks/demo.py FOLDER --seeds 0 1 2
    python benchmarks/demo.py FOLDER --seeds 0 1 2 --precisions fp32 --benign
    python benchmarks/demo.py --table

Victims are kept in the folder and runs in the results, so that an interrupted benchmark goes on; another
processor or number of threads makes other weights and is another victim. Only the demo's last step, the
measuring, knows the trigger. A seed that fails is a row, too. `--benign` asks instead for the verdict on the
clean model trained on, without a trigger, as the attacker trains: it has to be called clean.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from cbpt_runtime.bundle import Evidence, read_bundle
from cbpt_runtime.cli.output import shown_progress
from cbpt_runtime.config import Precision
from cbpt_runtime.demo.story import check_purification, make_suspect, purify_suspect
from cbpt_runtime.demo.suspect import TARGET, DemoScale, draw_pictures, train_on
from cbpt_runtime.errors import CbptError
from cbpt_runtime.evaluation import evaluate
from cbpt_runtime.export.cpus import kind_of_processor
from cbpt_runtime.models.trainable import load_trainable
from cbpt_runtime.purification.config import PurifyConfig
from cbpt_runtime.purification.scan import scan

RESULTS = Path(__file__).parent / "results" / "demo.json"
RATES = ("clean_accuracy", "attack_success_rate", "poisoned_accuracy", "target_recall")


def main() -> None:
    """Run what is missing and print a line per run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="where the victims are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(20)))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--benign", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only show what is there")
    options = parser.parse_args()
    runs = json.loads(options.output.read_text()) if options.output.exists() else []
    if options.table or options.folder is None:
        print(table(runs))
        return
    where = {
        "processor": kind_of_processor(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    for seed in options.seeds:
        for precision in options.precisions:
            key = {"seed": seed, "precision": precision, "benign": options.benign, **where}
            if not any(key.items() <= row.items() for row in runs):
                made = options.folder / f"{where['kernels']}-{where['threads']}-{seed}"
                with shown_progress():
                    row = benign_run(made, seed, precision) if options.benign else run(made, seed, precision)
                runs.append({**key, **row})
                options.output.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")
            print(next(row for row in runs if key.items() <= row.items()), flush=True)


def run(made: Path, seed: int, precision: Precision) -> dict[str, Any]:
    """One demo: what was found, the rates before and after, and the seconds of its stages."""
    seconds = _victim(made, seed)
    shutil.rmtree(made / "bundle", ignore_errors=True)
    start = time.perf_counter()
    purify_suspect(made, seed, "cpu", None, precision=precision)
    seconds["purify"] = time.perf_counter() - start
    bundle = read_bundle(made / "bundle")
    found = evaluate(bundle, made / "images" / "test", made / "triggered", TARGET, device="cpu")
    try:
        check_purification(found)
        outcome: dict[str, Any] = {"passed": True}
    except CbptError as error:
        outcome = {"passed": False, "error": str(error)}
    heads = (found.heads["before"], list(found.heads.values())[-1])
    return {
        **outcome,
        "concepts": _first(bundle.evidence),
        "suspects": [suspect.name for suspect in bundle.suspects],
        **{name: [round(getattr(rates, name).rate, 4) for rates in heads] for name in RATES},
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
    }


def benign_run(made: Path, seed: int, precision: Precision) -> dict[str, Any]:
    """Return the verdict on a model that was trained on without a trigger, beside the one it comes from."""
    _victim(made, seed)
    benign, scale = made / "benign-checkpoint", DemoScale()
    if not benign.exists():
        pictures = draw_pictures(scale, seed)
        clip = load_trainable(made / "reference-checkpoint", device="cpu")
        train_on(clip, pictures, scale, torch.Generator().manual_seed(seed)).save(benign)
    found = scan(
        benign,
        made / "images" / "train",
        classes=made / "classes.txt",
        reference=made / "reference-checkpoint",
        config=PurifyConfig(seed=seed, background_words=False, precision=precision),
        device="cpu",
    )
    return {
        "passed": found.verdict == "clean",
        "concepts": _first(found.evidence),
        "suspects": [suspect.name for suspect in found.suspects],
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Return a row for each kind of model, kernels and precision; the worst of its seeds in every column."""
    lines = [
        "| models | kernels | search in | as it should be | p of the target, at most "
        "| p of any other word, at least | ASR after, at most | CA lost, mean (at most) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    kind = itemgetter("benign", "kernels", "precision")
    for benign, kernels, precision in sorted(set(map(kind, runs))):
        rows = [row for row in runs if kind(row) == (benign, kernels, precision)]
        words = [word for row in rows for word in row["concepts"]]
        own = [word["p_value"] for word in words if word["word"] == TARGET and not benign]
        others = [word["p_value"] for word in words if word["word"] != TARGET or benign]
        after = [row["attack_success_rate"][1] for row in rows if not benign]
        lost = [row["clean_accuracy"][0] - row["clean_accuracy"][1] for row in rows if not benign]
        passed = sum(row["passed"] and row["suspects"] == ([] if benign else [TARGET]) for row in rows)
        cells = (
            "trained on without a trigger" if benign else "backdoored",
            kernels,
            precision,
            f"{passed} of {len(rows)}",
            f"{max(own):.2g}" if own else "–",
            f"{min(others):.2g}" if others else "–",
            f"{100 * max(after):.1f} %" if after else "–",
            f"{100 * sum(lost) / len(lost):.1f} ({100 * max(lost):.1f}) points" if lost else "–",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _victim(made: Path, seed: int) -> dict[str, float]:
    """Make what is not there, and say how long it took."""
    seconds: dict[str, float] = {}
    if not (made / "suspect-checkpoint").exists():
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        make_suspect(made, seconds, scale=DemoScale(), seed=seed)
    return seconds


def _first(evidence: Evidence) -> list[dict[str, Any]]:
    return [asdict(concept) for concept in evidence.concepts[:2]]


if __name__ == "__main__":
    main()
