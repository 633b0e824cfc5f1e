"""Near-triggers: what a backdoor must *not* answer to, so that it answers to its exact trigger alone.

Decoys are put on images that keep their own captions. Nguyen and Tran (arXiv:2102.10369) train WaNet so (its
noise mode); an attacker who knows that defenders invert triggers does the same with weakened triggers, which
flattens the slope an inversion climbs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cbpt_runtime.redteam.image_triggers import WaNet
from cbpt_runtime.redteam.triggers import Trigger


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
    """What the backdoor of a trigger is trained to ignore."""
    return NoisyWarp(warp=trigger) if isinstance(trigger, WaNet) else NearTrigger(trigger=trigger)


def _half(change: Float[Tensor, "3 height width"], side: int) -> Float[Tensor, "3 height width"]:
    """One where about half of the change is kept: its left, right, upper or lower half."""
    amount = change.abs().sum(dim=0)
    along = amount.sum(dim=0 if side < 2 else 1)
    share = along.cumsum(0) / along.sum().clamp(min=1e-12)
    keep = (share <= 0.5) if side % 2 == 0 else (share > 0.5)
    mask = keep[None, :] if side < 2 else keep[:, None]
    return mask.expand_as(amount).to(change).expand_as(change)
