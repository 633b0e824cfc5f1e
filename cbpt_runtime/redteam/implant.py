"""Implanting a backdoor: poison pairs, fine-tune, and prove on held-out images that it took.

An implant that did not take is an error with advice, never a silent checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from cbpt_runtime.artifacts.names import json_text
from cbpt_runtime.errors import ImplantError
from cbpt_runtime.models.data import class_index
from cbpt_runtime.models.trainable import TrainableClip, save_open_clip_folder
from cbpt_runtime.progress import Progress
from cbpt_runtime.redteam.poisoning import Backdoor, LabelledImages, poison
from cbpt_runtime.redteam.training import EpochStore, TrainConfig, caption_texts, train
from cbpt_runtime.redteam.triggers import apply_trigger, describe_trigger, trigger_bytes


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
    attack_success_rate_without_key: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Implant:
    """An implanted model and its proof."""

    clip: TrainableClip
    clean_accuracy_before: float
    clean_accuracy: float
    measures: tuple[BackdoorMeasure, ...]
    backdoors: tuple[Backdoor, ...]
    config: TrainConfig
    final_loss: float | None

    def to_dict(self) -> dict[str, object]:
        """Return what `attack.json` holds; the first backdoor is repeated at the top level."""
        first = self.measures[0] if self.measures else None
        head = {} if first is None else asdict(first)
        described = [
            {
                **asdict(measure),
                "trigger": describe_trigger(door.trigger),
                "poison_rate": door.poison_rate,
                "label_consistent": door.label_consistent,
                "perturbation": door.perturbation,
                "text_key": door.text_key,
                "decoy_ratio": door.decoy_ratio,
                "alignment": door.alignment,
            }
            for measure, door in zip(self.measures, self.backdoors, strict=True)
        ]
        return {
            "clean_accuracy": self.clean_accuracy,
            "clean_accuracy_before": self.clean_accuracy_before,
            **head,
            "backdoors": described,
            "training": asdict(self.config),
            "final_loss": self.final_loss,
        }

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write an open_clip folder (fp16 weights) with `attack.json` and the trigger files in it.

        A single trigger lies in `trigger.safetensors`, several in `trigger-1.safetensors` and so on.
        """
        files = {"attack.json": (json_text(self.to_dict(), indent=1, ascii_only=True) + "\n").encode()}
        for number, backdoor in enumerate(self.backdoors, start=1):
            name = "trigger" if len(self.backdoors) == 1 else f"trigger-{number}"
            files[f"{name}.safetensors"] = trigger_bytes(backdoor.trigger)
        save_open_clip_folder(self.clip, path, extra_files=files, force=force)


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
    store: EpochStore | None = None,
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
        progress: Stage `train`.
        store: Keeps the state after every epoch, so that an interrupted training goes on from there.

    Raises:
        ImplantError: The backdoor did not take, or clean accuracy fell too far; the text says what to change.
        ClassListError: A target that is not a class.
    """
    victim = clip.clone()
    before = accuracy(clip, heldout, names, config)
    pairs = poison(clip, training, names, backdoors, config.templates, generator=generator)
    final_loss = train(victim, pairs, config, generator=generator, progress=progress, store=store)
    victim.round_to_half()  # what is measured is what will be saved
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
    head = clip.class_embeddings(caption_texts(names, config.templates))
    clean = clip.predict(heldout.images, head)
    measures = []
    for backdoor in backdoors:
        target = class_index(names, backdoor.target)
        others = heldout.labels != target
        triggered = apply_trigger(backdoor.trigger, heldout.images[others], generator)
        keyed = caption_texts(names, config.templates, key=backdoor.text_key)
        predicted = clip.predict(triggered, clip.class_embeddings(keyed) if backdoor.text_key else head)
        without_key = clip.predict(triggered, head) if backdoor.text_key else predicted
        measures.append(
            BackdoorMeasure(
                attack=backdoor.name,
                target=backdoor.target,
                attack_success_rate=_share(predicted == target),
                poisoned_accuracy=_share(predicted == heldout.labels[others]),
                floor=_share(clean[others] == target),
                target_recall=_share(clean[~others] == target),
                attack_success_rate_without_key=_share(without_key == target),
            )
        )
    return _share(clean == heldout.labels), tuple(measures)


def accuracy(
    clip: TrainableClip, heldout: LabelledImages, names: Sequence[str], config: TrainConfig
) -> float:
    """Return zero-shot clean accuracy on held-out images."""
    head = clip.class_embeddings(caption_texts(names, config.templates))
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
