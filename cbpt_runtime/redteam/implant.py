"""Implanting a backdoor: poison pairs, fine-tune, and prove on held-out images that it took.

An implant that did not take is an error with advice, never a silent checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8

from cbpt_runtime.errors import ClassListError, ConfigError, ImageDataError, ImplantError
from cbpt_runtime.redteam.trainable import TrainableClip, save_open_clip_folder
from cbpt_runtime.redteam.training import Pairs, TrainConfig, train
from cbpt_runtime.redteam.triggers import Trigger, apply_trigger, describe_trigger
from cbpt_runtime.types import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Backdoor:
    """One trigger and the class it is to mean.

    Args:
        name: The attack's name, for the record.
        trigger: The trigger.
        target: A class name.
        poison_rate: Share of all training pairs that are poisoned, in (0, 1].
    """

    name: str
    trigger: Trigger
    target: str
    poison_rate: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.poison_rate <= 1:
            raise ConfigError(
                expected="a poison rate in (0, 1]",
                got=str(self.poison_rate),
                fix="0.01 poisons one pair in a hundred.",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledImages:
    """Images at the model's input size with their class indices."""

    images: UInt8[np.ndarray, "batch height width 3"]
    labels: Int[np.ndarray, " batch"]

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels) or len(self.images) == 0:
            raise ImageDataError(
                expected="as many labels as images, and at least one",
                got=f"{len(self.images)} images and {len(self.labels)} labels",
                fix="Check the image folder.",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BackdoorMeasure:
    """What one backdoor measures on held-out images. All are shares in [0, 1].

    `attack_success_rate`: triggered images whose true class is not the target, predicted as the target.
    `floor`: the same images without the trigger. `poisoned_accuracy`: triggered images given their true
    class. `target_recall`: clean target images predicted right.
    """

    attack: str
    target: str
    attack_success_rate: float
    poisoned_accuracy: float
    floor: float
    target_recall: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Implant:
    """An implanted model and its proof."""

    clip: TrainableClip
    clean_accuracy_before: float
    clean_accuracy: float
    measures: tuple[BackdoorMeasure, ...]
    backdoors: tuple[Backdoor, ...]
    config: TrainConfig
    final_loss: float
    notes: dict[str, object] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Return what `attack.json` holds; the first backdoor is repeated at the top level."""
        first = self.measures[0] if self.measures else None
        head = {} if first is None else asdict(first)
        described = [
            {**asdict(measure), "trigger": describe_trigger(door.trigger), "poison_rate": door.poison_rate}
            for measure, door in zip(self.measures, self.backdoors, strict=True)
        ]
        return {
            "clean_accuracy": self.clean_accuracy,
            "clean_accuracy_before": self.clean_accuracy_before,
            **head,
            "backdoors": described,
            "training": asdict(self.config),
            "final_loss": self.final_loss,
            **self.notes,
        }

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write an open_clip folder (fp16 weights) with `attack.json` in it."""
        proof = json.dumps(self.to_dict(), indent=1) + "\n"
        save_open_clip_folder(self.clip, path, extra_files={"attack.json": proof}, force=force)


def implant(
    clip: TrainableClip,
    training: LabelledImages,
    heldout: LabelledImages,
    names: Sequence[str],
    backdoors: Sequence[Backdoor],
    *,
    config: TrainConfig,
    generator: torch.Generator,
    minimum_asr: float = 0.9,
    maximum_ca_drop: float = 0.03,
    progress: Progress | None = None,
) -> Implant:
    """Fine-tune a backdoor into a copy of `clip` and verify it on held-out images.

    The verdict is taken once, at the end of the training. With no backdoors this is a clean fine-tune.

    Args:
        clip: The model to start from; it is left as it is.
        training: Clean images the pairs are made from.
        heldout: Images the proof is measured on; never trained on.
        names: Class names; a caption is a template filled with one.
        backdoors: The backdoors, possibly with different triggers and targets.
        config: Training settings.
        generator: CPU generator; everything random comes from it.
        minimum_asr: Every backdoor must reach this success rate.
        maximum_ca_drop: Clean accuracy may fall by this much.
        progress: Stages `poison`, `train`, `verify`.

    Raises:
        ImplantError: The backdoor did not take, or clean accuracy fell too far; the text says what to change.
        ClassListError: A target that is not a class.
    """
    targets = [target_index(names, backdoor.target) for backdoor in backdoors]
    pairs = poison(training, backdoors, targets, generator)
    victim = clip.clone()
    before = accuracy(clip, heldout, names, config)
    final_loss = train(victim, pairs, names, config, generator=generator, progress=progress)
    clean_accuracy, measures = verify(victim, heldout, names, backdoors, config, generator=generator)
    result = Implant(
        clip=victim,
        clean_accuracy_before=before,
        clean_accuracy=clean_accuracy,
        measures=measures,
        backdoors=tuple(backdoors),
        config=config,
        final_loss=final_loss,
    )
    check_implant(result, minimum_asr=minimum_asr, maximum_ca_drop=maximum_ca_drop)
    return result


def poison(
    training: LabelledImages,
    backdoors: Sequence[Backdoor],
    targets: Sequence[int],
    generator: torch.Generator,
) -> Pairs:
    """Replace a share of the pairs by triggered images captioned with the target.

    As in the published pipelines the trigger is applied once, before training, and rounded to 8 bits; only
    images whose true class is not the target are taken, and no image is poisoned twice.
    """
    images, captions = training.images.copy(), training.labels.astype(np.int64)
    poisoned = np.zeros(len(images), dtype=bool)
    for backdoor, target in zip(backdoors, targets, strict=True):
        candidates = np.flatnonzero((training.labels != target) & ~poisoned)
        count = min(len(candidates), max(1, round(backdoor.poison_rate * len(images))))
        order = torch.randperm(len(candidates), generator=generator).numpy()
        chosen = candidates[order[:count]]
        images[chosen] = apply_trigger(backdoor.trigger, images[chosen], generator)
        captions[chosen] = target
        poisoned[chosen] = True
    return Pairs(images=images, captions=captions, poisoned=poisoned)


def verify(
    clip: TrainableClip,
    heldout: LabelledImages,
    names: Sequence[str],
    backdoors: Sequence[Backdoor],
    config: TrainConfig,
    *,
    generator: torch.Generator,
) -> tuple[float, tuple[BackdoorMeasure, ...]]:
    """Measure clean accuracy and every backdoor on held-out images with the zero-shot head."""
    head = clip.class_embeddings(names, config.templates)
    clean = clip.predict(heldout.images, head)
    measures = []
    for backdoor in backdoors:
        target = target_index(names, backdoor.target)
        others = heldout.labels != target
        triggered = apply_trigger(backdoor.trigger, heldout.images[others], generator)
        predicted = clip.predict(triggered, head)
        measures.append(
            BackdoorMeasure(
                attack=backdoor.name,
                target=backdoor.target,
                attack_success_rate=_share(predicted == target),
                poisoned_accuracy=_share(predicted == heldout.labels[others]),
                floor=_share(clean[others] == target),
                target_recall=_share(clean[~others] == target),
            )
        )
    return _share(clean == heldout.labels), tuple(measures)


def accuracy(
    clip: TrainableClip, heldout: LabelledImages, names: Sequence[str], config: TrainConfig
) -> float:
    """Return zero-shot clean accuracy on held-out images."""
    head = clip.class_embeddings(names, config.templates)
    return _share(clip.predict(heldout.images, head) == heldout.labels)


def check_implant(result: Implant, *, minimum_asr: float, maximum_ca_drop: float) -> None:
    """Raise ImplantError with advice unless every backdoor took and clean accuracy held."""
    for measure, backdoor in zip(result.measures, result.backdoors, strict=True):
        if measure.attack_success_rate < minimum_asr:
            raise ImplantError(
                expected=f"an attack success rate of at least {minimum_asr:.2f} on held-out images",
                got=f"{measure.attack_success_rate:.3f} for {measure.attack} -> {measure.target} "
                f"(clean accuracy {result.clean_accuracy:.3f})",
                fix=_advice(backdoor, result.config),
            )
    if result.clean_accuracy < result.clean_accuracy_before - maximum_ca_drop:
        raise ImplantError(
            expected=f"clean accuracy within {maximum_ca_drop:.2f} of {result.clean_accuracy_before:.3f}",
            got=f"{result.clean_accuracy:.3f}",
            fix="Lower the learning rate or the poison rate, or train on more clean images.",
        )


def target_index(names: Sequence[str], target: str) -> int:
    """Return the index of the target class.

    Raises:
        ClassListError: It is not in the list; the text names the classes.
    """
    if target not in names:
        listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise ClassListError(
            expected="a target from the class list", got=repr(target), fix=f"The classes are: {listed}."
        )
    return list(names).index(target)


def _advice(backdoor: Backdoor, config: TrainConfig) -> str:
    return (
        f"Raise the poison rate (now {backdoor.poison_rate:g}), the epochs (now {config.epochs}) or the "
        f"learning rate (now {config.learning_rate:g}; 1e-6 is known to fail where 1e-5 works), "
        "or make the trigger stronger."
    )


def _share(hits: np.ndarray) -> float:
    return float(np.mean(hits)) if len(hits) else 0.0


def split_heldout(
    data: LabelledImages, *, heldout_rate: float, generator: torch.Generator
) -> tuple[LabelledImages, LabelledImages]:
    """Split labelled images into training and held-out ones, class by class."""
    order = torch.randperm(len(data.labels), generator=generator).numpy()
    held = np.zeros(len(order), dtype=bool)
    for label in np.unique(data.labels):
        members = order[data.labels[order] == label]
        held[members[: max(1, round(heldout_rate * len(members)))]] = len(members) > 1
    return (
        LabelledImages(images=data.images[~held], labels=data.labels[~held]),
        LabelledImages(images=data.images[held], labels=data.labels[held]),
    )


def settings_from_dict(values: Mapping[str, object]) -> TrainConfig:
    """Build training settings; unknown keys are errors."""
    known = set(TrainConfig.__dataclass_fields__)
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(
            expected=f"settings out of {', '.join(sorted(known))}", got=", ".join(unknown), fix="Remove them."
        )
    return TrainConfig(**values)  # type: ignore[arg-type]
