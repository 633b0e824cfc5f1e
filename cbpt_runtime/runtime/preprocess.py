"""From an encoded image to the uint8 pixels a model takes, byte for byte as open_clip does it.

Serving uses this module, so it imports Pillow and numpy and nothing heavier. Normalisation with `mean` and
`std` does not happen here: it belongs to the image encoder and to the exported graph.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from .errors import ConfigError, ImageDataError

if TYPE_CHECKING:
    from jaxtyping import UInt8

Pixels: TypeAlias = "UInt8[np.ndarray, 'batch height width 3']"
"""RGB at the model's own size, as `Classifier.read` gives it."""

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_IMAGE_SIZE = 4096
MAX_ASPECT_RATIO = 100
MAX_PIXELS = 50_000_000
MOST_PIXELS = 178_956_970  # Pillow's own limit
MAX_PIXELS_VARIABLE = "CBPT_MAX_PIXELS"
"""Environment variable that sets another limit, for verbs that read images; a server has its profile's."""

# Formats Pillow decodes in-process. EPS and PDF are left out on purpose: Pillow starts another program for
# them.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "TIFF", "PPM")
# By Pillow's format: what the 'ftyp' box at the start of a file names, and what Pillow needs to read it.
_BOXED = {
    "HEIF": (
        (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"),
        "HEIC, which needs the package pillow-heif",
    ),
    "AVIF": ((b"avif", b"avis"), "AVIF, which needs a newer Pillow"),
}
_INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_RESIZE_MODES = ("shortest", "longest", "squash")
_OPEN_CLIP_KEYS = ("size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """How an image becomes model input; open_clip's `preprocess_cfg` with the size settled.

    Attributes:
        image_size: Height and width of the model input, in pixels.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1].
        interpolation: 'bicubic' or 'bilinear'.
        resize_mode: 'shortest' (then centre crop), 'longest' (then padding) or 'squash'.
        fill_color: Grey level 0 to 255 of the padding in 'longest'.

    Raises:
        ConfigError: A value is out of range.
    """

    image_size: tuple[int, int]
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    def __post_init__(self) -> None:
        _check(
            len(self.image_size) == 2 and all(_is_whole(side, 1, MAX_IMAGE_SIZE) for side in self.image_size),
            f"image_size as two whole numbers from 1 to {MAX_IMAGE_SIZE}",
            self.image_size,
        )
        _check(_are_numbers(self.mean), "mean as three finite numbers", self.mean)
        _check(
            _are_numbers(self.std) and min(self.std) > 0, "std as three finite numbers above zero", self.std
        )
        _check(
            self.interpolation in tuple(_INTERPOLATIONS),
            f"interpolation out of {', '.join(_INTERPOLATIONS)}",
            self.interpolation,
        )
        _check(
            self.resize_mode in _RESIZE_MODES,
            f"resize_mode out of {', '.join(_RESIZE_MODES)}",
            self.resize_mode,
        )
        _check(
            _is_whole(self.fill_color, 0, 255),
            "fill_color as a whole number from 0 to 255",
            self.fill_color,
        )

    @classmethod
    def from_open_clip(cls, cfg: Mapping[str, Any], image_size: int | Sequence[int]) -> Preprocess:
        """Read open_clip's `preprocess_cfg`; missing keys take open_clip's defaults.

        Args:
            cfg: The mapping under `preprocess_cfg`. Its `size` is ignored, as open_clip does.
            image_size: The image tower's own input size: one number or height and width.

        Raises:
            ConfigError: Unknown keys, another mode than RGB, or a value out of range.
        """
        unknown = sorted(set(cfg) - set(_OPEN_CLIP_KEYS))
        _check(not unknown, f"preprocess_cfg keys out of {', '.join(_OPEN_CLIP_KEYS)}", unknown)
        given = {key: value for key, value in cfg.items() if value is not None and key != "size"}
        _check(given.pop("mode", "RGB") == "RGB", "preprocess_cfg mode RGB", cfg.get("mode"))
        if (
            given.get("interpolation") == "random"
        ):  # open_clip: random in training only, bicubic in evaluation
            given["interpolation"] = "bicubic"
        for key in ("mean", "std"):
            if key in given:
                given[key] = _triple(given[key], key)
        return cls(image_size=_pair(image_size), **given)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """Return the inverse of `to_dict`.

        Raises:
            ConfigError: Unknown or missing keys, or a value out of range.
        """
        names = [field.name for field in fields(cls)]
        _check(sorted(values) == sorted(names), f"the preprocessing keys {', '.join(names)}", sorted(values))
        return cls(
            image_size=_pair(values["image_size"]),
            mean=_triple(values["mean"], "mean"),
            std=_triple(values["std"], "std"),
            interpolation=values["interpolation"],
            resize_mode=values["resize_mode"],
            fill_color=values["fill_color"],
        )


def decode_image(
    source: bytes | Path, *, max_pixels: int | None = None, name: str | None = None
) -> Image.Image:
    """Decode one image to 8-bit RGB, upright.

    Decoders raise errors of every class; each of them is an error of this image.

    EXIF orientation is applied; the first frame of an animation is taken; 16-bit grey is scaled to 8 bit by
    its high byte, as decoders do for 16-bit colour; alpha is dropped without blending, as Pillow's `convert`
    does.

    Args:
        source: The encoded file, or where it is.
        max_pixels: Larger images are refused before their pixels are decoded; 50 million, or what the
            environment variable CBPT_MAX_PIXELS says, when None.
        name: Of the image, for errors; its path when None.

    Raises:
        ImageDataError: Not an image, truncated, larger than `max_pixels`, or in a colour space that has no
            8-bit RGB.
        ConfigError: CBPT_MAX_PIXELS is no number.
    """
    max_pixels = max_pixels_here() if max_pixels is None else max_pixels
    name = name or ("the image bytes" if isinstance(source, bytes) else str(source))
    try:
        if isinstance(source, Path) and source.exists() and not source.is_file():
            raise ValueError("no regular file")  # a pipe would be waited for
        with Image.open(
            BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()
        ) as image:
            if image.width * image.height > max_pixels:
                raise _too_large(name, f"{image.width}×{image.height}", max_pixels)
            image.load()
            return _to_rgb(_upright(image))
    except ImageDataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, "a decompression bomb", max_pixels) from error
    except Exception as error:
        raise ImageDataError(
            expected=f"a whole, readable image ({', '.join(_formats())}) in {name}",
            got=missing_decoder(source) or _reason(error),
            fix="Replace or remove the file.",
        ) from error


def is_image(path: Path) -> bool:
    """Whether a file begins like an image `decode_image` takes.

    Its name does not matter and pixels are not read. A file that cannot be opened counts: reading it will
    say why.
    """
    try:
        with Image.open(path, formats=_formats()):
            return True
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return True  # too large an image is one
    except OSError as error:
        return error.errno is not None
    except Exception:  # decoders raise errors of every class
        return False


def missing_decoder(source: bytes | Path) -> str | None:
    """Return what a file is that only a decoder which is not there could read; None of all others."""
    try:
        if isinstance(source, bytes):
            head = source[:12]
        elif not source.is_file():  # a pipe would be waited for
            return None
        else:
            with source.open("rb") as stream:
                head = stream.read(12)
    except OSError:
        return None
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    boxed = ((needed, name) for name, (brands, needed) in _BOXED.items() if brand in brands)
    return next((needed for needed, name in boxed if not can_decode(name)), None)


def can_decode(name: str) -> bool:
    """Whether files of a format can be read here, by Pillow's name of it."""
    return name in _formats()


def max_pixels_here() -> int:
    """Return the most pixels an image may have where no server's profile says it.

    Raises:
        ConfigError: CBPT_MAX_PIXELS is no number from 1 to Pillow's own limit.
    """
    text = os.environ.get(MAX_PIXELS_VARIABLE, "").strip() or str(MAX_PIXELS)
    if not (text.isdecimal() and 1 <= int(text) <= MOST_PIXELS):
        raise ConfigError(
            expected=f"{MAX_PIXELS_VARIABLE} as a whole number from 1 to {MOST_PIXELS:,}",
            got=repr(text),
            fix="Correct or unset the environment variable.",
        )
    return int(text)


def to_pixels(image: Image.Image, preprocess: Preprocess) -> UInt8[np.ndarray, "height width 3"]:
    """Resizes and crops to the model's input size, byte for byte as open_clip's evaluation transform.

    An image that has the model's size already is not resampled.

    Raises:
        ImageDataError: One side is more than 100 times the other: resizing would need unreasonable memory. Or
            it cannot be resized for any other reason.
    """
    try:
        return _to_pixels(image, preprocess)
    except ImageDataError:
        raise
    except Exception as error:
        raise ImageDataError(
            expected=f"an image that can be resized to {preprocess.image_size[1]}×{preprocess.image_size[0]}",
            got=f"{image.width}×{image.height}: {_reason(error)}",
            fix="Replace or remove the file.",
        ) from error


def _to_pixels(image: Image.Image, preprocess: Preprocess) -> UInt8[np.ndarray, "height width 3"]:
    if image.mode != "RGB":
        image = _to_rgb(image)
    longer, shorter = max(image.size), min(image.size)
    if longer > MAX_ASPECT_RATIO * shorter:
        raise ImageDataError(
            expected=f"an image whose sides differ by at most a factor of {MAX_ASPECT_RATIO}",
            got=f"{image.width}×{image.height}",
            fix="Crop or remove the image.",
        )
    resized = _resize(image, _resized_size(image, preprocess), _INTERPOLATIONS[_interpolation(preprocess)])
    return np.array(_crop_or_pad(resized, preprocess), dtype=np.uint8)


def _resized_size(image: Image.Image, preprocess: Preprocess) -> tuple[int, int]:
    """Height and width after resizing, before cropping; the roundings are torchvision's and open_clip's."""
    target_height, target_width = preprocess.image_size
    if preprocess.resize_mode == "squash":
        return target_height, target_width
    if preprocess.resize_mode == "shortest" and target_height == target_width:
        if image.width <= image.height:
            return int(target_width * image.height / image.width), target_width
        return target_height, int(target_height * image.width / image.height)
    ratios = (image.height / target_height, image.width / target_width)
    ratio = max(ratios) if preprocess.resize_mode == "longest" else min(ratios)
    return max(1, round(image.height / ratio)), max(1, round(image.width / ratio))


def _interpolation(preprocess: Preprocess) -> str:
    # open_clip drops the configured interpolation for 'shortest' on a target that is not square.
    height, width = preprocess.image_size
    return "bicubic" if preprocess.resize_mode == "shortest" and height != width else preprocess.interpolation


def _resize(image: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    height, width = size
    return image if image.size == (width, height) else image.resize((width, height), resampling)


def _crop_or_pad(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    height, width = preprocess.image_size
    missing_width, missing_height = max(0, width - image.width), max(0, height - image.height)
    if missing_width or missing_height:
        border = (
            missing_width // 2,
            missing_height // 2,
            (missing_width + 1) // 2,
            (missing_height + 1) // 2,
        )
        image = ImageOps.expand(image, border, fill=(preprocess.fill_color,) * 3)
    if image.size == (width, height):
        return image
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF says nothing about the pixels
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        return _high_byte(image).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not defined")
    if "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB gives the same colours and a warning
    return image.convert("RGB")


def _high_byte(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("grey values beyond 16 bit")
    return Image.fromarray((values >> 8).astype(np.uint8))


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _too_large(name: str, size: str, max_pixels: int) -> ImageDataError:
    return ImageDataError(
        expected=f"at most {max_pixels:,} pixels in {name}",
        got=f"{size}, more than the {max_pixels:,} pixels allowed ({MAX_PIXELS_VARIABLE})",
        fix=f"Scale the image down or remove it, or allow more: {MAX_PIXELS_VARIABLE}, or a profile.",
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = str(error).split(" <_io")[0].strip()
    return text or type(error).__name__


def _check(holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise ConfigError(expected=expected, got=repr(got), fix="Correct the preprocessing configuration.")


def _are_numbers(values: Sequence[float]) -> bool:
    return len(values) == 3 and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        for value in values
    )


def _is_whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    _check(len(sides) in (1, 2), "an image size of one or two numbers", size)
    return sides[0], sides[-1]


def _triple(value: float | Sequence[float], key: str) -> tuple[float, float, float]:
    if isinstance(value, int | float):
        return (value, value, value)
    _check(isinstance(value, Sequence) and len(value) == 3, f"{key} as three numbers", value)
    return value[0], value[1], value[2]
