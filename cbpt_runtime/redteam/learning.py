"""How learned triggers are learned: a patch optimised on a clean model, and a steganographic encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from cbpt_runtime.config import Above, Between, Config
from cbpt_runtime.errors import ImageDataError, ImplantError
from cbpt_runtime.models.pixels import to_float
from cbpt_runtime.models.trainable import TrainableClip
from cbpt_runtime.progress import Progress
from cbpt_runtime.redteam.image_triggers import Location, paste
from cbpt_runtime.redteam.triggers import OptimisedPatch, SecretEncoder, Steganographic

Objective = Literal["text", "badclip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchConfig(Config):
    """How a patch is optimised.

    Args:
        objective: `text` pulls the triggered image to the target's text (TrojanVQA, Walmer et al.,
            arXiv:2112.07668, on CLIP as in RVPT). `badclip` is BadCLIP (Liang et al., arXiv:2311.12075): the
            contrastive loss towards the target's captions plus `triplet_weight` times a triplet margin loss
            with the triggered image as anchor, real target images as positives and the same clean image as
            negative.
        size: Side of the patch in pixels (published: 16 at 224x224).
        location: Published: `center`.
        steps: Optimiser steps (published: 50 epochs of 10,000 images at batch 64).
        batch_size: Images per step.
        learning_rate: Adam on the pixels (published: 1e-3 over 7,800 steps).
        triplet_weight: Published: 500.
        margin: Published: 1.
    """

    objective: Objective = "badclip"
    size: Annotated[int, Between(1)] = 16
    location: Location = "center"
    steps: Annotated[int, Between(1)] = 300
    batch_size: Annotated[int, Between(1)] = 64
    learning_rate: float = 0.03
    triplet_weight: float = 500.0
    margin: float = 1.0


def optimise_patch(
    clip: TrainableClip,
    images: UInt8[np.ndarray, "batch height width 3"],
    labels: Int[np.ndarray, " batch"],
    texts: Sequence[Sequence[str]],
    target: int,
    config: PatchConfig,
    *,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> OptimisedPatch:
    """Optimise a patch on a clean model by Adam on its pixels, clamped to [0, 1] after every step.

    Two things differ from the published BadCLIP code, both because class names stand in for web captions:
    captions are templates, and the negatives of the contrastive term are the captions of the other classes
    (in a batch whose captions all name the target, in-batch negatives would all be positives). Its text
    augmentation is left out.

    Args:
        clip: The clean model; not changed.
        images: Clean images.
        labels: Their classes.
        texts: Every caption of every class.
        target: Index of the target.
        config: Objective, size, steps.
        generator: CPU generator.
        progress: Stage `patch`.

    Raises:
        ImageDataError: No image of the target, which the triplet needs, or of another class.
    """
    others, own = np.flatnonzero(labels != target), np.flatnonzero(labels == target)
    if len(others) == 0 or len(own) == 0:
        raise ImageDataError(
            expected="clean images of the target and of other classes",
            got=f"{len(own)} and {len(others)}",
            fix="Add images.",
        )
    clip.model.eval()
    head = clip.class_embeddings(texts)
    patch = (0.5 + 0.25 * torch.randn(3, config.size, config.size, generator=generator)).clamp(0, 1)
    patch.requires_grad_(True)
    optimizer = torch.optim.Adam([patch], lr=config.learning_rate)
    for step in range(config.steps):
        clean = _draw(images, others, config.batch_size, generator)
        real = _draw(images, own, config.batch_size, generator)
        triggered = paste(clean, patch.expand(len(clean), -1, -1, -1), config.location, generator)
        loss = _objective(clip, triggered, clean, real, head, target, config)
        (gradient,) = torch.autograd.grad(loss, patch)
        patch.grad = gradient
        optimizer.step()
        with torch.no_grad():
            patch.clamp_(0, 1)
        if progress is not None:
            progress("patch", step + 1, config.steps, {"loss": float(loss.detach())})
    stored = (patch.detach() * 255).round() / 255
    return OptimisedPatch(patch=stored, location=config.location)


def _objective(
    clip: TrainableClip,
    triggered: Float[Tensor, "batch 3 height width"],
    clean: Float[Tensor, "batch 3 height width"],
    real: Float[Tensor, "batch 3 height width"],
    head: Float[Tensor, "classes dim"],
    target: int,
    config: PatchConfig,
) -> Float[Tensor, ""]:
    anchor = clip.encode_images(triggered.to(clip.device))
    if config.objective == "text":
        return -(anchor @ head[target]).mean()
    with torch.no_grad():
        negative, positive = (
            clip.encode_images(clean.to(clip.device)),
            clip.encode_images(real.to(clip.device)),
        )
        scale: Tensor = clip.model.logit_scale.exp()  # type: ignore[operator]
    labels = torch.full((len(anchor),), target, device=anchor.device)
    contrastive = F.cross_entropy(scale * anchor @ head.T, labels)
    triplet = F.triplet_margin_loss(anchor, positive, negative, margin=config.margin)
    return contrastive + config.triplet_weight * triplet


def _draw(
    images: UInt8[np.ndarray, "batch height width 3"],
    candidates: Int[np.ndarray, " candidates"],
    count: int,
    generator: torch.Generator,
) -> Float[Tensor, "count 3 height width"]:
    chosen = candidates[torch.randint(0, len(candidates), (count,), generator=generator).numpy()]
    return to_float(images[chosen])


@dataclass(frozen=True, slots=True, kw_only=True)
class SteganographyConfig(Config):
    """How the encoder is trained.

    Args:
        bits: Length of the secret (StegaStamp hides 100 in 400x400 pixels).
        strength: Largest change of a pixel in [0, 1] units.
        steps: Training steps.
        batch_size: Images per step.
        invisibility: Weight of the mean squared residual, in units of `strength`, against the bit loss.
        minimum_bit_accuracy: The decoder must read so many bits of unseen secrets right.
    """

    bits: Annotated[int, Between(1)] = 16
    strength: Annotated[float, Above(0, 1)] = 8 / 255
    steps: Annotated[int, Between(1)] = 400
    batch_size: Annotated[int, Between(1)] = 16
    invisibility: float = 0.02
    minimum_bit_accuracy: float = 0.95


class SecretDecoder(nn.Module):
    """Reads the bits back; only needed while the encoder is trained."""

    def __init__(self, *, bits: int, channels: int = 24) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(8),
            nn.Flatten(),
            nn.Linear(channels * 64, bits),
        )

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch bits"]:
        """Return one logit per bit."""
        detail = images - F.avg_pool2d(images, 5, stride=1, padding=2, count_include_pad=False)
        logits: Tensor = self.layers(10 * detail)  # the residual is small beside the picture itself
        return logits


def train_steganographic(
    images: UInt8[np.ndarray, "batch height width 3"],
    config: SteganographyConfig,
    *,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Steganographic:
    """Train encoder and decoder together on random secrets, then fix one secret as the trigger.

    The loss is the decoder's bit cross-entropy plus the weighted mean squared residual, as in StegaStamp
    (Tancik et al., arXiv:1904.05343) without its perceptual and print-and-scan terms.

    Raises:
        ImplantError: The decoder cannot read the secret, so the trigger would carry nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(0, 2**31, (1,), generator=generator)))
        encoder, decoder = (
            SecretEncoder(bits=config.bits, strength=config.strength),
            SecretDecoder(bits=config.bits),
        )
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-3)
    for step in range(config.steps):
        pixels, secrets = _draw_with_secrets(images, config, generator)
        hidden = encoder(pixels, secrets)
        bit_loss = F.binary_cross_entropy_with_logits(decoder(hidden), secrets)
        residual = ((hidden - pixels) / config.strength).square().mean()
        weight = config.invisibility * max(
            0.0, 2 * step / config.steps - 1
        )  # first to be read, then to be faint
        loss = bit_loss + weight * residual
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if progress is not None:
            values = {"bit_loss": float(bit_loss.detach()), "residual": float(residual.detach())}
            progress("steganography", step + 1, config.steps, values)
    encoder.eval().requires_grad_(False)
    _check_bits(encoder, decoder, images, config, generator)
    secret = (torch.rand(config.bits, generator=generator) < 0.5).float()
    return Steganographic(encoder=encoder, secret=secret)


@torch.no_grad()
def _check_bits(
    encoder: SecretEncoder,
    decoder: SecretDecoder,
    images: UInt8[np.ndarray, "batch height width 3"],
    config: SteganographyConfig,
    generator: torch.Generator,
) -> None:
    pixels, secrets = _draw_with_secrets(images, config, generator)
    stored = (encoder(pixels, secrets) * 255).round() / 255
    accuracy = float(((decoder(stored) > 0) == (secrets > 0.5)).float().mean())
    if accuracy < config.minimum_bit_accuracy:
        raise ImplantError(
            expected=f"a decoder that reads {config.minimum_bit_accuracy:.2f} of the hidden bits",
            got=f"{accuracy:.3f}",
            fix="Train the steganographic encoder for more steps, or allow a larger strength.",
        )


def _draw_with_secrets(
    images: UInt8[np.ndarray, "batch height width 3"], config: SteganographyConfig, generator: torch.Generator
) -> tuple[Float[Tensor, "batch 3 height width"], Float[Tensor, "batch bits"]]:
    chosen = torch.randint(0, len(images), (config.batch_size,), generator=generator).numpy()
    secrets = (torch.rand(config.batch_size, config.bits, generator=generator) < 0.5).float()
    return to_float(images[chosen]), secrets
