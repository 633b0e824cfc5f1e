"""Trigger inversion: dummy triggers that pull any image to a class, for many classes at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cbpt_runtime.losses import contrastive_inversion
from cbpt_runtime.purification.evidence import Clean, Evidence
from cbpt_runtime.triggers import Parameters, TriggerFamily
from cbpt_runtime.types import Progress

_ENCODER_BATCH = 400
_RESISTING = 0.1
_BETAS = (0.5, 0.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What dummy triggers do to held-out images of other classes than their targets.

    Attributes:
        to_text: Mean over images of the cosine to the target's text minus the largest to another text.
        least_to_text: The same for the images that resist: its 10 % quantile over the images.
        to_prototype: As `to_text` with image prototypes in place of texts.
        collapse: Mean cosine between triggered features of different images.
        success: Share of images of other classes that the reference head calls the target.
    """

    to_text: Float[Tensor, " targets"]
    least_to_text: Float[Tensor, " targets"]
    to_prototype: Float[Tensor, " targets"]
    collapse: Float[Tensor, " targets"]
    success: Float[Tensor, " targets"]


def invert(
    evidence: Evidence,
    family: TriggerFamily,
    targets: Sequence[int],
    *,
    steps: int,
    batch: int,
    seed: int,
    mixed: bool = False,
    progress: Progress | None = None,
    stage: str = "inversion",
) -> Parameters:
    """Inverts one trigger per target in one family.

    Args:
        evidence: Encoder, texts, prototypes and clean images.
        family: The space of triggers.
        targets: Class indices.
        steps: Optimiser steps.
        batch: Clean images per step, the same ones for all targets.
        seed: Of initial parameters and batches.
        mixed: Run the encoder in bfloat16 where autocast allows it.
        progress: Told about the steps.
        stage: Its name for the progress.

    Returns:
        One trigger per target, stacked.
    """
    chunk = max(1, _ENCODER_BATCH // batch)
    groups = [list(targets[start : start + chunk]) for start in range(0, len(targets), chunk)]
    done = []
    for index, group in enumerate(groups):
        generator = torch.Generator().manual_seed(seed)
        done.append(_invert_group(evidence, family, group, steps, batch, generator, mixed))
        if progress is not None:
            progress(stage, index + 1, len(groups), {})
    return {name: torch.cat([part[name] for part in done]) for name in done[0]}


def measure(
    evidence: Evidence,
    family: TriggerFamily,
    parameters: Parameters,
    targets: Sequence[int],
    heldout: Clean,
) -> Effect:
    """What stacked triggers do to images that were not used to invert them, of more than one class."""
    measured = [
        _measure(evidence, family, parameters, i, target, heldout) for i, target in enumerate(targets)
    ]
    return Effect(**{name: torch.tensor([one[name] for one in measured]) for name in measured[0]})


def triggered_features(
    evidence: Evidence,
    family: TriggerFamily,
    parameters: Parameters,
    index: int,
    images: Tensor,
    *,
    strength: float = 1.0,
) -> Float[Tensor, "batch dim"]:
    """Unit features of uint8 images under one of the stacked triggers.

    Args:
        evidence: Supplies the encoder.
        family: Of the triggers.
        parameters: Stacked triggers.
        index: Which of them.
        images: uint8 of shape [batch, 3, height, width].
        strength: Share of the way from the clean to the triggered image, in [0, 1].
    """
    one = {name: value[index : index + 1] for name, value in parameters.items()}
    parts = []
    with torch.no_grad():
        for part in images.split(_ENCODER_BATCH):
            pixels = part.float() / 255
            mixed = pixels.lerp(family.apply(one, pixels.unsqueeze(0))[0], strength)
            parts.append(evidence.encoder.encode_images(mixed.contiguous(memory_format=torch.channels_last)))
    return torch.cat(parts)


def _invert_group(
    evidence: Evidence,
    family: TriggerFamily,
    targets: list[int],
    steps: int,
    batch: int,
    generator: torch.Generator,
    mixed: bool,
) -> Parameters:
    device = evidence.texts.device
    target = torch.tensor(targets, device=device)
    initial = family.initial(len(targets), evidence.encoder.preprocess.image_size, generator)
    parameters = {name: value.to(device).requires_grad_() for name, value in initial.items()}
    optimizer = torch.optim.Adam(parameters.values(), lr=family.step_size, betas=_BETAS)
    for _ in range(steps):
        drawn = torch.randint(len(evidence.tune.labels), (batch,), generator=generator).to(device)
        pixels = (evidence.tune.images[drawn].float() / 255).expand(len(targets), batch, -1, -1, -1)
        triggered = family.apply(parameters, pixels).flatten(0, 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            features = evidence.encoder.encode_images(triggered.contiguous(memory_format=torch.channels_last))
        loss = contrastive_inversion(
            features.float().view(len(targets), batch, -1),
            evidence.tune.features[drawn],
            evidence.texts,
            target,
            evidence.scale,
        )
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        with torch.no_grad():
            for name, value in family.project(parameters).items():
                parameters[name].copy_(value)
    return {name: value.detach() for name, value in parameters.items()}


def _measure(
    evidence: Evidence,
    family: TriggerFamily,
    parameters: Parameters,
    index: int,
    target: int,
    heldout: Clean,
) -> dict[str, float]:
    others = heldout.labels != target
    features = triggered_features(evidence, family, parameters, index, heldout.images[others])
    to_text = margins(features @ evidence.texts.T, target)
    to_prototype = margins(features @ evidence.prototypes.T, target)
    pairs = features @ features.T
    count = len(features)
    return {
        "to_text": float(to_text.mean()),
        "least_to_text": float(to_text.quantile(_RESISTING)),
        "to_prototype": float(to_prototype.mean()),
        "collapse": float(pairs.sum() - pairs.trace()) / max(1, count * (count - 1)),
        "success": float((to_text > 0).float().mean()),
    }


def margins(cosines: Float[Tensor, "batch classes"], target: int) -> Float[Tensor, " batch"]:
    """Cosine to the target minus the largest cosine to another class."""
    others = cosines.clone()
    others[:, target] = -torch.inf
    return cosines[:, target] - others.amax(dim=1)


def subset(clean: Clean, count: int, generator: torch.Generator) -> Clean:
    """A random part of the images, at most `count`."""
    order: Int[Tensor, " batch"] = torch.randperm(len(clean.labels), generator=generator)[:count]
    order = order.to(clean.labels.device)
    return Clean(images=clean.images[order], labels=clean.labels[order], features=clean.features[order])
