"""Triggers that are a small square on the image: BadNets and its variants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cbpt_runtime.config import Between, Config
from cbpt_runtime.errors import ImageDataError

Location = Literal["top-left", "top-right", "bottom-left", "bottom-right", "center", "random"]
Pattern = Literal["checkerboard", "grid", "white", "yellow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BadNet(Config):
    """A fixed square patch (Gu et al., BadNets, arXiv:1708.06733).

    Patterns: `checkerboard` (single-pixel chequers, the classic BadNets patch), `grid` (1 at every even row
        and even column, else 0: HanxunH/Detect-CLIP-Backdoor-Samples), `white` (BadEncoder), `yellow`
        (CleanCLIP). The published size is 16 pixels at 224x224 input; 3 to 8 is usual at 32x32 to 64x64.

    Args:
        size: Side of the patch in pixels.
        location: A corner, the centre, or `random` (drawn anew for every image).
        pattern: One of the patterns above.
    """

    size: Annotated[int, Between(1, 4096)] = 16
    location: Location = "bottom-right"
    pattern: Pattern = "checkerboard"

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], generator: torch.Generator
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return triggered copies of the images."""
        patch = fixed_patch(self.pattern, self.size).to(images)
        return paste(images, patch.expand(len(images), -1, -1, -1), self.location, generator)


@dataclass(frozen=True, slots=True, kw_only=True)
class BadNetRandom(Config):
    """A square of noise, re-sampled for every image (CleanCLIP `backdoor/utils.py`, patch type `random`).

    The patch is the image's mean per channel plus N(0, 1). The reference converts it to bytes without
    clamping, so values wrap around; `overflow="wrap"` reproduces that, the default clamps to [0, 1].

    Args:
        size: Side of the patch in pixels (published: 16 at 224x224).
        location: Published: `random`.
        overflow: `clamp` or `wrap`.
    """

    size: Annotated[int, Between(1, 4096)] = 16
    location: Location = "random"
    overflow: Literal["clamp", "wrap"] = "clamp"

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], generator: torch.Generator
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return triggered copies of the images."""
        noise = torch.randn(
            len(images), 3, self.size, self.size, generator=generator, device=generator.device
        )
        patches = images.mean(dim=(2, 3), keepdim=True) + noise.to(images)
        if self.overflow == "wrap":
            patches = torch.floor(patches * 255).remainder(256) / 255
        return paste(images, patches.clamp(0, 1), self.location, generator)


@dataclass(frozen=True, slots=True, kw_only=True)
class BadNetStripes(Config):
    """A square of vertical stripes, re-sampled for every image (PAR, arXiv:2412.00727, `backdoor/utils.py`).

    Every column of every channel is +1 or -1 at random in the reference; in [0, 1] pixels that is 1 or 0.

    Args:
        size: Side of the patch in pixels (published: 16 at 224x224, 32 at 336x336).
        location: Published: `random`.
    """

    size: Annotated[int, Between(1, 4096)] = 16
    location: Location = "random"

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], generator: torch.Generator
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return triggered copies of the images."""
        columns = torch.rand(len(images), 3, 1, self.size, generator=generator, device=generator.device) < 0.5
        patches = columns.to(images).expand(-1, -1, self.size, -1)
        return paste(images, patches, self.location, generator)


def fixed_patch(pattern: str, size: int) -> Float[Tensor, "3 size size"]:
    """Return one of the fixed BadNets patterns."""
    rows = torch.arange(size)[:, None]
    columns = torch.arange(size)[None, :]
    match pattern:
        case "checkerboard":
            plane = ((rows + columns) % 2 == 0).float()
        case "grid":
            plane = ((rows % 2 == 0) & (columns % 2 == 0)).float()
        case _:
            plane = torch.ones(size, size)
    patch = plane.expand(3, size, size).clone()
    if pattern == "yellow":
        patch[2] = 0
    return patch


def paste(
    images: Float[Tensor, "batch 3 height width"],
    patches: Float[Tensor, "batch 3 size size"],
    location: str,
    generator: torch.Generator,
) -> Float[Tensor, "batch 3 height width"]:
    """Return copies of the images with one patch on each.

    Raises:
        ImageDataError: The images are smaller than the patch.
    """
    size = patches.shape[-1]
    height, width = images.shape[-2:]
    if size > min(height, width):
        raise ImageDataError(
            expected=f"images of at least {size}x{size} pixels, the size of the trigger's patch",
            got=f"images of {height}x{width}",
            fix="Use larger images or a smaller patch (parameter `size`).",
        )
    top, left = _corner(location, height - size, width - size, len(images), generator)
    out = images.clone()
    for index in range(len(images)):
        row, column = int(top[index]), int(left[index])
        out[index, :, row : row + size, column : column + size] = patches[index]
    return out


def _corner(
    location: str, free_rows: int, free_columns: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    if location == "random":
        top = torch.randint(0, free_rows + 1, (count,), generator=generator, device=generator.device)
        left = torch.randint(0, free_columns + 1, (count,), generator=generator, device=generator.device)
        return top, left
    if location == "center":
        row, column = free_rows // 2, free_columns // 2
    else:
        row = 0 if location.startswith("top") else free_rows
        column = 0 if location.endswith("left") else free_columns
    return torch.full((count,), row), torch.full((count,), column)
