"""What does purifying a full-size model cost? Units measured here, times how often the method needs them.

    python benchmarks/full_size.py --towers ViT-B-32 RN50 --classes 100 1000

A search of a full-size tower takes hours on a few cores. So a part of every stage is run, on random weights
and random pictures, whose cost is that of any others, and its time multiplied by how often the stage does it;
the JSON has both. Every setting runs in a process of its own, with all its pictures and features in memory,
so that its peak is the command's. One suspect is assumed, all four of whose dummy triggers work, and as many
rounds of tuning as there can be: the most that one suspect costs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from purification import machine
from torch import Tensor
from torch.nn.functional import normalize

from cbpt_runtime.config import is_mixed
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import ImageEncoder, load_dual_encoder
from cbpt_runtime.models.faster import faster
from cbpt_runtime.purification.augmentation import N_AUGMENTATIONS
from cbpt_runtime.purification.clean_features import CleanFeatures
from cbpt_runtime.purification.config import PurifyConfig
from cbpt_runtime.purification.inversion import Goals, Inversion, encode_triggered
from cbpt_runtime.purification.search import MEASURED_IMAGES, concepts_kept
from cbpt_runtime.purification.trigger_families import INVERSION_FAMILIES, SEARCH_FAMILIES
from cbpt_runtime.purification.triggered_features import MOST_REHEARSED, STRENGTHS
from cbpt_runtime.purification.tuning import TuningData, tune
from cbpt_runtime.runtime.preprocess import Preprocess

RESULTS = Path(__file__).parent / "results" / "full-size.json"
SHOTS, HELDOUT = 16, 8  # images of each class
WORDS = 1000  # of the background vocabulary
TRIED_CONCEPTS, TRIED_STEPS, TRIED_IMAGES = 8, 2, 64
TRIED_TUNING_STEPS = 2
REPEATS = 3


def main() -> None:
    """Measure every setting in a process of its own, write them down, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--towers", nargs="+", default=["ViT-B-32", "RN50"], help="open_clip's names, or checkpoints"
    )
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    runs = []
    for tower in options.towers:
        for classes in options.classes:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                runs.append(pool.apply(measured, (tower, classes)))
    options.output.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")
    print(table(runs))


def measured(tower: str, classes: int) -> dict[str, Any]:
    """Return the units, how often they are needed, and what that makes."""
    config = PurifyConfig()
    given = tower_of(tower)
    encoder = faster(given)
    tune_images, heldout = random_images(encoder, SHOTS * classes), random_images(encoder, HELDOUT * classes)
    texts = normalize(torch.randn(classes + WORDS, encoder.embed_dim), dim=1)
    counts = image_counts(classes, config)
    forward = median_seconds(lambda: encode_triggered(encoder, torch.clone, heldout.images[:TRIED_IMAGES]))
    unit_seconds = {
        "forward": forward / TRIED_IMAGES,
        "forward_and_backward": inversion_seconds(encoder, tune_images, texts, config),
        "forward_and_backward_as_given": inversion_seconds(given, tune_images, texts, config),
        "tuning_step": tuning_seconds(encoder.embed_dim, classes, config),
    }
    seconds = {
        stage: sum(count * unit_seconds[unit] for unit, count in needed.items())
        for stage, needed in counts.items()
    }
    return {
        "tower": Path(tower).name,
        "image_size": encoder.preprocess.image_size,
        "classes": classes,
        "mixed": is_mixed(config.precision, torch.device("cpu")),
        "unit_seconds": unit_seconds,
        "needed": counts,
        "seconds": seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "config": asdict(config),
    }


