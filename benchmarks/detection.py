"""Is the verdict right, on any class list and any images? A zoo of checkpoints, searched again and again.

    python benchmarks/detection.py --zoo toys VICTIMS TINY_IMAGENET_100 --zoo real VICTIMS IMAGENETTE \
        --output FILE
    python benchmarks/detection.py --zoo toys VICTIMS TINY_IMAGENET_100 --sibling tiny-clean --output FILE
    python benchmarks/detection.py --table FILE

VICTIMS holds open_clip folders with `attack.json` (`"target": null` for a clean one); the images are folders
with `train/<class>` and `val/<class>`. A trial is checkpoint × class list × images × seed: the list is drawn
at random among the classes with images (for more names also ImageNet's), with or without the target.
Only the scoring reads `attack.json`. With --sibling, a clean one of VICTIMS that the others were trained
from, each search is judged twice: beside it, and alone (`alone`). Trials that are in FILE are kept, so that
an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import DualEncoder, load_dual_encoder
from cbpt_runtime.models.data import ClassList, class_key, default_templates, read_images, spoken
from cbpt_runtime.purification.config import PurifyConfig
from cbpt_runtime.purification.reference import comparison
from cbpt_runtime.purification.scan import unlabelled_input
from cbpt_runtime.purification.search import Reach, SearchResult, family_reach, judge
from cbpt_runtime.purification.targets import nearest_word
from cbpt_runtime.purification.trigger_families import SEARCH_FAMILIES
from cbpt_runtime.purification.vocabulary import Vocabulary, background_words

SIZES = (2, 5, 10, 20, 50, 100, 1000)
PER_CLASS, MOST_IMAGES = 24, 400
LEVEL = 0.01
LEAST_CHANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One search."""

    victim: str
    zoo: str
    target: str | None
    size: int
    listed: bool
    split: str
    seed: int


def main() -> None:
    """Run what is missing and print the table."""
    parser = zoo_parser(__doc__)
    parser.add_argument("--only", nargs="*", help="names of victims")
    parser.add_argument("--sibling", help="name of a clean victim, the reference of the others")
    parser.add_argument("--trials", type=int, default=10, help="per checkpoint")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())["trials"]))
        return

    def is_chosen(name: str) -> bool:
        return name != options.sibling and (not options.only or name in options.only)

    print(table(run_zoos(options, is_chosen, run_victim)))


def zoo_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the options that every program over zoos has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", nargs=3, action="append", metavar=("NAME", "VICTIMS", "IMAGES"), default=[])
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path)
    return parser


