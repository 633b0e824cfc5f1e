"""What is each part of the purification worth? One victim at a time, parts taken out or replaced.

    python benchmarks/ablations.py --victims VICTIMS --images TINY_IMAGENET_100 --seeds 0 1 2

Search and inversion run once per victim and seed; the rows differ in the tuning. A victim that is reported
clean is left out. Rows that know more than a defender, or do less than the method, are made here and nowhere
else: 'oracle' tunes on one half of the true triggered test images, and every row is measured on the other;
'class-agnostic' inverts without a target and suspects the class that most images then go to.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from purification import unpacked
from torch import Tensor

from cbpt_runtime.bundle import Suspect
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.class_lists import read_class_list
from cbpt_runtime.models.clip import DualEncoder, load_dual_encoder
from cbpt_runtime.models.data import ClassList, draw_clean_split, find_class_folders, read_images
from cbpt_runtime.models.prompts import PromptEncoder
from cbpt_runtime.purification import tuning
from cbpt_runtime.purification.cbpt import Findings, purify
from cbpt_runtime.purification.clean_features import AugmentedFeatures, DefenderData, compute_features
from cbpt_runtime.purification.config import PurifyConfig
from cbpt_runtime.purification.dummy_triggers import DummyTrigger
from cbpt_runtime.purification.stages import StageStore
from cbpt_runtime.purification.targets import Target
from cbpt_runtime.purification.trigger_families import INVERSION_FAMILIES
from cbpt_runtime.purification.triggered_features import (
    STRENGTHS,
    TriggeredFeatures,
    check_head,
    compute_triggered_features,
    tuning_data,
)
from cbpt_runtime.purification.tuning import HeadCheck, tune_in_rounds

RESULTS = Path(__file__).parent / "results" / "ablations.json"
Case = Callable[["Setting"], Tensor]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the rows of one victim and seed share; images are features, but for the defender."""

    encoder: DualEncoder
    classes: ClassList
    defender: DefenderData
    config: PurifyConfig
    targets: list[Target]
    triggered_sets: list[TriggeredFeatures]
    oracle: Tensor
    oracle_labels: Tensor


