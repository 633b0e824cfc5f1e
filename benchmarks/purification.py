"""Does purification hold? Purifies victims of unknown target and trigger, measures before and after.

    python benchmarks/purification.py --victims VICTIMS --images TINY_IMAGENET_100 --seeds 0 1 2

With `--list-sizes 12` a list of twelve class names is drawn for every seed, the target among them, and both
images and triggered images are those of the list alone.

VICTIMS holds one open_clip folder per victim, with `attack.json` and triggered test images (a folder or zip
`test-triggered`) unless it is clean; TINY_IMAGENET_100 is a folder or zip with `train/<class>` and
`val/<class>`. Only the measuring reads `attack.json` and the triggered images. The results file is written
after every run, runs that are in it are kept, and the table is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import statistics
import tempfile
import time
import zipfile
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from cbpt_runtime.bundle import read_bundle
from cbpt_runtime.evaluation import evaluate
from cbpt_runtime.pipeline import purify_checkpoint
from cbpt_runtime.purification.cbpt import Cbpt

RESULTS = Path(__file__).parent / "results" / "purification.json"
RATES = (
    "clean_accuracy",
    "attack_success_rate",
    "attack_success_rate_inclusive",
    "poisoned_accuracy",
    "floor",
    "target_recall",
)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--victims", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shots", type=int, nargs="+", default=[16])
    parser.add_argument("--list-sizes", type=int, nargs="+", default=[None], help="default: all classes")
    parser.add_argument("--only", nargs="+", default=[], help="names of victims; default: all")
    parser.add_argument("--parameterization", choices=["embedding", "prompt"], default="embedding")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    runs = kept_runs(options.output)
    with tempfile.TemporaryDirectory() as scratch:
        images = unpacked(options.images, Path(scratch) / "images")
        victims = sorted(path.parent for path in options.victims.glob("*/attack.json"))
        victims = [victim for victim in victims if not options.only or victim.name in options.only]
        for shots, seed, size, victim in product(options.shots, options.seeds, options.list_sizes, victims):
            setting = {
                "victim": victim.name,
                "seed": seed,
                "shots": shots,
                "parameterization": options.parameterization,
            }
            setting |= {} if size is None else {"list_size": size}
            if any(setting.items() <= run.items() for run in runs):
                continue
            runs.append(setting | measured(victim, images, setting, Path(scratch)))
            save(options.output, runs)
    print(table(runs))


def kept_runs(path: Path) -> list[dict[str, Any]]:
    """Return the runs of a results file; none where there is none."""
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []
    return runs


def write_class_list(folders: list[str], path: Path) -> Path:
    """Return a class list with the names of class folders."""
    path.write_text("\n".join(folder.replace("_", " ") for folder in folders) + "\n")
    return path


def drawn(folders: list[str], target: str | None, size: int | None, seed: int) -> list[str]:
    """Class folders of one list: all, or so many drawn at random with the target's among them."""
    if size is None:
        return folders
    own = [] if target is None else [class_folder(target)]
    others = [folder for folder in folders if folder not in own]
    return sorted(own + random.Random(seed).sample(others, size - len(own)))


def class_folder(name: str) -> str:
    """Return the folder of a class in the images at hand."""
    return name.replace(" ", "_")


