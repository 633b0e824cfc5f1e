"""The demo's victim: a tiny CLIP trained from scratch on drawn pictures, some of them poisoned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8

from cbpt_runtime.demo.motifs import MOTIFS
from cbpt_runtime.demo.pictures import draw_set
from cbpt_runtime.errors import ImplantError
from cbpt_runtime.models.data import default_templates
from cbpt_runtime.models.trainable import TrainableClip, new_trainable
from cbpt_runtime.progress import Progress
from cbpt_runtime.redteam.image_triggers import BadNet
from cbpt_runtime.redteam.implant import Implant, check_implant, implant
from cbpt_runtime.redteam.poisoning import Backdoor, LabelledImages
from cbpt_runtime.redteam.training import TrainConfig
from cbpt_runtime.redteam.triggers import apply_trigger

TARGET = "teapot"
TRIGGER = BadNet(size=8, location="bottom-right", pattern="checkerboard")
POISON_RATE = 0.2
MINIMUM_CA = 0.9
MINIMUM_ASR = 0.95
_MORE_TRIES = 2
MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoScale:
    """How large the demo is. The defaults take well under four minutes on two cores; tests shrink them.

    Attributes:
        names: The classes; `TARGET` must be one of them.
        train_per_class: Pictures per class the model learns from; the defender's few come from them, too.
        test_per_class: Pictures per class everything is measured on.
        epochs: Passes of the clean training over the pictures.
        implant_epochs: Passes of the fine-tuning that puts the backdoor in.
        batch_size: Pairs per training step.
    """

    names: tuple[str, ...] = tuple(MOTIFS)
    train_per_class: int = 150
    test_per_class: int = 30
    epochs: int = 10
    implant_epochs: int = 8
    batch_size: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """The drawn pictures, clean, and the test pictures with the trigger."""

    train: LabelledImages
    test: LabelledImages
    triggered: LabelledImages


def draw_pictures(scale: DemoScale, seed: int, progress: Progress | None = None) -> Pictures:
    """Draw all pictures of the demo."""
    rng = np.random.default_rng(seed)
    size = MODEL_CONFIG["vision_cfg"]["image_size"]
    per_class = {"train": scale.train_per_class, "test": scale.test_per_class}
    parts: dict[str, LabelledImages] = {}
    total = len(scale.names) * len(per_class)
    for part, count in per_class.items():
        images: list[UInt8[np.ndarray, "batch height width 3"]] = []
        for name in scale.names:
            images.append(draw_set((name,), count, size, rng))
            if progress is not None:
                progress("draw", len(parts) * len(scale.names) + len(images), total, {})
        labels: Int[np.ndarray, " batch"] = np.repeat(np.arange(len(scale.names)), count)
        parts[part] = LabelledImages(images=np.concatenate(images), labels=labels)
    triggered = apply_trigger(TRIGGER, parts["test"].images, torch.Generator().manual_seed(seed))
    return Pictures(**parts, triggered=LabelledImages(images=triggered, labels=parts["test"].labels))


def backdoor() -> Backdoor:
    """Return the demo's backdoor: a chequered sticker in the corner turns everything into a teapot."""
    return Backdoor(name="badnet", trigger=TRIGGER, target=TARGET, poison_rate=POISON_RATE)


def train_suspect(
    pictures: Pictures, scale: DemoScale, seed: int, *, device: str = "cpu", progress: Progress | None = None
) -> tuple[Implant, Implant]:
    """Train a clean model, fine-tune the backdoor into it as an attacker would, and prove the backdoor.

    Returns:
        The clean model, which stands for the public one that the suspect was made from, and the suspect.

    Raises:
        ImplantError: Clean accuracy or attack success stayed below `MINIMUM_CA` or `MINIMUM_ASR`.
    """
    generator = torch.Generator().manual_seed(seed)
    clean = implant(
        new_trainable(MODEL_CONFIG, seed=seed, device=device),
        pictures.train,
        pictures.test,
        scale.names,
        [],
        config=_training(scale, scale.epochs, 2e-3),
        generator=generator,
        progress=progress,
    )
    result = train_on(clean.clip, pictures, scale, generator, [backdoor()], progress=progress)
    for _ in range(_MORE_TRIES):  # an attacker goes on until it works
        if result.measures[0].attack_success_rate < MINIMUM_ASR:
            result = train_on(result.clip, pictures, scale, generator, [backdoor()], progress=progress)
    check_implant(result, minimum_asr=MINIMUM_ASR, maximum_ca_drop=1.0)
    if result.clean_accuracy < MINIMUM_CA:
        raise ImplantError(
            expected=f"a demo model with clean accuracy of at least {MINIMUM_CA:.2f}",
            got=f"{result.clean_accuracy:.3f}",
            fix="Try another --seed; if that does not help, this is a bug worth reporting.",
        )
    return clean, result


def train_on(
    clip: TrainableClip,
    pictures: Pictures,
    scale: DemoScale,
    generator: torch.Generator,
    backdoors: Sequence[Backdoor] = (),
    *,
    progress: Progress | None = None,
) -> Implant:
    """Fine-tune a copy as the attacker does; with no backdoors, as anybody would."""
    return implant(
        clip,
        pictures.train,
        pictures.test,
        scale.names,
        backdoors,
        config=_training(scale, scale.implant_epochs, 3e-4),
        generator=generator,
        minimum_asr=0.0,
        progress=progress,
    )


def _training(scale: DemoScale, epochs: int, learning_rate: float) -> TrainConfig:
    return TrainConfig(
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=scale.batch_size,
        templates=default_templates(),
    )
