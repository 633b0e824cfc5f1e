"""ABD: contrastive tuning on images with a universal patch that acts like a trigger.

Source: "Adversarial backdoor defense in CLIP", arXiv:2409.15968, of which the published part shows: a
generator makes a universal patch with a contrastive "backdoor loss" on the poisoned encoder; the model is
then tuned on brightened images with this patch and augmented captions. The generator, its loss and its
discriminator are not public. Our reading: a small convolutional generator from a fixed random input; the
loss gathers all patched images in one place, away from the same images without the patch and from their
captions, as a backdoor does; no discriminator, since a defender does not care whether the patch is seen;
the patch lies at a random place of every image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from cbpt_runtime.config import Between, is_mixed
from cbpt_runtime.defenses.finetuning import (
    Batch,
    BatchLoss,
    Finetune,
    as_pixels,
    check_finite,
    drawn_seed,
    easily_augmented,
    image_features,
    pair_loss,
    text_features,
)
from cbpt_runtime.models.clip import DualEncoder
from cbpt_runtime.models.data import CleanSplit
from cbpt_runtime.models.trainable import TrainableClip
from cbpt_runtime.progress import Progress
from cbpt_runtime.purification.method import SuspectModel

_LATENT, _CHANNELS, _SEED_SIZE = 64, 32, 4
_BETAS = (0.5, 0.9)
Patch = Float[Tensor, "3 height width"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Abd(Finetune):
    """ABD: FT on images with a universal patch that acts like a trigger.

    Attributes:
        generator_steps: Steps the patch generator is trained.
        generator_step_size: Its learning rate.
        patch_area_rate: Share of the image the patch covers.
        most_brightness: Images are brightened by a factor between 1 and this.
    """

    name: ClassVar[str] = "abd"

    generator_steps: Annotated[int, Between(1, 100_000)] = 200
    generator_step_size: Annotated[float, Between(1e-12, 10)] = 1e-3
    patch_area_rate: Annotated[float, Between(1e-4, 0.5)] = 0.03
    most_brightness: Annotated[float, Between(1, 10)] = 1.5

    def tune(
        self,
        suspect: SuspectModel,
        head: Float[Tensor, "classes dim"],
        split: CleanSplit,
        progress: Progress | None,
    ) -> tuple[DualEncoder, Float[Tensor, "classes dim"], int]:
        """Make the patch, then tune both towers with it; return as FT does."""
        patch = adversarial_patch(suspect.encoder, head, split, self, progress=progress)
        return self.tune_towers(suspect, split, adversarial_loss(patch, self), progress)


class PatchGenerator(nn.Module):
    """From a fixed random input to a square patch in [0, 1].

    Args:
        size: Height and width of the patch.
        seed: Of weights and input.
    """

    def __init__(self, size: int, seed: int) -> None:
        super().__init__()
        self.size = size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.latent = nn.Buffer(torch.randn(1, _LATENT))
            self.first = nn.Linear(_LATENT, _CHANNELS * _SEED_SIZE**2)
            self.middle = nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1)
            self.last = nn.Conv2d(_CHANNELS, 3, 3, padding=1)

    def forward(self) -> Patch:
        """Return the patch."""
        x = self.first(self.latent).view(1, _CHANNELS, _SEED_SIZE, _SEED_SIZE).relu()
        x = self.middle(F.interpolate(x, (self.size, self.size), mode="nearest")).relu()
        patch: Tensor = self.last(x)[0].sigmoid()
        return patch


def adversarial_patch(
    encoder: DualEncoder,
    texts: Float[Tensor, "classes dim"],
    split: CleanSplit,
    config: Abd,
    *,
    progress: Progress | None = None,
) -> Patch:
    """Trains the generator against the frozen suspect and returns its patch.

    Args:
        encoder: The suspect.
        texts: Its class embeddings.
        split: Its tune images.
        config: All numbers.
        progress: Told about the steps.
    """
    height, width = split.tune_images.shape[1:3]
    size = max(1, round((config.patch_area_rate * height * width) ** 0.5))
    generator = torch.Generator().manual_seed(config.seed)
    maker = PatchGenerator(size, config.seed).to(encoder.device)
    optimizer = torch.optim.Adam(maker.parameters(), lr=config.generator_step_size, betas=_BETAS)
    mixed = is_mixed(config.precision, encoder.device)
    for step in range(config.generator_steps):
        drawn = torch.randint(len(split.tune_labels), (config.batch_size,), generator=generator).numpy()
        clean = as_pixels(split.tune_images[drawn]).to(encoder.device)
        patched = with_patch(clean, maker(), generator)
        with torch.autocast(encoder.device.type, torch.bfloat16, enabled=mixed):
            with torch.no_grad():
                origins = encoder.encode_images(clean).float()
            features = encoder.encode_images(patched).float()
        own = texts[torch.as_tensor(split.tune_labels[drawn]).to(texts.device)]
        loss = backdoor_loss(features, origins, own, encoder.logit_scale)
        check_finite(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress("make a patch", step + 1, config.generator_steps, {"loss": float(loss.detach())})
    with torch.no_grad():
        patch: Tensor = maker()
    return patch


def backdoor_loss(
    patched: Float[Tensor, "batch dim"],
    origins: Float[Tensor, "batch dim"],
    captions: Float[Tensor, "batch dim"],
    scale: float,
) -> Float[Tensor, ""]:
    """InfoNCE: towards the other patched images, away from the image without the patch and its caption."""
    count = len(patched)
    to_others = (patched @ patched.sum(dim=0) - 1) / max(1, count - 1)
    to_origin, to_caption = (patched * origins).sum(dim=1), (patched * captions).sum(dim=1)
    logits = scale * torch.stack([to_others, to_origin, to_caption], dim=1)
    return F.cross_entropy(logits, torch.zeros(count, dtype=torch.long, device=logits.device))


def with_patch(
    pixels: Float[Tensor, "batch 3 height width"], patch: Patch, generator: torch.Generator
) -> Float[Tensor, "batch 3 height width"]:
    """Images with the patch, each at a random place."""
    count, _, height, width = pixels.shape
    size = patch.shape[-1]
    tops = torch.randint(height - size + 1, (count,), generator=generator).tolist()
    lefts = torch.randint(width - size + 1, (count,), generator=generator).tolist()
    shown, mask = [], []
    for top, left in zip(tops, lefts, strict=True):
        place = (left, width - size - left, top, height - size - top)
        shown.append(F.pad(patch, place))
        mask.append(F.pad(torch.ones_like(patch[:1]), place))
    return torch.where(torch.stack(mask) > 0, torch.stack(shown), pixels)


def adversarial_loss(patch: Patch, config: Abd) -> BatchLoss:
    """CLIP's loss on brightened images with the patch and augmented captions."""

    def loss(clip: TrainableClip, batch: Batch, generator: torch.Generator) -> Float[Tensor, ""]:
        rng = np.random.default_rng(drawn_seed(generator))
        pixels = brightened(batch.images, config.most_brightness, generator).to(clip.device)
        images = image_features(clip, with_patch(pixels, patch, generator), mixed=batch.mixed)
        captions = [easily_augmented(caption, rng) for caption in batch.captions]
        texts = text_features(clip, captions, mixed=batch.mixed)
        return pair_loss(clip, images, texts, batch.same)

    return loss


def brightened(
    images: UInt8[np.ndarray, "batch height width 3"], most: float, generator: torch.Generator
) -> Float[Tensor, "batch 3 height width"]:
    """Pixels of every image times a random factor from 1 to `most`."""
    factors = 1 + (most - 1) * torch.rand(len(images), 1, 1, 1, generator=generator)
    return (as_pixels(images) * factors).clamp(max=1)