def image_counts(classes: int, config: PurifyConfig) -> dict[str, dict[str, int]]:
    """How many images, or steps of the tuning, every stage needs, by kind."""
    tuned, heldout = SHOTS * classes, HELDOUT * classes
    inverted = config.inversion_steps * config.inversion_batch * len(INVERSION_FAMILIES)
    rehearsed = (min(tuned, MOST_REHEARSED) + min(heldout, MOST_REHEARSED)) * len(STRENGTHS)
    searched, followed = 0, concepts_kept(config.search_concepts)
    for family in SEARCH_FAMILIES.values():
        steps = config.search_steps * family.step_multiplier
        searched += config.search_batch * (steps // 2) * (config.search_concepts + followed)
    return {
        "encode": {"forward": tuned * (1 + N_AUGMENTATIONS) + heldout},
        "search": {
            "forward_and_backward": searched,
            "forward": MEASURED_IMAGES * followed * len(SEARCH_FAMILIES),
        },
        "invert": {"forward_and_backward": inverted},
        "rehearse": {"forward": (rehearsed + min(heldout, MOST_REHEARSED)) * len(INVERSION_FAMILIES)},
        "tune": {"tuning_step": config.tuning_steps * config.tuning_rounds},
    }


def tower_of(name: str) -> ImageEncoder:
    """Return the image tower of a checkpoint, or one of open_clip's with random weights."""
    import open_clip

    if Path(name).exists():
        return load_dual_encoder(read_checkpoint(name)).image_encoder
    torch.manual_seed(0)
    settings: dict[str, Any] = open_clip.get_model_config(name)
    side: int = settings["vision_cfg"]["image_size"]
    module: Any = open_clip.create_model(name, pretrained=None)
    return ImageEncoder(module.visual.float(), settings, Preprocess(image_size=(side, side)))


def random_images(encoder: ImageEncoder, count: int) -> CleanFeatures:
    """Return random pictures at the tower's size, all in memory, with features that were not computed."""
    images = torch.randint(0, 256, (count, 3, *encoder.preprocess.image_size), dtype=torch.uint8)
    features = normalize(torch.randn(count, encoder.embed_dim), dim=1)
    return CleanFeatures(images=images, labels=torch.arange(count), features=features)


def inversion_seconds(
    encoder: ImageEncoder, clean: CleanFeatures, texts: Tensor, config: PurifyConfig
) -> float:
    """Seconds an image, forwards and backwards, of a few concepts in the first search family."""
    inversion = Inversion(
        encoder,
        next(iter(SEARCH_FAMILIES.values())),
        Goals.of_classes(texts, list(range(TRIED_CONCEPTS)), 100.0),
        clean,
        batch=config.search_batch,
        seed=0,
        mixed=is_mixed(config.precision, texts.device),
    )
    images = TRIED_CONCEPTS * config.search_batch * TRIED_STEPS
    return median_seconds(lambda: inversion.advance(TRIED_STEPS)) / images


def tuning_seconds(dim: int, classes: int, config: PurifyConfig) -> float:
    """Seconds of a step with all features that one suspect makes."""
    clean = SHOTS * classes * (1 + N_AUGMENTATIONS)
    triggered = min(SHOTS * classes, MOST_REHEARSED) * len(STRENGTHS) * len(INVERSION_FAMILIES)
    data = TuningData(
        reference=normalize(torch.randn(classes, dim), dim=1),
        scale=100.0,
        clean=normalize(torch.randn(clean, dim), dim=1),
        clean_labels=torch.arange(clean) % classes,
        triggered=normalize(torch.randn(triggered, dim), dim=1),
        triggered_labels=1 + torch.arange(triggered) % (classes - 1),
        triggered_targets=torch.zeros(triggered, dtype=torch.long),
        targets=(0,),
        directions=normalize(torch.randn(1, dim), dim=1),
    )

    def step(steps: int) -> float:
        few = PurifyConfig(tuning_steps=steps, seed=config.seed)
        return median_seconds(lambda: tune(data, few, backdoor_weight=2.0, target_weight=5.0))

    return (step(1 + TRIED_TUNING_STEPS) - step(1)) / TRIED_TUNING_STEPS


def median_seconds(work: Callable[[], object]) -> float:
    """Median of a few runs, after one that does not count."""
    work()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def table(runs: list[dict[str, Any]]) -> str:
    """Minutes of every stage, as Markdown."""
    stages = list(runs[0]["seconds"])
    names = ["tower", "classes", "images: forwards", "forwards and backwards", *stages, "all", "peak memory"]
    names += ["forwards and backwards a second: as given, faster"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for run in runs:
        images = [
            sum(needed.get(unit, 0) for needed in run["needed"].values())
            for unit in ("forward", "forward_and_backward")
        ]
        minutes = [run["seconds"][stage] / 60 for stage in stages]
        cells = [run["tower"], str(run["classes"]), *(f"{count:,}" for count in images)]
        cells += [f"{value:.1f} min" for value in (*minutes, sum(minutes))]
        cells.append(f"{run['peak_memory_bytes'] / 2**30:.1f} GiB")
        units = run["unit_seconds"]
        rates = [1 / units[f"forward_and_backward{kind}"] for kind in ("_as_given", "")]
        cells.append(", ".join(f"{rate:.1f}" for rate in rates))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
