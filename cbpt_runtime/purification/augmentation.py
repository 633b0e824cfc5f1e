"""The few clean images mirrored and cropped a little, so that less is learnt by heart."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

N_AUGMENTATIONS = 4
_PART = 256
_CROPPED = (0.0, 0.12, 0.2, 0.25)


def augment(
    images: UInt8[Tensor, "batch 3 height width"], number: int, generator: torch.Generator
) -> Iterator[Float[Tensor, "part 3 height width"]]:
    """Mirror and crop images, in [0, 1]: every other time mirrored, each time cropped more than before.

    They come in parts: 16 images of each of 1,000 classes, of 224 pixels, take ten gigabytes as numbers.

    Args:
        images: RGB at the model's size.
        number: Which augmentation, 0 to `N_AUGMENTATIONS` - 1.
        generator: Of the place of the crop, the same for all images.
    """
    height, width = images.shape[-2:]
    kept = (round(height * (1 - _CROPPED[number])), round(width * (1 - _CROPPED[number])))
    top = left = 0
    if kept != (height, width):
        top = int(torch.randint(height - kept[0] + 1, (), generator=generator))
        left = int(torch.randint(width - kept[1] + 1, (), generator=generator))
    for part in images.split(_PART):
        pixels = part.float() / 255
        if number % 2 == 0:
            pixels = pixels.flip(-1)
        if kept != (height, width):
            crop = pixels[..., top : top + kept[0], left : left + kept[1]]
            pixels = interpolate(crop, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        yield pixels
