"""How good is the verdict over a whole zoo, as TrojAI scores it, and how good are its rivals'?

    python benchmarks/zoo.py --zoo toys VICTIMS TINY_IMAGENET_100 --zoo real VICTIMS IMAGENETTE --output FILE
    python benchmarks/zoo.py --zoo toys VICTIMS TINY_IMAGENET_100 --only 'tiny-*' --output FILE
    python benchmarks/zoo.py --table FILE

Zoos as in `detection.py`; a model whose `attack.json` has no target is clean, fine-tuned or not. A trial is
checkpoint × class list with the target on it × images of the validation split × seed, the same for every
method: our search as `scan` runs it, without a reference, and the three of `rivals.py`, cut to what
`--passes` allows. Only the scoring reads `attack.json`. A method's trials that are in FILE are kept, whatever
their settings, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detection import (
    LEVEL,
    Trial,
    cross_entropy,
    draw_files,
    draw_list,
    is_right,
    roc_auc,
    run_zoos,
    searched,
    share,
    zoo_parser,
)
from rivals import Decree, MmBd, NeuralCleanse, Rival, Subject, judged
from torch import Tensor, nn

from cbpt_runtime.config import is_mixed
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import DualEncoder, load_dual_encoder
from cbpt_runtime.models.data import ClassList, default_templates, read_images, spoken
from cbpt_runtime.models.faster import faster

SEARCH = "search"
RIVALS: dict[str, Rival] = {"neural-cleanse": NeuralCleanse(), "decree": Decree(), "mm-bd": MmBd()}
METHODS = (SEARCH, *RIVALS)
PASSES = 150_000
"""Of images of 64 × 64 pixels: five minutes of a 64-pixel ModifiedResNet on a core with bfloat16."""

Record = dict[str, Any]


def main() -> None:
    """Run what is missing and print the tables."""
    parser = zoo_parser(__doc__)
    parser.add_argument("--only", nargs="+", default=["*"], help="names of victims, as 'tiny-*'")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10], help="names on a list")
    parser.add_argument("--trials", type=int, default=1, help="per checkpoint and size")
    parser.add_argument(
        "--passes",
        type=int,
        default=PASSES,
        help="images of 64 × 64 pixels that a rival may send through the encoder and back, fewer of larger "
        "ones; 0: its published settings",
    )
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())["trials"]))
        return
    if not options.output:
        parser.error("--output FILE or --table FILE")

    def is_chosen(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in options.only)

    print(table(run_zoos(options, is_chosen, run_victim)))


def run_victim(
    victim: Path, zoo: str, images: Path, options: argparse.Namespace, done: list[Record]
) -> Iterator[Record]:
    """Yield what is not done yet of one checkpoint, method by method."""
    attack = json.loads((victim / "attack.json").read_text())
    doors = attack.get("backdoors") or [attack]
    targets = [door.get("target") for door in doors]
    missing = [
        (trial, method)
        for trial in plan(victim.name, zoo, targets[0], images, options)
        for method in options.methods
        if not any((asdict(trial) | {"method": method}).items() <= record.items() for record in done)
    ]
    if not missing:
        return
    checkpoint = read_checkpoint(victim)
    encoder = load_dual_encoder(checkpoint, device=options.device)
    for trial, method in missing:
        names, shown = draw_list(trial, images)
        pixels = read_images(draw_files(trial, images, shown), checkpoint.preprocess)
        with counted(encoder.image_encoder.module) as passes:
            start = time.process_time()
            if method == SEARCH:
                told = search_verdict(encoder, names, pixels, trial.seed, options.precision)
            else:
                settings = RIVALS[method]
                if options.passes:
                    settings = settings.within(passes_of(options.passes, pixels), len(names))
                told = rival_verdict(encoder, names, pixels, trial.seed, options.precision, settings)
            seconds = time.process_time() - start
        yield {
            **asdict(trial),
            "method": method,
            "attack": " + ".join(str(door["attack"]) for door in doors if door.get("attack")),
            "targets": targets,
            "images": len(pixels),
            **told,
            **passes,
            "cpu_seconds": round(seconds, 1),
            "device": options.device,
            "precision": options.precision,
        }


def plan(victim: str, zoo: str, target: str | None, images: Path, options: argparse.Namespace) -> list[Trial]:
    """Return so many lists of each size, with the target where there are images of it."""
    folders = {spoken(path.name) for path in (images / "train").iterdir()}
    return [
        Trial(
            victim=victim,
            zoo=zoo,
            target=target,
            size=size,
            listed=target is not None and spoken(target) in folders,
            split="val",
            seed=(zlib.crc32(victim.encode()) + number) % 2**31,
        )
        for size in options.sizes
        for number in range(options.trials)
    ]


def passes_of(passes: int, pixels: np.ndarray) -> int:
    """How many images of this size cost as much as so many of 64 × 64 pixels."""
    return round(passes * 64 * 64 / (pixels.shape[1] * pixels.shape[2]))


@contextmanager
def counted(module: nn.Module) -> Iterator[dict[str, int]]:
    """Count the images that go through a tower, or a copy made meanwhile, and come back as gradients."""
    passes = {"forwards": 0, "backwards": 0}

    def count(_: nn.Module, __: tuple[Any, ...], features: Tensor) -> None:
        passes["forwards"] += len(features)
        if features.requires_grad:
            features.register_hook(count_back)

    def count_back(gradient: Tensor) -> None:
        passes["backwards"] += len(gradient)

    handle = module.register_forward_hook(count)
    try:
        yield passes
    finally:
        handle.remove()


def search_verdict(
    encoder: DualEncoder, names: list[str], pixels: np.ndarray, seed: int, precision: str
) -> Record:
    """Ask our search; its probability is 1 - p."""
    found = searched(encoder, None, names, pixels, seed, precision)
    return {
        "score": -math.log10(max(found["p_value"], 1e-300)),
        "probability": 1 - found["p_value"],
        "backdoored": bool(found["suspects"]),
        "suspects": found["suspects"],
        "evidence": {"p_value": found["p_value"], "first": found["first"]},
        "settings": {"level": LEVEL},
    }


def rival_verdict(
    encoder: DualEncoder, names: list[str], pixels: np.ndarray, seed: int, precision: str, settings: Rival
) -> Record:
    """Ask a rival about the zero-shot classifier of the list."""
    classes = ClassList(names=tuple(names), templates=(default_templates(),) * len(names))
    subject = Subject(
        encoder=faster(encoder.image_encoder),
        head=encoder.class_embeddings(classes),
        scale=encoder.logit_scale,
        images=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(encoder.device),
        seed=seed,
        mixed=is_mixed(precision, encoder.device),  # type: ignore[arg-type]
    )
    verdict = judged(subject, settings)
    return {
        "score": verdict.score,
        "probability": verdict.probability,
        "backdoored": verdict.is_backdoored,
        "suspects": [{"name": names[target], "on_list": True} for target in verdict.targets],
        "evidence": verdict.evidence,
        "settings": asdict(settings),
    }


def table(records: list[Record]) -> str:
    """Return the measures of each method over all models, then its verdict on each."""
    methods = [method for method in METHODS if any(record["method"] == method for record in records)]
    lines = [
        "| method | ROC AUC | cross entropy | detected | right target | wrong target | false alarms "
        "| images forwards | backwards | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_row(method, [record for record in records if record["method"] == method]) for method in methods),
        "",
        "| model | attack | target | " + " | ".join(methods) + " |",
        "|---|---|---|" + "---|" * len(methods),
    ]
    for zoo, victim in sorted({(record["zoo"], record["victim"]) for record in records}):
        own = [record for record in records if (record["zoo"], record["victim"]) == (zoo, victim)]
        target = ", ".join(f"*{name}*" for name in own[0]["targets"] if name) or "–"
        cells = [_cell([record for record in own if record["method"] == method]) for method in methods]
        lines.append(f"| `{victim}` | {own[0]['attack'] or '–'} | {target} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _row(method: str, records: list[Record]) -> str:
    bad = [record for record in records if record["target"]]
    good = [record for record in records if not record["target"]]
    auc = entropy = "–"
    if bad and good:
        auc = f"{roc_auc(_values(bad, 'score'), _values(good, 'score')):.3f}"
        entropy = f"{cross_entropy(_values(bad, 'probability'), _values(good, 'probability')):.3f}"
    naming = method != "decree"
    cells = [
        method,
        auc,
        entropy,
        _share_of(bad, _is_detected),
        _share_of(bad, is_right) if naming else "names none",
        _share_of(bad, _is_wrong) if naming else "names none",
        _share_of(good, _is_detected),
        *(f"{np.median(_values(records, name)):,.0f}" for name in ("forwards", "backwards", "cpu_seconds")),
    ]
    return "| " + " | ".join(cells) + " |"


def _cell(records: list[Record]) -> str:
    """Return what the verdicts on one model are, the frequent first."""
    said = [_said(record) for record in records]
    ordered = sorted(set(said), key=lambda one: (-said.count(one), one))
    return ", ".join(one if len(said) == 1 else f"{said.count(one)} × {one}" for one in ordered) or "–"


def _said(record: Record) -> str:
    if not record["backdoored"]:
        return "missed" if record["target"] else "clean"
    if not record["target"]:
        return "false alarm"
    if not record["suspects"]:
        return "detected"
    return "right target" if is_right(record) else "wrong target"


def _is_detected(record: Record) -> bool:
    return bool(record["backdoored"])


def _is_wrong(record: Record) -> bool:
    return bool(record["suspects"]) and not is_right(record)


def _share_of(records: list[Record], is_so: Callable[[Record], bool]) -> str:
    return share(sum(map(is_so, records)), len(records))


def _values(records: list[Record], name: str) -> np.ndarray:
    return np.array([record[name] for record in records], dtype=float)


if __name__ == "__main__":
    main()
