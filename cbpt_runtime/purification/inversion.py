"""Trigger inversion: dummy triggers that pull any image to a text, many of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from cbpt_runtime.models.clip import ImageEncoder
from cbpt_runtime.purification.clean_features import CleanFeatures
from cbpt_runtime.purification.losses import contrastive_inversion
from cbpt_runtime.purification.trigger_families import Parameters, TriggerFamily

_ENCODER_BATCH = 200  # images of 64 x 64 pixels
_BETAS = (0.5, 0.9)
_RECENT = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Goals:
    """Which texts each trigger is to reach, and which not.

    Attributes:
        texts: Unit text features.
        positives: Texts any of which the trigger is for.
        negatives: Texts it has to leave behind; others neither help nor harm.
        scale: Inverse temperature.
    """

    texts: Float[Tensor, "words dim"]
    positives: Bool[Tensor, "triggers words"]
    negatives: Bool[Tensor, "triggers words"]
    scale: float

    @classmethod
    def of_classes(cls, texts: Float[Tensor, "words dim"], targets: list[int], scale: float) -> Goals:
        """One trigger per target text, against all other texts."""
        positives = torch.zeros(len(targets), len(texts), dtype=torch.bool, device=texts.device)
        positives[torch.arange(len(targets)), targets] = True
        return cls(texts=texts, positives=positives, negatives=~positives, scale=scale)


class Inversion:
    """Triggers of one family in the making, one per goal, on the same images.

    Args:
        encoder: The suspect.
        family: The space of triggers.
        goals: What each trigger is for.
        clean: Images they are made on.
        batch: Images per step.
        seed: Of initial parameters and batches; the first steps are the same however many follow.
        mixed: Run the encoder in bfloat16 where autocast allows it.

    Attributes:
        parameters: The triggers, stacked.
        rows: Which of the goals are still followed, in the order of the triggers.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        family: TriggerFamily,
        goals: Goals,
        clean: CleanFeatures,
        *,
        batch: int,
        seed: int,
        mixed: bool = False,
    ) -> None:
        self._encoder = encoder
        self._family = family
        self._goals = goals
        self._clean = clean
        self._batch = batch
        self._mixed = mixed
        self._generator = torch.Generator().manual_seed(seed)
        self._positives = goals.positives
        self._recent = torch.zeros_like(goals.positives, dtype=torch.float32)
        count, device = len(goals.positives), goals.texts.device
        initial = family.initial(count, encoder.preprocess.image_size, self._generator)
        self.parameters: Parameters = {
            name: value.to(device).requires_grad_() for name, value in initial.items()
        }
        self.rows: Int[Tensor, " triggers"] = torch.arange(count, device=device)
        self._optimizer = self._new_optimizer()

    def advance(self, steps: int) -> None:
        """Take optimiser steps on the contrastive inversion loss."""
        for _ in range(steps):
            drawn = torch.randint(len(self._clean.images), (self._batch,), generator=self._generator)
            drawn = drawn.to(self._clean.images.device)
            pixels = self._clean.images[drawn].float() / 255
            self._optimizer.zero_grad()
            for part in self._parts():
                self._loss(part, pixels, self._clean.features[drawn]).backward()
            self._optimizer.step()
            with torch.no_grad():
                for name, value in self._family.project(self.parameters).items():
                    self.parameters[name].copy_(value)

    def narrow(self) -> None:
        """From now on each trigger is for the one of its texts that it has come nearest to."""
        nearest = self._recent.masked_fill(~self._positives[self.rows], -torch.inf).argmax(dim=1)
        self._positives = self._positives.clone()
        self._positives[self.rows] = False
        self._positives[self.rows, nearest] = True

    def recent_margins(self) -> Float[Tensor, " triggers"]:
        """Cosine to the nearest of a trigger's texts minus that to its nearest rival, over the last steps."""
        own = self._recent.masked_fill(~self._goals.positives[self.rows], -torch.inf).amax(dim=1)
        return own - self._recent.masked_fill(~self._goals.negatives[self.rows], -torch.inf).amax(dim=1)

    def keep(self, which: Int[Tensor, " kept"]) -> None:
        """Goes on with some of the triggers only, given by their place."""
        moments = [self._optimizer.state[value] for value in self.parameters.values()]
        self.parameters = {
            name: value.detach()[which].requires_grad_() for name, value in self.parameters.items()
        }
        self.rows, self._recent = self.rows[which], self._recent[which]
        self._optimizer = self._new_optimizer()
        for value, moment in zip(self.parameters.values(), moments, strict=True):
            self._optimizer.state[value] = {
                key: kept if key == "step" else kept[which] for key, kept in moment.items()
            }

    def result(self) -> Parameters:
        """Return the triggers as they are now."""
        return {name: value.detach() for name, value in self.parameters.items()}

    def _new_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.parameters.values(), lr=self._family.step_size, betas=_BETAS)

    def _parts(self) -> Iterator[slice]:
        size = max(1, images_per_pass(self._encoder) // self._batch)
        for start in range(0, len(self.rows), size):
            yield slice(start, start + size)

    def _loss(
        self,
        part: slice,
        pixels: Float[Tensor, "batch 3 height width"],
        clean: Float[Tensor, "batch dim"],
    ) -> Float[Tensor, ""]:
        rows = self.rows[part]
        some = {name: value[part] for name, value in self.parameters.items()}
        triggered = self._family.apply(some, pixels.expand(len(rows), *pixels.shape)).flatten(0, 1)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self._mixed):
            features = self._encoder.encode_images(triggered.contiguous(memory_format=torch.channels_last))
        features = features.float().view(len(rows), len(pixels), -1)
        cosines = features @ self._goals.texts.T
        with torch.no_grad():
            self._recent[part].lerp_(cosines.mean(dim=1), _RECENT)
        losses = contrastive_inversion(
            cosines,
            (features * clean).sum(dim=-1),
            self._positives[rows],
            self._goals.negatives[rows],
            self._goals.scale,
        )
        return losses.sum()


def invert(inversion: Inversion, steps: int) -> Parameters:
    """Run an inversion to its end: the triggers, stacked."""
    inversion.advance(steps)
    return inversion.result()


def images_per_pass(encoder: ImageEncoder) -> int:
    """How many images of the encoder's size go through it at a time, with gradients, in a few gigabytes."""
    height, width = encoder.preprocess.image_size
    room = _ENCODER_BATCH if encoder.device.type == "cpu" else 8 * _ENCODER_BATCH
    return max(8, round(room * 64 * 64 / (height * width)))


def encode_triggered(
    encoder: ImageEncoder,
    apply: Callable[[Tensor], Tensor],
    images: UInt8[Tensor, "batch 3 height width"],
) -> Float[Tensor, "batch dim"]:
    """Encode images with a trigger on them, to unit features.

    Args:
        encoder: The suspect.
        apply: Puts the trigger on images in [0, 1].
        images: Without it.
    """
    parts = []
    with torch.no_grad():
        for part in images.split(_ENCODER_BATCH):
            triggered = apply(part.float() / 255)
            parts.append(encoder.encode_images(triggered.contiguous(memory_format=torch.channels_last)))
    return torch.cat(parts)


def margins(cosines: Float[Tensor, "batch classes"], target: int) -> Float[Tensor, " batch"]:
    """Cosine to the target minus the largest cosine to another class."""
    others = cosines.clone()
    others[:, target] = -torch.inf
    return cosines[:, target] - others.amax(dim=1)