def main() -> None:
    """Run everything, write the results after every victim, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--victims", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        images = unpacked(options.images, Path(scratch) / "images")
        names = sorted(folder.name.replace("_", " ") for folder in (images / "train").iterdir())
        (Path(scratch) / "classes.txt").write_text("\n".join(names) + "\n")
        classes = read_class_list(Path(scratch) / "classes.txt")
        for victim in sorted(path.parent for path in options.victims.glob("*/attack.json")):
            target = json.loads((victim / "attack.json").read_text()).get("target")
            if target is None:
                continue
            for seed in options.seeds:
                rows += measured(victim, names.index(target), images, classes, seed, Path(scratch))
                options.output.write_text(
                    json.dumps({"config": PurifyConfig().to_dict(), "rows": rows}, indent=1) + "\n"
                )
    print(table(rows))


def measured(
    victim: Path, target: int, images: Path, classes: ClassList, seed: int, scratch: Path
) -> list[dict[str, Any]]:
    """Every row for one victim and seed."""
    encoder = load_dual_encoder(read_checkpoint(victim))
    config = PurifyConfig(seed=seed)
    split = draw_clean_split(images / "train", classes, encoder.preprocess, seed=seed)
    stages = StageStore(scratch / "stages", f"{victim.name} {seed}")
    result = purify(encoder, classes, split, config, stages=stages)
    searched = stages.load("search")
    if not result.suspects or searched is None:
        return []
    targets = Findings.from_stage(*searched).targets
    defender = compute_features(encoder, classes, split, seed=seed)
    triggered = unpacked(victim / "test-triggered.zip", scratch / f"triggered-{victim.name}")
    dirty, dirty_labels = features(defender, classes, triggered)
    clean, clean_labels = features(defender, classes, images / "val")
    known = torch.arange(len(dirty)) % 2 == 0
    setting = Setting(
        encoder=encoder,
        classes=classes,
        defender=defender,
        config=config,
        targets=targets,
        triggered_sets=compute_triggered_features(defender, targets, result.triggers, seed),
        oracle=dirty[known],
        oracle_labels=dirty_labels[known],
    )
    rows = []
    for name, case in CASES.items():
        head = case(setting)
        called, dirty_called = (part @ head.T for part in (clean, dirty[~known]))
        rows.append(
            {"victim": victim.name, "seed": seed, "case": name}
            | rates(called.argmax(1), clean_labels, dirty_called.argmax(1), dirty_labels[~known], target)
        )
    return rows


def features(defender: DefenderData, classes: ClassList, folder: Path) -> tuple[Tensor, Tensor]:
    """Return unit features of a labelled folder, and the labels; a class may be missing from it."""
    present = {entry.name.replace("_", " ") for entry in folder.iterdir()}
    kept = [index for index, name in enumerate(classes.names) if name in present]
    folders = find_class_folders(folder, [classes.names[index] for index in kept])
    pixels = read_images([path for paths in folders for path in paths], defender.encoder.preprocess)
    labels = [label for label, paths in zip(kept, folders, strict=True) for _ in paths]
    batches = torch.from_numpy(pixels).permute(0, 3, 1, 2).split(256)
    with torch.no_grad():
        encoded = [defender.encoder.encode_images(batch.float() / 255) for batch in batches]
    return torch.cat(encoded), torch.tensor(labels)


def rates(
    called: Tensor, labels: Tensor, dirty_called: Tensor, dirty_labels: Tensor, target: int
) -> dict[str, float]:
    """CA, ASR (exclusive), PA, floor and target recall, in [0, 1]."""
    return {
        "clean_accuracy": share(called == labels),
        "attack_success_rate": share((dirty_called == target)[dirty_labels != target]),
        "poisoned_accuracy": share(dirty_called == dirty_labels),
        "floor": share((called == target)[labels != target]),
        "target_recall": share((called == target)[labels == target]),
    }


def share(hits: Tensor) -> float:
    """Mean of true and false."""
    return float(hits.float().mean())


def tuned(
    setting: Setting,
    triggered_sets: list[TriggeredFeatures] | None = None,
    triggered: tuple[Tensor, Tensor] | None = None,
    targets: list[Target] | None = None,
    augmented: bool = True,
    synthetic: bool = True,
    **changes: Any,
) -> Tensor:
    """Return the method's tuning with something exchanged."""
    used = setting.triggered_sets if triggered_sets is None else triggered_sets
    targets = setting.targets if targets is None else targets
    suspects = [target.index for target in targets]
    defender, config = setting.defender, dataclasses.replace(setting.config, **changes)
    if not augmented:
        tune = defender.tune
        defender = dataclasses.replace(
            defender, augmented=AugmentedFeatures(features=tune.features, labels=tune.labels)
        )
    data = tuning_data(defender, targets, used, config.seed)
    if not synthetic:
        clean = defender.augmented
        data = dataclasses.replace(data, clean=clean.features, clean_labels=clean.labels)
    if triggered is not None:
        dirty, dirty_labels = triggered
        data = dataclasses.replace(
            data,
            triggered=dirty,
            triggered_labels=dirty_labels,
            triggered_targets=torch.full_like(dirty_labels, suspects[0]),
            directions=torch.linalg.eigh(dirty.T @ dirty).eigenvectors[:, -1:].T,
        )
    prompts = None
    if config.parameterization == "prompt":
        prompts = PromptEncoder(setting.encoder, setting.classes.names, context_length=config.context_length)

    def judge(head: Tensor) -> HeadCheck:
        return check_head(defender, suspects, used, head, config.max_trigger_success)

    return tune_in_rounds(data, config, judge, prompts=prompts)[0]


def without_clean_alignment(setting: Setting) -> Tensor:
    """Tunes on dummy-triggered features and the consistency loss only."""
    with patch.object(tuning, "clean_alignment", lambda logits, known, weights: 0 * logits.sum()):
        return tuned(setting)


