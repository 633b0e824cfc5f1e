"""What is a second look worth? The purified head alone, and with a second look, beside a clean sibling.

    python benchmarks/second_look.py --victims VICTIMS --images TINY_IMAGENET_100 --sibling tiny-clean
    python benchmarks/second_look.py --victims VICTIMS --images IMAGENETTE --sibling real-clean \
        --only real-patch

VICTIMS holds open_clip folders as in `purification.py`; `--sibling` is the one without a backdoor that the
others were made of. Each victim is purified without a word of its target or trigger; with `--told` the
target's name takes the place of the search, which is most of the work, and all that follows is the same. What
was purified before is taken from `--bundles`. An attacker who knows of it puts a second copy of a patch into
the opposite corner: the patch is cut out of the triggered images by comparison with the clean ones of the
same name. The results file is written after every victim, and victims that are in it are kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image
from purification import kept_runs, machine, rates, unpacked, write_class_list

from cbpt_runtime.bundle import Bundle, Evidence, Suspect, read_bundle
from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.evaluation import evaluate, evaluate_all
from cbpt_runtime.evaluation.results import Measured
from cbpt_runtime.models.class_lists import read_class_list
from cbpt_runtime.models.data import read_images
from cbpt_runtime.pipeline import purify_checkpoint
from cbpt_runtime.purification import cbpt
from cbpt_runtime.purification.cbpt import Cbpt
from cbpt_runtime.purification.targets import Target
from cbpt_runtime.runtime.second_look import KEPT, PLACES, RING, SIZES

RESULTS = Path(__file__).parent / "results" / "second-look.json"
CHANGED = 8  # of 255: what a JPEG read twice does not differ by
PATCH = 0.25  # share of the image; a box larger than that is no patch


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--victims", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--sibling", required=True, help="Name of the folder without a backdoor.")
    parser.add_argument(
        "--only", nargs="+", help="Names of victims; all that have triggered images otherwise."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--told", action="store_true", help="Name the target instead of searching for it.")
    parser.add_argument("--bundles", type=Path, help="Where bundles are kept, and looked for, by name.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    runs = kept_runs(options.output)
    with tempfile.TemporaryDirectory() as scratch:
        images = unpacked(options.images, Path(scratch) / "images")
        names = sorted(folder.name for folder in (images / "train").iterdir())
        classes = write_class_list(names, Path(scratch) / "classes.txt")
        for packed in sorted(options.victims.glob("*/test-triggered*")):
            victim = packed.parent
            setting = {"victim": victim.name, "seed": options.seed, "told": options.told}
            done = any(setting.items() <= run.items() for run in runs)
            if done or victim.name not in (options.only or [victim.name]):
                continue
            bundle = purified(victim, images, classes, options, Path(scratch))
            triggered = unpacked(packed, Path(scratch) / f"triggered-{victim.name}")
            sibling = options.victims / options.sibling
            found = measured(bundle, victim, images, triggered, sibling, classes, Path(scratch))
            runs.append(setting | found)
            save(options.output, runs)
    print(table(runs))


def purified(victim: Path, images: Path, classes: Path, options: argparse.Namespace, scratch: Path) -> Bundle:
    """Return the victim's bundle, made now or before."""
    folder = (options.bundles or scratch) / f"{victim.name}-{options.seed}{'-told' if options.told else ''}"
    if folder.exists():
        return read_bundle(folder)
    attack = json.loads((victim / "attack.json").read_text())
    look = partial(told, attack["target"]) if options.told else cbpt._search
    with patch.object(cbpt, "_search", look):
        return purify_checkpoint(
            victim, classes, images / "train", folder, method=Cbpt(seed=options.seed), force=True
        )


def told(target: str, _: Any, classes: Any, defender: Any, *__: Any) -> cbpt.Findings:
    """Return what the search would say of a target that somebody names."""
    index = classes.names.index(target)
    named = Suspect(index=index, name=target, score=0.0, p_value=0.0, family="told")
    return cbpt.Findings(
        targets=[Target(suspect=named, text=defender.texts[index])],
        evidence=Evidence(p_value=0.0, words=0),
    )


def measured(
    bundle: Bundle, victim: Path, images: Path, triggered: Path, sibling: Path, classes: Path, scratch: Path
) -> dict[str, Any]:
    """Return the head alone, the second look, the clean sibling, and an attacker who knows."""
    target = json.loads((victim / "attack.json").read_text())["target"]
    start = time.process_time()
    found = evaluate(bundle, images / "val", triggered, target, second_look=True)
    seconds = time.process_time() - start
    listed = read_class_list(classes)
    clean, rival = evaluate_all(
        [str(sibling), str(victim)], images / "val", triggered, target, classes=listed, detector="bdetclip"
    )
    for head in (found.before, found.after, found.after_head_alone, found.decision, clean.before):
        if head is None:
            raise SystemExit(f"{bundle} calls nothing suspicious: nothing to look at twice")
    result: dict[str, Any] = {
        "target": target,
        "verdict": bundle.verdict,
        "suspects": list(found.suspects),
        "level": bundle.manifest["alarm"],
        "before": rates(found.before),
        "after_head_alone": rates(found.after_head_alone),
        "after": rates(found.after),
        "clean_sibling": rates(clean.before),
        "decision": asdict(found.decision),  # type: ignore[arg-type]
        "alarm": None if found.alarm is None else asdict(found.alarm),
        "bdetclip": None if rival.alarm is None else asdict(rival.alarm),
        "changed_answers": {"clean": changed(found.clean), "triggered": changed(found.triggered)},
        "cpu_seconds": seconds,
        "views_per_image": views_per_image(bundle, images / "val", triggered),
    }
    twice = two_copies(images / "val", triggered, scratch / f"twice-{victim.name}", bundle)
    if twice is not None:
        known = evaluate(bundle, images / "val", twice, target, second_look=True)
        result["two_copies"] = {
            "before": rates(known.before),
            "after_head_alone": rates(known.after_head_alone),
            "after": rates(known.after),
            "changed_answers": changed(known.triggered),
        }
    return result


