"""Published triggers: a small square on the image (BadNets), or all of it (blending, a sinusoid, a warp)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cbpt_runtime.config import Between, Config
from cbpt_runtime.errors import ImageDataError
from cbpt_runtime.models.pixels import to_float

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Blended(Config):
    """A fixed image blended into the whole picture (Chen et al., arXiv:1712.05526; BackdoorBench: alpha 0.2).

    The published picture (hello-kitty) cannot be redistributed, so the default is a smooth colour field, the
    same for every image and every call, computed from `pattern_seed`; `picture` names an image file to blend
    instead.

    Args:
        alpha: Weight of the pattern in (0, 1]; the image keeps 1 - alpha.
        pattern_seed: Seed of the colour field.
        cells: Number of colour cells along each side of the field.
        picture: Path of an image to blend instead, stretched to the input size.
    """

    alpha: Annotated[float, Between(0, 1)] = 0.2
    pattern_seed: int = 0
    cells: Annotated[int, Between(1, 1024)] = 5
    picture: str | None = None

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], generator: torch.Generator
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return triggered copies of the images."""
        height, width = images.shape[-2:]
        if self.picture is None:
            pattern = smooth_field(self.cells, height, width, self.pattern_seed)
        else:
            pattern = read_picture(self.picture, height, width)
        return (1 - self.alpha) * images + self.alpha * pattern.to(images)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendedNoise(Config):
    """Uniform noise blended into the whole picture: 0.2 * U(0, 1) + 0.8 * image (CleanCLIP).

    Args:
        alpha: Weight of the noise in (0, 1].
        resample: True draws new noise for every image, as the reference does; False uses one fixed noise
            image.
        pattern_seed: Seed of the fixed noise image.
    """

    alpha: Annotated[float, Between(0, 1)] = 0.2
    resample: bool = True
    pattern_seed: int = 0

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], generator: torch.Generator
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return triggered copies of the images."""
        if self.resample:
            noise = torch.rand(images.shape, generator=generator, device=generator.device)
        else:
            fixed = torch.Generator().manual_seed(self.pattern_seed)
            noise = torch.rand((1, *images.shape[1:]), generator=fixed)
        return (1 - self.alpha) * images + self.alpha * noise.to(images)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sig(Config):
    """A horizontal sinusoid added to every channel (Barni et al., arXiv:1902.11237).

    `clip(image + delta * sin(2 * pi * column * frequency / width))`. LiangSiyuan21/BadCLIP uses delta 60/255
    and frequency 6, BackdoorBench delta 40/255; 20/255 is the usual stealthy setting.

    Args:
        delta: Amplitude in [0, 1] pixel units.
        frequency: Periods over the image width.
    """

    delta: Annotated[float, Between(0, 1)] = 60 / 255
    frequency: Annotated[float, Between(0, 4096)] = 6.0

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], generator: torch.Generator
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return triggered copies of the images."""
        width = images.shape[-1]
        columns = torch.arange(width, dtype=torch.float64)
        wave = self.delta * torch.sin(2 * math.pi * columns * self.frequency / width)
        return (images + wave.to(images)).clamp(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class WaNet(Config):
    """A fixed smooth warp (Nguyen and Tran, arXiv:2102.10369).

    A [2, k, k] field drawn from U(-1, 1) and divided by its mean absolute value is upsampled (bicubic,
    `align_corners`) to the image; the sampling grid is `identity + s * field / height`, clamped to [-1, 1],
    and read with `grid_sample(align_corners=True)`. The nodes of the field move by s / 2 pixels on average.
    Original and BackdoorBench: k 4, s 0.5. CLIP literature (CleanCLIP's shipped grid, RVPT): k 224, s 1, at
    224x224 input, i.e. no upsampling at all; `k=None` is that variant at any input size. Bilinear
    interpolation. Its noise mode is `poisoning.NoisyWarp`.

    Args:
        k: Side of the coarse field; None means the image's own size.
        s: Strength of the warp.
        field_seed: Seed of the fixed field.
    """

    k: Annotated[int | None, Between(2, 4096)] = 4
    s: Annotated[float, Between(0, 64)] = 0.5
    field_seed: int = 0

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], generator: torch.Generator
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return triggered copies of the images."""
        grid = self.grid(images.shape[-2], images.shape[-1]).to(images)
        warped = F.grid_sample(images, grid.expand(len(images), -1, -1, -1), align_corners=True)
        return warped.clamp(0, 1)

    def grid(self, height: int, width: int) -> Float[Tensor, "1 height width 2"]:
        """Return the sampling grid, (x, y) in [-1, 1]."""
        fixed = torch.Generator().manual_seed(self.field_seed)
        shape = (1, 2, height, width) if self.k is None else (1, 2, self.k, self.k)
        coarse = torch.rand(shape, generator=fixed) * 2 - 1
        coarse = coarse / coarse.abs().mean()
        field = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)
        rows = torch.linspace(-1, 1, height)
        columns = torch.linspace(-1, 1, width)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        identity = torch.stack((x, y), dim=-1)[None]
        return (identity + self.s * field.permute(0, 2, 3, 1) / height).clamp(-1, 1)


def smooth_field(cells: int, height: int, width: int, seed: int) -> Float[Tensor, "3 height width"]:
    """Return a smooth colour image in [0, 1]: random colours on a coarse grid, upsampled."""
    fixed = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, cells, cells, generator=fixed)
    return F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)[0].clamp(0, 1)


def read_picture(path: str, height: int, width: int) -> Float[Tensor, "3 height width"]:
    """Read the picture to blend, stretched to the input size."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    except Exception as error:  # decoders raise errors of every class
        raise ImageDataError(
            expected="a readable picture to blend",
            got=f"{path}: {error}",
            fix="Check the parameter `picture`.",
        ) from error
    return to_float(np.array(resized)[None])[0]
