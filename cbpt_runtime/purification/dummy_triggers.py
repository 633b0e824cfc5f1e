"""Dummy triggers: what a defender inverts for a suspected target, how they are stored, images under them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.errors import BundleError
from cbpt_runtime.purification.trigger_families import INVERSION_FAMILIES, Parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class DummyTrigger:
    """One trigger that a defender made.

    Attributes:
        family: Its name in `INVERSION_FAMILIES`.
        target: Index of the class that it is for.
        parameters: Of this trigger alone.
    """

    family: str
    target: int
    parameters: Parameters

    def apply(
        self, pixels: Float[Tensor, "batch 3 height width"], *, strength: float = 1.0
    ) -> Float[Tensor, "batch 3 height width"]:
        """Put the trigger on images in [0, 1]; `strength` is the share of the way there, in [0, 1]."""
        stacked = {name: value.to(pixels).unsqueeze(0) for name, value in self.parameters.items()}
        triggered = INVERSION_FAMILIES[self.family].apply_one(stacked, 0, pixels)
        return pixels.lerp(triggered, strength)


def to_tensors(triggers: Iterable[DummyTrigger]) -> dict[str, Tensor]:
    """Name each parameter ``family.target.parameter``."""
    return {
        f"{trigger.family}.{trigger.target}.{name}": value.contiguous()
        for trigger in triggers
        for name, value in trigger.parameters.items()
    }


def from_tensors(tensors: Mapping[str, Tensor]) -> list[DummyTrigger]:
    """Undo `to_tensors`; family after family.

    Raises:
        BundleError: A name that no dummy trigger of this version has.
    """
    found: defaultdict[str, defaultdict[int, Parameters]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in tensors.items():
        family, target, parameter = _parts(name)
        found[family][target][parameter] = tensor
    return [
        DummyTrigger(family=family, target=target, parameters=parameters)
        for family in INVERSION_FAMILIES
        for target, parameters in found[family].items()
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class TriggeredImages:
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
def paint_dummy_triggers(
    bundle: Bundle, images: UInt8[np.ndarray, "batch height width 3"]
) -> list[TriggeredImages]:
    """Put every dummy trigger of every suspected target, most suspicious first, on every image.

    Raises:
        BundleError: A trigger of a family this version does not know.
    """
    triggers = from_tensors({name: torch.from_numpy(tensor) for name, tensor in bundle.triggers().items()})
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255)
    painted = []
    for target in bundle.suspect_indices:
        for trigger in triggers:
            if trigger.target == target:
                shown = trigger.apply(pixels).clamp(0, 1).mul(255).round().byte()
                stored = shown.permute(0, 2, 3, 1).contiguous().numpy()
                painted.append(TriggeredImages(family=trigger.family, target=target, images=stored))
    return painted


def _parts(name: str) -> tuple[str, int, str]:
    """Family, class index and parameter out of ``family.index.parameter``."""
    parts = name.split(".")
    if len(parts) != 3 or parts[0] not in INVERSION_FAMILIES or not parts[1].isdigit():
        raise BundleError(
            expected=f"dummy triggers of the families {', '.join(INVERSION_FAMILIES)}",
            got=name,
            fix="Use the version of cbpt-runtime that made the bundle.",
        )
    return parts[0], int(parts[1]), parts[2]
