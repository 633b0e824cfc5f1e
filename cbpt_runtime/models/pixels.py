"""From 8-bit images to pixels in [0, 1] and back."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def to_float(
    images: UInt8[np.ndarray, "batch height width 3"], device: torch.device | str = "cpu"
) -> Float[Tensor, "batch 3 height width"]:
    """Turn 8-bit images into float32 pixels in [0, 1]; they travel to the device as bytes."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 255


def to_uint8(images: Float[Tensor, "batch 3 height width"]) -> UInt8[np.ndarray, "batch height width 3"]:
    """Round pixels in [0, 1] to 8 bits."""
    scaled = (images * 255).round().to(torch.uint8)
    return np.ascontiguousarray(scaled.permute(0, 2, 3, 1).cpu().numpy())