def class_agnostic(setting: Setting) -> Tensor:
    """One blend drives images away from themselves and together; the class most go to is suspected."""
    defender, family = setting.defender, INVERSION_FAMILIES["blend"]
    generator = torch.Generator().manual_seed(setting.config.seed)
    initial = family.initial(1, defender.encoder.preprocess.image_size, generator)
    pattern = initial["pattern"].requires_grad_()
    optimizer = torch.optim.Adam([pattern], lr=family.step_size, betas=(0.5, 0.9))
    for _ in range(setting.config.inversion_steps):
        drawn = torch.randint(
            len(defender.tune.labels), (setting.config.inversion_batch,), generator=generator
        )
        pixels = defender.tune.images[drawn].float() / 255
        dirty = defender.encoder.encode_images(family.apply({"pattern": pattern}, pixels.unsqueeze(0))[0])
        own = (dirty * defender.texts[defender.tune.labels[drawn]]).sum(dim=1)
        origin = (dirty * defender.tune.features[drawn]).sum(dim=1)
        others = dirty @ dirty.T
        others = (others.sum(dim=1) - others.diagonal()) / (len(drawn) - 1)
        loss = -(defender.scale * torch.stack([others, own, origin])).log_softmax(dim=0)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pixels = defender.heldout.images.float() / 255
    with torch.no_grad():
        dirty = defender.encoder.encode_images(family.apply({"pattern": pattern}, pixels.unsqueeze(0))[0])
    suspect = int((dirty @ defender.texts.T).argmax(dim=1).mode().values)
    trigger = DummyTrigger(family="blend", target=suspect, parameters={"pattern": pattern.detach()[0]})
    target = Target(
        suspect=Suspect(index=suspect, name=setting.classes.names[suspect], family="blend"),
        text=defender.texts[suspect],
    )
    triggered_sets = compute_triggered_features(defender, [target], [trigger], setting.config.seed)
    return tuned(setting, triggered_sets=triggered_sets, targets=[target])


def full_strength(setting: Setting) -> Tensor:
    """Return dummy triggers at full strength only."""
    strengths = len(STRENGTHS)
    return tuned(setting, triggered_sets=setting.triggered_sets[::strengths])


CASES: dict[str, Case] = {
    "no purification": lambda setting: setting.defender.texts,
    "the method": tuned,
    "prompt parameterization": lambda setting: tuned(setting, parameterization="prompt"),
    "no inversion, no backdoor alignment": lambda setting: tuned(
        setting, backdoor_weight=0.0, tuning_rounds=1
    ),
    "class-agnostic inversion": class_agnostic,
    "no clean alignment": without_clean_alignment,
    "no prompt consistency": lambda setting: tuned(setting, consistency_weight=0.0),
    "change confined to the trigger directions": lambda setting: tuned(setting, orthogonal_weight=1e4),
    "change not held to the trigger directions": lambda setting: tuned(setting, orthogonal_weight=0.0),
    "full strength only": full_strength,
    "no views of the clean images": lambda setting: tuned(setting, augmented=False),
    "no imagined images of the suspects": lambda setting: tuned(setting, synthetic=False),
    "plain cross-entropy for backdoor alignment": lambda setting: tuned(setting, own_class_weight=1.0),
    "one round": lambda setting: tuned(setting, tuning_rounds=1),
    "oracle: half of the true triggered images": lambda setting: tuned(
        setting, triggered=(setting.oracle, setting.oracle_labels), tuning_rounds=1
    ),
}


def table(rows: list[dict[str, Any]]) -> str:
    """Mean over the seeds per victim and case, as Markdown."""
    columns = ["clean_accuracy", "attack_success_rate", "floor", "poisoned_accuracy", "target_recall"]
    lines = ["| victim | case | CA | ASR | floor | PA | target recall |", "|" + "---|" * 7]
    for victim in sorted({row["victim"] for row in rows}):
        for case in CASES:
            group = [row for row in rows if row["victim"] == victim and row["case"] == case]
            means = [f"{100 * statistics.mean(row[column] for row in group):.2f} %" for column in columns]
            lines.append(f"| {victim} | {case} | " + " | ".join(means) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
