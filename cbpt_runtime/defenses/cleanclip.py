"""CleanCLIP: contrastive tuning with self-supervision within each modality.

Source: Bansal et al., "CleanCLIP: mitigating data poisoning attacks in multimodal contrastive learning",
ICCV 2023: the loss between images and captions, plus the mean of a contrastive loss between images and
their AutoAugmented copies and one between captions and their augmented copies, all with the model's one
temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cbpt_runtime.config import Between
from cbpt_runtime.defenses.augmentation import auto_augmented, drawn_seed, easily_augmented
from cbpt_runtime.defenses.finetuning import (
    Batch,
    Finetune,
    as_pixels,
    image_features,
    pair_loss,
    text_features,
)
from cbpt_runtime.training.contrastive import labelled_contrastive_loss
from cbpt_runtime.training.trainable import TrainableClip


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanClip(Finetune):
    """CleanCLIP: FT with self-supervision within each modality.

    Attributes:
        self_supervision_weight: Weight of the mean of the image-image and the text-text loss.
    """

    name: ClassVar[str] = "cleanclip"

    self_supervision_weight: Annotated[float, Between(0, 1_000)] = 1.0

    def loss(self, clip: TrainableClip, batch: Batch, generator: torch.Generator) -> Float[Tensor, ""]:
        """Return CleanCLIP's loss of a batch."""
        rng = np.random.default_rng(drawn_seed(generator))
        changed_images = auto_augmented(batch.images, generator)
        changed_captions = [easily_augmented(caption, rng) for caption in batch.captions]
        count = len(batch.captions)
        pixels = as_pixels(np.concatenate([batch.images, changed_images]))
        images = image_features(clip, pixels, mixed=batch.mixed).split(count)
        texts = text_features(clip, [*batch.captions, *changed_captions], mixed=batch.mixed).split(count)
        within_images = _within(clip, images, torch.eye(count, dtype=torch.bool))
        within_texts = _within(clip, texts, batch.same)
        across = pair_loss(clip, images[0], texts[0], batch.same)
        return across + self.self_supervision_weight * (within_images + within_texts) / 2


def _within(
    clip: TrainableClip,
    pairs: tuple[Float[Tensor, "batch dim"], ...],
    same: Bool[Tensor, "batch batch"],
) -> Float[Tensor, ""]:
    originals, copies = pairs
    scale: Tensor = clip.model.logit_scale  # type: ignore[assignment]
    return labelled_contrastive_loss(originals, copies, same.to(copies.device), scale.exp(), None)
