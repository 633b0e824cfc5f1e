"""The dummy triggers of a bundle, painted on images."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.errors import BundleError
from cbpt_runtime.purification.trigger_families import REFINE_FAMILIES, Parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Painted:
    """Images with one dummy trigger on them.

    Attributes:
        family: Name of the trigger's family.
        target: Class index of the suspected target it was inverted for.
        images: RGB at the model's size.
    """

    family: str
    target: int
    images: UInt8[np.ndarray, "batch height width 3"]


@torch.inference_mode()
def paint_dummy_triggers(bundle: Bundle, images: UInt8[np.ndarray, "batch height width 3"]) -> list[Painted]:
    """Every dummy trigger of every suspected target, most suspicious first, on every image.

    Raises:
        BundleError: A trigger of a family this version does not know.
    """
    parameters: defaultdict[tuple[int, str], Parameters] = defaultdict(dict)
    for name, tensor in bundle.triggers().items():
        family, target, key = _parts(name)
        parameters[target, family][key] = torch.from_numpy(tensor).unsqueeze(0)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).unsqueeze(0)
    painted = []
    for target in bundle.suspect_indices:
        for family, trigger in REFINE_FAMILIES.items():
            if own := parameters.get((target, family)):
                shown = trigger.apply(own, pixels)[0].clamp(0, 1).mul(255).round().byte()
                stored = shown.permute(0, 2, 3, 1).contiguous().numpy()
                painted.append(Painted(family=family, target=target, images=stored))
    return painted


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
