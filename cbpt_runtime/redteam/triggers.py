"""Attack triggers: pure functions on pixels, with their published definitions.

A trigger maps float32 RGB images in [0, 1] at the model's own input size to triggered images of the same
shape and range. Everything random is drawn from the generator that is passed in; what an attacker fixes once
(a blended image, a warping field) is a property of the trigger itself and does not depend on that generator.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from cbpt_runtime.errors import ConfigError, ImageDataError

Location = Literal["top-left", "top-right", "bottom-left", "bottom-right", "center", "random"]
LOCATIONS: tuple[str, ...] = ("top-left", "top-right", "bottom-left", "bottom-right", "center", "random")
PATCH_PATTERNS: tuple[str, ...] = ("checkerboard", "grid", "white", "yellow")


class Trigger(Protocol):
    """What every trigger is: a callable on a batch of pixels."""

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], generator: torch.Generator
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return triggered copies of `images`; the input is left as it is."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BadNet:
    """A fixed square patch (Gu et al., BadNets, arXiv:1708.06733).

    Patterns: `checkerboard` (single-pixel chequers, the classic BadNets patch), `grid` (1 at every even row
        and even column, else 0: HanxunH/Detect-CLIP-Backdoor-Samples), `white` (BadEncoder), `yellow`
        (CleanCLIP). The published size is 16 pixels at 224x224 input; 3 to 8 is usual at 32x32 to 64x64.

    Args:
        size: Side of the patch in pixels.
        location: A corner, the centre, or `random` (drawn anew for every image).
        pattern: One of the patterns above.
    """

    size: int = 16
    location: str = "bottom-right"
    pattern: str = "checkerboard"

    def __post_init__(self) -> None:
        _check_patch(self.size, self.location)
        _check_choice("pattern", self.pattern, PATCH_PATTERNS)

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], generator: torch.Generator
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return triggered copies of the images."""
        patch = fixed_patch(self.pattern, self.size).to(images)
        return paste(images, patch.expand(len(images), -1, -1, -1), self.location, generator)


