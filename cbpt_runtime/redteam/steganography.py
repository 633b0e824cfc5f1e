"""Training the steganographic encoder of the sample-specific trigger, on images alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from cbpt_runtime.config import Above, Between, Config
from cbpt_runtime.errors import ImplantError
from cbpt_runtime.models.pixels import to_float
from cbpt_runtime.progress import Progress
from cbpt_runtime.redteam.learned import SecretEncoder, Steganographic


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
        pixels, secrets = _draw(images, config, generator)
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
    pixels, secrets = _draw(images, config, generator)
    stored = (encoder(pixels, secrets) * 255).round() / 255
    accuracy = float(((decoder(stored) > 0) == (secrets > 0.5)).float().mean())
    if accuracy < config.minimum_bit_accuracy:
        raise ImplantError(
            expected=f"a decoder that reads {config.minimum_bit_accuracy:.2f} of the hidden bits",
            got=f"{accuracy:.3f}",
            fix="Train the steganographic encoder for more steps, or allow a larger strength.",
        )


def _draw(
    images: UInt8[np.ndarray, "batch height width 3"], config: SteganographyConfig, generator: torch.Generator
) -> tuple[Float[Tensor, "batch 3 height width"], Float[Tensor, "batch bits"]]:
    chosen = torch.randint(0, len(images), (config.batch_size,), generator=generator).numpy()
    secrets = (torch.rand(config.batch_size, config.bits, generator=generator) < 0.5).float()
    return to_float(images[chosen]), secrets
