"""Position embeddings of an image tower for another image size than they were trained for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from cbpt_runtime.errors import CheckpointError

POSITIONS = (
    "visual.positional_embedding",
    "visual.attnpool.positional_embedding",
    "visual.trunk.pos_embed",
)
"""Where image towers keep one embedding per patch."""

_MOST_PIXELS = 4096
_RESNET_STRIDE = 32


def with_image_size(config: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """A model configuration with another image size.

    Raises:
        CheckpointError: A size that the patches of the image tower do not fill.
    """
    vision = dict(config.get("vision_cfg") or {})
    is_resnet = isinstance(vision.get("layers"), list | tuple)
    patch = (
        _RESNET_STRIDE if is_resnet else vision.get("patch_size", 1 if vision.get("timm_model_name") else 16)
    )
    if not isinstance(patch, int) or not 0 < image_size <= _MOST_PIXELS or image_size % patch:
        raise CheckpointError(
            expected=f"an image size of up to {_MOST_PIXELS} pixels in whole patches of {patch}",
            got=str(image_size),
            fix="Choose another --image-size.",
        )
    return {**config, "vision_cfg": {**vision, "image_size": image_size}}


def resize_positions(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Position embeddings brought to the architecture's grid of patches, bicubically as open_clip does it.

    Those of a class token stay as they are. Where no square grids are to be seen nothing is changed.

    Returns:
        The weights, and remarks on what was resized.
    """
    resized, notes = dict(tensors), []
    for key in POSITIONS:
        if key not in tensors or key not in expected or tensors[key].shape == expected[key].shape:
            continue
        given, wanted = tensors[key], expected[key]
        side = math.isqrt(wanted.shape[-2])
        extra = wanted.shape[-2] - side * side
        trained = math.isqrt(max(0, given.shape[-2] - extra))
        if extra > 1 or not trained or trained * trained + extra != given.shape[-2]:
            continue
        rows = given.reshape(given.shape[-2:]).float()
        grid = rows[extra:].reshape(1, trained, trained, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
        patches = grid.permute(0, 2, 3, 1).reshape(side * side, -1)
        both = F.pad(patches, (0, 0, extra, 0))
        both[:extra] = rows[:extra]
        resized[key] = both.reshape((*given.shape[:-2], *both.shape)).to(given.dtype)
        notes.append(f"{key} resized from {trained}×{trained} to {side}×{side} patches, as asked for")
    return resized, tuple(notes)