def linked(source: Path, folders: list[str], place: Path) -> Path:
    """Return a folder with links to the class folders of one list."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for folder in folders:
        (place / folder).symlink_to((source / folder).resolve(), target_is_directory=True)
    return place


def measured(victim: Path, images: Path, setting: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Purifies one victim, then measures it."""
    output = scratch / "bundle"
    attack = json.loads((victim / "attack.json").read_text())
    target = attack.get("target")
    folders = drawn(
        sorted(folder.name for folder in (images / "train").iterdir()),
        target,
        setting.get("list_size"),
        setting["seed"],
    )
    classes = write_class_list(folders, scratch / "classes.txt")
    start = time.process_time()
    bundle = purify_checkpoint(
        victim,
        classes,
        linked(images / "train", folders, scratch / "train"),
        output,
        shots=setting["shots"],
        method=Cbpt(seed=setting["seed"], parameterization=setting["parameterization"]),
        force=True,
    )
    cpu_seconds = time.process_time() - start
    triggered = None
    if target is not None:
        packed = victim / "test-triggered.zip"
        triggered = unpacked(
            packed if packed.exists() else victim / "test-triggered", scratch / f"triggered-{victim.name}"
        )
        shown = [folder for folder in folders if (triggered / folder).is_dir()]
        triggered = linked(triggered, shown, scratch / "triggered")
    clean = linked(images / "val", folders, scratch / "val")
    result = evaluate(read_bundle(output), clean, triggered, target)
    seconds = bundle.manifest["stage_seconds"]
    return {
        "target": target,
        "verdict": bundle.verdict,
        "suspects": [suspect.name for suspect in bundle.suspects],
        "scores": [suspect.score for suspect in bundle.suspects],
        "p_values": [suspect.p_value for suspect in bundle.suspects],
        "smallest_p_value": bundle.evidence.p_value,
        "target_right": [suspect.name for suspect in bundle.suspects] == ([] if target is None else [target]),
        "before": rates(result.before),
        "after": rates(result.after),
        "alarm": None if result.alarm is None else asdict(result.alarm),
        "heldout": bundle.metrics,
        "stage_seconds": seconds,
        "seconds": sum(seconds.values()),
        "cpu_seconds": cpu_seconds,
        "trainable_parameters": bundle.class_embeddings.size if bundle.suspects else 0,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def rates(head: Any) -> dict[str, float | None]:
    """Return the plain shares of one head."""
    found = {name: getattr(head, name) for name in RATES}
    return {name: None if rate is None else rate.rate for name, rate in found.items()}


def unpacked(path: Path, folder: Path) -> Path:
    """Return the folder itself, or a zip unpacked; steps into a single folder inside."""
    if path.suffix == ".zip":
        if not folder.exists():
            with zipfile.ZipFile(path) as archive:
                archive.extractall(folder)
        path = folder
    inside = [entry for entry in path.iterdir() if entry.is_dir()]
    return inside[0] if len(inside) == 1 else path


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
    }


def save(path: Path, runs: list[dict[str, Any]]) -> None:
    """Write the results with what they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"machine": machine(), "config": Cbpt().to_dict(), "runs": runs}, indent=1) + "\n"
    )


def _kind(run: dict[str, Any]) -> tuple[str, int, int, str]:
    """Return what runs of one row have in common."""
    return run["victim"], run.get("list_size", 0), run["shots"], run["parameterization"]


def table(runs: list[dict[str, Any]]) -> str:
    """Mean over the seeds and, in brackets, the worst seed, as Markdown."""
    columns = (
        "victim, classes, shots, target found, CA, ASR, PA, floor after, target recall, alarm AUROC, seconds"
    )
    head = "| " + columns.replace(", ", " | ") + " |"
    lines = [head, "|" + "---|" * 11]
    for key in sorted({_kind(run) for run in runs}):
        group = [run for run in runs if _kind(run) == key]
        cells = [
            key[0],
            str(key[1] or "all"),
            str(key[2]),
            f"{sum(run['target_right'] for run in group)} of {len(group)}",
        ]
        for name, worst in (
            ("clean_accuracy", min),
            ("attack_success_rate", max),
            ("poisoned_accuracy", min),
            ("floor", max),
            ("target_recall", min),
        ):
            before = [run["before"][name] for run in group if run["before"][name] is not None]
            after = [run["after"][name] for run in group if run["after"][name] is not None]
            if not after:
                cells.append("–")
                continue
            mean = f"{100 * statistics.mean(after):.2f} % ({100 * worst(after):.2f})"
            cells.append(mean if name == "floor" else f"{100 * statistics.mean(before):.2f} → {mean}")
        aurocs = [run["alarm"]["auroc"]["value"] for run in group if run["alarm"] is not None]
        cells.append(f"{statistics.mean(aurocs):.4f}" if aurocs else "–")
        cells.append(f"{statistics.median(run['seconds'] for run in group):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