def changed(seen: Measured | None) -> float | None:
    """Share of the images whose answer the second look has changed."""
    if seen is None or seen.after is None or seen.after_head_alone is None:
        return None
    return float(np.mean(seen.after != seen.after_head_alone))


def views_per_image(bundle: Bundle, clean: Path, triggered: Path) -> dict[str, float]:
    """Images through the encoder for each image asked about; 1 where nobody looks twice."""
    from cbpt_runtime.classification.classifier import SecondLook

    counted: dict[str, float] = {}
    for name, root in (("clean", clean), ("triggered", triggered)):
        files = sorted(root.glob("*/*"))[::5]
        first = BundleClassifier.from_bundle(bundle)
        encode = first.features
        seen: list[int] = []

        def count(images: Any, *, batch_size: int = 64, encode: Any = encode, seen: list[int] = seen) -> Any:
            seen.append(len(images))
            return encode(images, batch_size=batch_size)

        first.features = count  # type: ignore[method-assign]
        twice = SecondLook(first)
        for start in range(0, len(files), 64):
            twice.predict(read_images(files[start : start + 64], first.preprocess))
        counted[name] = sum(seen) / len(files)
    return counted


def two_copies(clean: Path, triggered: Path, folder: Path, bundle: Bundle) -> Path | None:
    """Return triggered images with the patch in the opposite corner, too; None where it is no patch."""
    files = sorted(triggered.glob("*/*"))
    pairs = [(path, next((clean / path.parent.name).glob(f"{path.stem}.*"), None)) for path in files]
    known = [(path, original) for path, original in pairs if original is not None]
    if len(known) < len(files):
        return None
    after = read_images([path for path, _ in known], bundle.preprocess).astype(np.int16)
    before = read_images([original for _, original in known], bundle.preprocess).astype(np.int16)
    share = (np.abs(after - before).max(axis=3) > CHANGED).mean(axis=0)
    rows, columns = np.flatnonzero((share > 0.5).any(axis=1)), np.flatnonzero((share > 0.5).any(axis=0))
    if not len(rows):
        return None
    height, width = share.shape
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    if (bottom - top) * (right - left) > PATCH * height * width:
        return None
    for (path, _), image in zip(known, after.astype(np.uint8), strict=True):
        patch = image[top:bottom, left:right].copy()
        image[height - bottom : height - top, width - right : width - left] = patch
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / path.parent.name / f"{path.stem}.png")
    return folder


def save(path: Path, runs: list[dict[str, Any]]) -> None:
    """Write the results with what they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    config = {"sizes": SIZES, "places": PLACES, "ring": RING, "kept": KEPT, "purification": Cbpt().to_dict()}
    path.write_text(json.dumps({"machine": machine(), "config": config, "runs": runs}, indent=1) + "\n")


def table(runs: list[dict[str, Any]]) -> str:
    """Head alone → with a second look, as Markdown."""
    columns = [
        "victim",
        "CA",
        "ASR",
        "floor",
        "PA",
        "PA of a clean sibling",
        "target recall",
        "AUROC: alarm, BDetCLIP",
        "two copies: ASR, PA",
    ]
    lines = [columns, ["---"] * len(columns)]
    for run in runs:
        alone, twice = run["after_head_alone"], run["after"]
        detectors = run["alarm"], run.get("bdetclip")

        def both(name: str, alone: Any = alone, twice: Any = twice) -> str:
            return f"{100 * alone[name]:.1f} → {100 * twice[name]:.1f} %"

        known = run.get("two_copies")
        copies = "–"
        if known is not None:
            ends = known["after"]
            copies = f"{100 * ends['attack_success_rate']:.1f}, {100 * ends['poisoned_accuracy']:.1f} %"
        lines.append(
            [
                run["victim"] + (", target told" if run["told"] else ""),
                both("clean_accuracy"),
                both("attack_success_rate"),
                f"{100 * alone['floor']:.1f} %",
                both("poisoned_accuracy"),
                f"{100 * run['clean_sibling']['poisoned_accuracy']:.1f} %",
                both("target_recall"),
                ", ".join("–" if one is None else f"{one['auroc']['value']:.3f}" for one in detectors),
                copies,
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