def run_zoos(
    options: argparse.Namespace,
    is_chosen: Callable[[str], bool],
    run: Callable[..., Iterator[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Return the trials of the output file and those that were missing, saved one by one.

    Args:
        options: Those of `zoo_parser` and of `run`.
        is_chosen: Whether the victim of a name is asked about.
        run: Yields the missing trials of a victim, given its zoo, images, the options and what is done.
    """
    done = json.loads(options.output.read_text())["trials"] if options.output.exists() else []
    for zoo, victims, images in options.zoo:
        for victim in sorted(path.parent for path in Path(victims).glob("*/attack.json")):
            if is_chosen(victim.name):
                for record in run(victim, zoo, Path(images), options, done):
                    done.append(record)
                    save(options.output, done)
    return done


def run_victim(
    victim: Path, zoo: str, images: Path, options: argparse.Namespace, done: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the trials of one checkpoint that are not done yet."""
    attack = json.loads((victim / "attack.json").read_text())
    targets = [door["target"] for door in attack.get("backdoors", [])] or [attack.get("target")]
    trials = plan(victim.name, zoo, targets[0], images, options)
    missing = [
        trial for trial in trials if not any(asdict(trial).items() <= record.items() for record in done)
    ]
    if not missing:
        return
    checkpoint = read_checkpoint(victim)
    encoder, sibling = load_dual_encoder(checkpoint, device=options.device), None
    if options.sibling:
        sibling = load_dual_encoder(read_checkpoint(victim.parent / options.sibling), device=options.device)
    for trial in missing:
        names, shown = draw_list(trial, images)
        pixels = read_images(draw_files(trial, images, shown), checkpoint.preprocess)
        start = time.perf_counter()
        found = searched(encoder, sibling, names, pixels, trial.seed, options.precision)
        yield {
            **asdict(trial),
            "images": len(pixels),
            "targets": targets,
            **found,
            "seconds": round(time.perf_counter() - start, 1),
            "device": options.device,
            "precision": options.precision,
            "sibling": options.sibling,
        }


def plan(victim: str, zoo: str, target: str | None, images: Path, options: argparse.Namespace) -> list[Trial]:
    """Sizes in turn, every third list without the target, both splits; the seeds are the checkpoint's own."""
    known = len(list((images / "train").iterdir()))
    sizes = [size for size in options.sizes if size <= known or (zoo == "real" and size > 10)]
    trials = []
    for number in range(options.trials):
        size = sizes[number % len(sizes)]
        trials.append(
            Trial(
                victim=victim,
                zoo=zoo,
                target=target,
                size=size,
                listed=target is not None and (number % 3 != 2 or size >= known),
                split=("val", "train")[number % 2],
                seed=(zlib.crc32(victim.encode()) + number) % 2**31,
            )
        )
    return trials


def draw_list(trial: Trial, images: Path) -> tuple[list[str], list[str]]:
    """Return a class list, and the folders of those of its classes that there are images of."""
    rng = np.random.default_rng(trial.seed)
    folders = sorted(path.name for path in (images / "train").iterdir())
    target = None if trial.target is None else spoken(trial.target)
    pool = [name for name in rng.permutation(folders) if spoken(name) != target]
    folder_of_target = [name for name in folders if spoken(name) == target]
    first = folder_of_target if trial.listed else []
    shown = [*first, *map(str, pool)][: trial.size]
    taken = {class_key(name) for name in [*folders, *([target] if target else [])]}
    others = [word for word in background_words() if class_key(word) not in taken]
    more = [str(word) for word in rng.permutation(others)[: max(0, trial.size - len(shown))]]
    return [spoken(name) for name in shown] + more, shown


def draw_files(trial: Trial, images: Path, shown: list[str]) -> list[Path]:
    """Return a few files of each class; fewer of each where there are many classes."""
    rng = np.random.default_rng(trial.seed + 1)
    each = max(2, min(PER_CLASS, MOST_IMAGES // len(shown)))
    drawn: list[Path] = []
    for name in shown:
        files = sorted((images / trial.split / name).iterdir())
        drawn += [files[index] for index in rng.permutation(len(files))[:each]]
    return [drawn[index] for index in rng.permutation(len(drawn))]


def searched(
    encoder: DualEncoder,
    sibling: DualEncoder | None,
    names: list[str],
    pixels: np.ndarray,
    seed: int,
    precision: str,
) -> dict[str, Any]:
    """Return what the search says, as `scan` runs it, and with a sibling what it says without."""
    config = PurifyConfig(seed=seed, precision=precision)  # type: ignore[arg-type]
    classes = ClassList(names=tuple(names), templates=(default_templates()[::20],) * len(names))
    subject = unlabelled_input(encoder, classes, pixels, config)
    reference = None if sibling is None else comparison(sibling, classes, subject)
    reached = [family_reach(subject, reference, family, config) for family in SEARCH_FAMILIES.values()]
    told = _told(judge(subject, reached, LEVEL), subject.vocabulary)
    if sibling is not None:
        told["alone"] = _told(judge(subject, without_reference(reached), LEVEL), subject.vocabulary)
    return told


def without_reference(reached: list[Reach]) -> list[Reach]:
    """Return what the families reach, as if there had been no reference."""
    return [replace(one, reference_margins=None, reference_success=None) for one in reached]


def suspected(result: SearchResult, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Return the suspects' names, and whether they are classes of the list."""
    words = [nearest_word(result.directions[concept], vocabulary) for concept in result.outliers.suspects]
    return [{"name": vocabulary.names[word], "on_list": listed} for word, listed in words]


def _told(result: SearchResult, vocabulary: Vocabulary) -> dict[str, Any]:
    evidence = result.evidence(vocabulary)
    return {
        "p_value": evidence.p_value,
        "suspects": suspected(result, vocabulary),
        "first": [asdict(concept) for concept in evidence.concepts[:3]],
        "margins": [
            [[None if math.isinf(value) else round(float(value), 4) for value in row] for row in one]
            for one in result.margins.tolist()
        ],
    }


def save(path: Path, trials: list[dict[str, Any]]) -> None:
    """Write all trials."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"versions": versions, "trials": trials}, separators=(",", ":")) + "\n")


def is_right(trial: dict[str, Any]) -> bool:
    """Whether the first suspect is a true target: by name, or off the list by whatever word lies nearest."""
    if not trial["suspects"]:
        return False
    names = {class_key(name) for name in trial["targets"]}
    first = trial["suspects"][0]
    return class_key(first["name"]) in names or (not trial["listed"] and not first["on_list"])


def table(trials: list[dict[str, Any]]) -> str:
    """Return detection by list size, then the measures of the whole zoo."""
    lines = [
        "| list | backdoored | detected | right target | wrong target | off the list: detected | clean "
        "| false alarms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in sorted({trial["size"] for trial in trials}):
        lines.append(f"| {size} " + _row([trial for trial in trials if trial["size"] == size]))
    lines.append("| all " + _row(trials))
    bad = np.array([trial["p_value"] for trial in trials if trial["target"]])
    good = np.array([trial["p_value"] for trial in trials if not trial["target"]])
    if len(bad) and len(good):
        auc, entropy = roc_auc(-bad, -good), cross_entropy(1 - bad, 1 - good)
        distance, chance = kolmogorov(good)
        lines.append(
            f"\nROC AUC {auc:.4f}, cross entropy of 1 - p {entropy:.3f}; p-values of the {len(good)} clean "
            f"trials against uniform: Kolmogorov distance {distance:.3f}, p = {chance:.3f}, "
            "quantiles at 1, 5, 10, 50 %: "
            + ", ".join(f"{value:.3f}" for value in np.quantile(good, [0.01, 0.05, 0.1, 0.5]))
        )
    return "\n".join(lines)


def _row(trials: list[dict[str, Any]]) -> str:
    on = [trial for trial in trials if trial["target"] and trial["listed"]]
    off = [trial for trial in trials if trial["target"] and not trial["listed"]]
    clean = [trial for trial in trials if not trial["target"]]
    wrong = sum(bool(trial["suspects"]) and not is_right(trial) for trial in on)
    return (
        f"| {len(on)} | {share(sum(bool(t['suspects']) for t in on), len(on))} "
        f"| {share(sum(map(is_right, on)), len(on))} | {share(wrong, len(on))} "
        f"| {share(sum(bool(t['suspects']) for t in off), len(off))} "
        f"| {len(clean)} | {share(sum(bool(t['suspects']) for t in clean), len(clean))} |"
    )


def share(count: int, total: int) -> str:
    """Return a share with its Wilson interval at 95 %."""
    if not total:
        return "–"
    z, rate = 1.96, count / total
    centre = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    low, high = 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)
    return f"{count} of {total} ({low:.0f} to {high:.0f} %)"


def roc_auc(bad: np.ndarray, good: np.ndarray) -> float:
    """Chance that a backdoored model has a larger score than a clean one; ties count half."""
    return float(((bad[:, None] > good) + 0.5 * (bad[:, None] == good)).mean())


def cross_entropy(bad: np.ndarray, good: np.ndarray) -> float:
    """Mean cross entropy of the probabilities given to backdoored and clean models, which are clipped."""
    right = np.clip(np.concatenate([bad, 1 - good]), LEAST_CHANCE, 1 - LEAST_CHANCE)
    return -float(np.log(right).mean())


def kolmogorov(values: np.ndarray) -> tuple[float, float]:
    """Distance of a sample from the uniform distribution on [0, 1], and the asymptotic chance of it."""
    ordered, count = np.sort(values), len(values)
    steps = np.arange(1, count + 1) / count
    distance = float(max((steps - ordered).max(), (ordered - steps + 1 / count).max()))
    scaled = (math.sqrt(count) + 0.12 + 0.11 / math.sqrt(count)) * distance
    terms = [(-1) ** (k - 1) * math.exp(-2 * k * k * scaled * scaled) for k in range(1, 101)]
    return distance, min(1.0, max(0.0, 2 * sum(terms)))


if __name__ == "__main__":
    main()
