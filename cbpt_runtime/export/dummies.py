"""The dummy triggers of a bundle, painted on images: what a smaller precision must not bring back to life."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from jaxtyping import UInt8

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.errors import BundleError
from cbpt_runtime.triggers import REFINE_FAMILIES, Parameters


def triggered_images(
    bundle: Bundle, images: UInt8[np.ndarray, "batch height width 3"]
) -> list[tuple[int, UInt8[np.ndarray, "batch height width 3"]]]:
    """Every dummy trigger of a suspected target on every image.

    Returns:
        Class index of the suspected target, and the images with the trigger.

    Raises:
        BundleError: A trigger of a family this version does not know.
    """
    groups: dict[tuple[str, int], Parameters] = defaultdict(dict)
    for name, value in bundle.triggers().items():
        family, index, parameter = _parts(name)
        groups[family, index][parameter] = torch.from_numpy(value)[None]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()[None] / 255
    result = []
    for (family, index), parameters in groups.items():
        if index in bundle.suspect_indices:
            painted = REFINE_FAMILIES[family].apply(parameters, pixels)[0].clamp(0, 1)
            stored = (painted * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
            result.append((index, stored.contiguous().numpy()))
    return result


def _parts(name: str) -> tuple[str, int, str]:
    """Family, class index and parameter out of ``family.index.parameter``."""
    parts = name.split(".")
    if len(parts) != 3 or parts[0] not in REFINE_FAMILIES or not parts[1].isdigit():
        raise BundleError(
            expected=f"dummy triggers of the families {', '.join(REFINE_FAMILIES)}",
            got=name,
            fix="Use the version of cbpt-runtime that made the bundle.",
        )
    return parts[0], int(parts[1]), parts[2]
