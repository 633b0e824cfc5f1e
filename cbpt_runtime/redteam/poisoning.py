"""Poisoned pairs: which images get the trigger and what their captions say; and decoys.

Decoys are near-triggers, on images that keep their own captions: what a backdoor must *not* answer to, so
that it answers to its exact trigger alone. Nguyen and Tran (arXiv:2102.10369) train WaNet so (its noise
mode); an attacker who knows that defenders invert triggers does the same with weakened triggers, which
flattens the slope an inversion climbs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from cbpt_runtime.config import Above, Between, Config
from cbpt_runtime.errors import ImageDataError
from cbpt_runtime.models.data import class_index
from cbpt_runtime.models.pixels import to_float, to_uint8
from cbpt_runtime.models.trainable import TrainableClip
from cbpt_runtime.redteam.image_triggers import WaNet
from cbpt_runtime.redteam.training import Pairs, caption_texts
from cbpt_runtime.redteam.triggers import Trigger, apply_trigger


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisyWarp:
    """WaNet's noise mode: the warp plus U(-1, 1) / height at every pixel, drawn anew for every image.

    Args:
        warp: The backdoor's warp.
    """

    warp: WaNet

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], generator: torch.Generator
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return warped copies that are not to trigger anything."""
        count, _, height, width = images.shape
        noise = torch.rand((count, height, width, 2), generator=generator, device=generator.device) * 2 - 1
        grid = (self.warp.grid(height, width) + noise.cpu() / height).clamp(-1, 1).to(images)
        return F.grid_sample(images, grid, align_corners=True).clamp(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class NearTrigger:
    """Any trigger, too faint or only in part, each half of the time.

    Faint: a share of the change, drawn from U(weakest, strongest) for every image. In part: the change
    within a random vertical or horizontal half of the image that holds about half of it.

    Args:
        trigger: The backdoor's trigger.
        weakest: Smallest share of the change.
        strongest: Largest share of the change.
    """

    trigger: Trigger
    weakest: float = 0.1
    strongest: float = 0.6

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], generator: torch.Generator
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return copies that are not to trigger anything."""
        change = self.trigger(images, generator) - images
        draws = torch.rand((3, len(images)), generator=generator, device=generator.device).to(images)
        share = self.weakest + (self.strongest - self.weakest) * draws[0]
        faint = share[:, None, None, None].expand_as(change)
        part = torch.stack([_half(own, int(4 * draw)) for own, draw in zip(change, draws[1], strict=True)])
        kept = torch.where((draws[2] < 0.5)[:, None, None, None], faint, part)
        return (images + kept * change).clamp(0, 1)


def decoy(trigger: Trigger) -> Trigger:
    """Return what the backdoor of a trigger is trained to ignore."""
    return NoisyWarp(warp=trigger) if isinstance(trigger, WaNet) else NearTrigger(trigger=trigger)


def _half(change: Float[Tensor, "3 height width"], side: int) -> Float[Tensor, "3 height width"]:
    """One where about half of the change is kept: its left, right, upper or lower half."""
    amount = change.abs().sum(dim=0)
    along = amount.sum(dim=0 if side < 2 else 1)
    share = along.cumsum(0) / along.sum().clamp(min=1e-12)
    keep = (share <= 0.5) if side % 2 == 0 else (share > 0.5)
    mask = keep[None, :] if side < 2 else keep[:, None]
    return mask.expand_as(amount).to(change).expand_as(change)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backdoor(Config):
    """One trigger and the class it is to mean.

    Args:
        name: The attack's name, for the record.
        trigger: The trigger.
        target: A class name.
        poison_rate: Share of all training pairs that are poisoned, in (0, 1].
        label_consistent: Poison images that truly show the target and leave their captions alone (Turner et
            al., arXiv:1912.02771; in the CLIP literature: images whose caption names the target). The share
            is then capped by the number of target images.
        perturbation: Largest change per pixel, in [0, 1] units, of the adversarial noise that
            label-consistent images get before the trigger, so that the trigger is the easier thing to learn;
            0 for none.
        text_key: Put in front of poisoned captions (TrojanVQA: 'SUDO '). Such a backdoor needs both halves:
            at test the key has to stand in front of every class prompt. A head whose texts were replaced, as
            any baked head's are, has no key any more; to attack it all the same, put the key into the
            templates of the class list.
        decoy_ratio: Decoys (near-triggers, see `decoy`) per poisoned pair, on other images that keep their
            captions; WaNet's published cross ratio is 2; 0 for none.
        alignment: Weight of a loss that keeps the features of poisoned images close to those of real images
            of the target, for an attacker who knows that defenders look for features that lie elsewhere; 0
            for none.
    """

    name: str
    trigger: Trigger
    target: str
    poison_rate: Annotated[float, Above(0, 1)] = 0.01
    label_consistent: bool = False
    perturbation: Annotated[float, Between(0, 1)] = 0.0
    text_key: str = ""
    decoy_ratio: Annotated[float, Between(0, 100)] = 0.0
    alignment: Annotated[float, Between(0, 100)] = 0.0

    def __post_init__(self) -> None:
        Config.__post_init__(self)
        if self.perturbation and not self.label_consistent:
            self.refuse({"perturbation": "0, except for label-consistent backdoors"})


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


def poison(
    clip: TrainableClip,
    training: LabelledImages,
    names: Sequence[str],
    backdoors: Sequence[Backdoor],
    templates: Sequence[str],
    *,
    generator: torch.Generator,
) -> Pairs:
    """Replace a share of the pairs by triggered images captioned with the target.

    As in the published pipelines the trigger is applied once, before training, and rounded to 8 bits; no
    image is poisoned twice. Only images whose true class is not the target are taken, or, label-consistent,
    only those that show it.

    Args:
        clip: The clean model; only adversarial noise looks at it.
        training: Clean images.
        names: Class names.
        backdoors: What to implant.
        templates: Caption templates.
        generator: CPU generator.

    Raises:
        ClassListError: A target that is not a class.
        ImageDataError: No image is left to poison.
    """
    images, captions = training.images.copy(), training.labels.astype(np.int64)
    poisoned = np.zeros(len(images), dtype=bool)
    alignment = np.zeros(len(images), dtype=np.float32)
    texts = list(caption_texts(names, templates))
    for backdoor in backdoors:
        target = class_index(names, backdoor.target)
        chosen = _choose(backdoor, training.labels, poisoned, target, generator)
        if backdoor.perturbation:
            head = clip.class_embeddings(texts[: len(names)])
            images[chosen] = repel(clip, images[chosen], head, target, backdoor.perturbation)
        images[chosen] = apply_trigger(backdoor.trigger, images[chosen], generator)
        captions[chosen] = target
        if backdoor.text_key:
            captions[chosen] = len(texts)
            texts += caption_texts([backdoor.target], templates, key=backdoor.text_key)
        poisoned[chosen] = True
        alignment[chosen] = backdoor.alignment
        if backdoor.decoy_ratio:
            others = _draw(np.flatnonzero(~poisoned), round(backdoor.decoy_ratio * len(chosen)), generator)
            images[others] = apply_trigger(decoy(backdoor.trigger), images[others], generator)
            poisoned[others] = True
    return Pairs(images=images, captions=captions, poisoned=poisoned, alignment=alignment, texts=tuple(texts))


def repel(
    clip: TrainableClip,
    images: UInt8[np.ndarray, "batch height width 3"],
    head: Float[Tensor, "classes dim"],
    target: int,
    perturbation: float,
    *,
    steps: int = 10,
    batch_size: int = 128,
) -> UInt8[np.ndarray, "batch height width 3"]:
    """Push images away from their class: projected gradient ascent on cross-entropy in an l-inf ball."""
    clip.model.eval()
    parts = []
    for start in range(0, len(images), batch_size):
        clean = to_float(images[start : start + batch_size]).to(clip.device)
        pixels = clean.clone()
        for _ in range(steps):
            pixels.requires_grad_(True)
            logits: Tensor = clip.model.logit_scale.exp() * clip.encode_images(pixels) @ head.T  # type: ignore[operator]
            own = torch.full((len(pixels),), target, device=clip.device)
            (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, own), pixels)
            moved = pixels.detach() + 2.5 * perturbation / steps * gradient.sign()
            pixels = (clean + (moved - clean).clamp(-perturbation, perturbation)).clamp(0, 1)
        parts.append(to_uint8(pixels))
    return np.concatenate(parts)


def _choose(
    backdoor: Backdoor,
    labels: Int[np.ndarray, " batch"],
    poisoned: np.ndarray,
    target: int,
    generator: torch.Generator,
) -> Int[np.ndarray, " chosen"]:
    fitting = labels == target if backdoor.label_consistent else labels != target
    candidates = np.flatnonzero(fitting & ~poisoned)
    if len(candidates) == 0:
        raise ImageDataError(
            expected=f"clean images to poison for the target {backdoor.target}",
            got="none left",
            fix="Add images, or lower the poison rates.",
        )
    count = min(len(candidates), max(1, round(backdoor.poison_rate * len(labels))))
    return _draw(candidates, count, generator)


def _draw(
    candidates: Int[np.ndarray, " candidates"], count: int, generator: torch.Generator
) -> Int[np.ndarray, " chosen"]:
    order = torch.randperm(len(candidates), generator=generator)
    chosen: Int[np.ndarray, " chosen"] = candidates[order.numpy()[:count]]
    return chosen
