"""The dummy triggers of a bundle, painted on images: what a smaller precision must not bring back to life."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from jaxtyping import UInt8

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.errors import BundleError
from cbpt_runtime.triggers import FAMILIES


def triggered_images(
    bundle: Bundle, images: UInt8[np.ndarray, "batch height width 3"]
) -> list[tuple[int, UInt8[np.ndarray, "batch height width 3"]]]:
    """Every dummy trigger of a suspected target on every image.

    Returns:
        Class index of the suspected target, and the images with the trigger.

    Raises:
        BundleError: A trigger of a family this version does not know.
    """
    groups: dict[tuple[str, str], dict[str, torch.Tensor]] = defaultdict(dict)
    for key, value in bundle.triggers().items():
        owner, family, parameter = key.rsplit("/", 2) if key.count("/") >= 2 else ("", key, "")
        groups[owner, family][parameter] = torch.from_numpy(value)[None]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()[None] / 255
    result = []
    for (owner, family), parameters in groups.items():
        if family not in FAMILIES or owner not in bundle.class_names:
            raise BundleError(
                expected=f"dummy triggers of the bundle's classes and of {', '.join(FAMILIES)}",
                got=f"{owner}/{family}",
                fix="Use the version of cbpt-runtime that made the bundle.",
            )
        index = bundle.class_names.index(owner)
        if index in bundle.suspect_indices:
            painted = FAMILIES[family].apply(parameters, pixels)[0].clamp(0, 1)
            painted_bytes = (painted * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
            result.append((index, painted_bytes.contiguous().numpy()))
    return result