@dataclass(frozen=True, slots=True, kw_only=True)
class BadNetRandom:
    """A square of noise, re-sampled for every image (CleanCLIP `backdoor/utils.py`, patch type `random`).

    The patch is the image's mean per channel plus N(0, 1). The reference converts it to bytes without
    clamping, so values wrap around; `overflow="wrap"` reproduces that, the default clamps to [0, 1].

    Args:
        size: Side of the patch in pixels (published: 16 at 224x224).
        location: Published: `random`.
        overflow: `clamp` or `wrap`.
    """

    size: int = 16
    location: str = "random"
    overflow: str = "clamp"

    def __post_init__(self) -> None:
        _check_patch(self.size, self.location)
        _check_choice("overflow", self.overflow, ("clamp", "wrap"))

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
class BadNetStripes:
    """A square of vertical stripes, re-sampled for every image (PAR, arXiv:2412.00727, `backdoor/utils.py`).

    Every column of every channel is +1 or -1 at random in the reference; in [0, 1] pixels that is 1 or 0.

    Args:
        size: Side of the patch in pixels (published: 16 at 224x224, 32 at 336x336).
        location: Published: `random`.
    """

    size: int = 16
    location: str = "random"

    def __post_init__(self) -> None:
        _check_patch(self.size, self.location)

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], generator: torch.Generator
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return triggered copies of the images."""
        columns = torch.rand(len(images), 3, 1, self.size, generator=generator, device=generator.device) < 0.5
        patches = columns.to(images).expand(-1, -1, self.size, -1)
        return paste(images, patches, self.location, generator)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blended:
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

    alpha: float = 0.2
    pattern_seed: int = 0
    cells: int = 5
    picture: str | None = None

    def __post_init__(self) -> None:
        _check_number("alpha", self.alpha, low=0.0, high=1.0)
        _check_number("cells", self.cells, low=1, high=1024)

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
class BlendedNoise:
    """Uniform noise blended into the whole picture: 0.2 * U(0, 1) + 0.8 * image (CleanCLIP).

    Args:
        alpha: Weight of the noise in (0, 1].
        resample: True draws new noise for every image, as the reference does; False uses one fixed noise
            image.
        pattern_seed: Seed of the fixed noise image.
    """

    alpha: float = 0.2
    resample: bool = True
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        _check_number("alpha", self.alpha, low=0.0, high=1.0)

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
class Sig:
    """A horizontal sinusoid added to every channel (Barni et al., arXiv:1902.11237).

    `clip(image + delta * sin(2 * pi * column * frequency / width))`. LiangSiyuan21/BadCLIP uses delta 60/255
    and frequency 6, BackdoorBench delta 40/255; 20/255 is the usual stealthy setting.

    Args:
        delta: Amplitude in [0, 1] pixel units.
        frequency: Periods over the image width.
    """

    delta: float = 60 / 255
    frequency: float = 6.0

    def __post_init__(self) -> None:
        _check_number("delta", self.delta, low=0.0, high=1.0)
        _check_number("frequency", self.frequency, low=0.0, high=4096.0)

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], generator: torch.Generator
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return triggered copies of the images."""
        width = images.shape[-1]
        columns = torch.arange(width, dtype=torch.float64)
        wave = self.delta * torch.sin(2 * math.pi * columns * self.frequency / width)
        return (images + wave.to(images)).clamp(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class WaNet:
    """A fixed smooth warp (Nguyen and Tran, arXiv:2102.10369).

    A [2, k, k] field drawn from U(-1, 1) and divided by its mean absolute value is upsampled (bicubic,
    `align_corners`) to the image; the sampling grid is `identity + s * field / height`, clamped to [-1, 1],
    and read with `grid_sample(align_corners=True)`. The nodes of the field move by s / 2 pixels on average.
    Original and BackdoorBench: k 4, s 0.5. CLIP literature (CleanCLIP's shipped grid, RVPT): k 224, s 1, at
    224x224 input, i.e. no upsampling at all; `k=None` is that variant at any input size. Bilinear
    interpolation.

    Args:
        k: Side of the coarse field; None means the image's own size.
        s: Strength of the warp.
        field_seed: Seed of the fixed field.
    """

    k: int | None = 4
    s: float = 0.5
    field_seed: int = 0

    def __post_init__(self) -> None:
        _check_number("s", self.s, low=0.0, high=64.0)
        if self.k is not None:
            _check_number("k", self.k, low=2, high=4096)

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


TRIGGERS: dict[str, type] = {
    "badnet": BadNet,
    "badnet-random": BadNetRandom,
    "badnet-stripes": BadNetStripes,
    "blended": Blended,
    "blended-noise": BlendedNoise,
    "sig": Sig,
    "wanet": WaNet,
    "wanet-clip": WaNet,
}
DEFAULTS: dict[str, dict[str, object]] = {"wanet-clip": {"k": None, "s": 1.0}}


def get_trigger(name: str, **parameters: object) -> Trigger:
    """Build the trigger called `name` with its published defaults and the given parameters.

    Raises:
        ConfigError: Unknown name or parameter; the text lists the valid ones.
    """
    _check_choice("trigger", name, tuple(TRIGGERS))
    kind = TRIGGERS[name]
    valid = tuple(field.name for field in dataclasses.fields(kind))
    for parameter in parameters:
        _check_choice(f"parameter of {name}", parameter, valid)
    trigger: Trigger = kind(**{**DEFAULTS.get(name, {}), **parameters})
    return trigger


def describe_trigger(trigger: Trigger) -> dict[str, object]:
    """Return the trigger's parameters for `attack.json`: its class name and its fields."""
    fields: Mapping[str, object] = dataclasses.asdict(trigger) if dataclasses.is_dataclass(trigger) else {}
    plain = {
        key: value for key, value in fields.items() if isinstance(value, (int, float, str, bool, type(None)))
    }
    return {"kind": type(trigger).__name__, **plain}


def apply_trigger(
    trigger: Trigger,
    images: UInt8[np.ndarray, "batch height width 3"],
    generator: torch.Generator,
    *,
    batch_size: int = 256,
) -> UInt8[np.ndarray, "batch height width 3"]:
    """Apply a trigger to 8-bit images and round back to 8 bits, as an attacker who stores files must."""
    out = np.empty_like(images)
    for start in range(0, len(images), batch_size):
        pixels = to_float(images[start : start + batch_size])
        triggered = trigger(pixels, generator).clamp(0, 1)
        out[start : start + batch_size] = to_uint8(triggered)
    return out


def to_float(images: UInt8[np.ndarray, "batch height width 3"]) -> Float[Tensor, "batch 3 height width"]:
    """Turn 8-bit images into float32 pixels in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255


def to_uint8(images: Float[Tensor, "batch 3 height width"]) -> UInt8[np.ndarray, "batch height width 3"]:
    """Round pixels in [0, 1] to 8 bits."""
    scaled = (images * 255).round().to(torch.uint8)
    return np.ascontiguousarray(scaled.permute(0, 2, 3, 1).cpu().numpy())


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


def smooth_field(cells: int, height: int, width: int, seed: int) -> Float[Tensor, "3 height width"]:
    """Return a smooth colour image in [0, 1]: random colours on a coarse grid, upsampled."""
    fixed = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, cells, cells, generator=fixed)
    return F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)[0].clamp(0, 1)


def read_picture(path: str, height: int, width: int) -> Float[Tensor, "3 height width"]:
    """Read the picture to blend, stretched to the input size."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    except (OSError, UnidentifiedImageError) as error:
        raise ImageDataError(
            expected="a readable picture to blend",
            got=f"{path}: {error}",
            fix="Check the parameter `picture`.",
        ) from error
    return to_float(np.array(resized)[None])[0]


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


def _check_patch(size: int, location: str) -> None:
    _check_number("size", size, low=1, high=4096)
    _check_choice("location", location, LOCATIONS)


def _check_number(name: str, value: object, *, low: float, high: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(
            expected=f"`{name}` between {low:g} and {high:g}",
            got=repr(value),
            fix="Change the trigger's parameter.",
        )


def _check_choice(what: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(expected=f"a valid {what}", got=repr(value), fix=f"Valid are: {', '.join(valid)}.")
