"""Attack triggers: pure functions on pixels, with their published definitions.

A trigger maps float32 RGB images in [0, 1] at the model's own input size to triggered images of the same
shape and range. Everything random is drawn from the generator that is passed in; what an attacker fixes once
(a blended image, a warping field) is a property of the trigger itself and does not depend on that generator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cbpt_runtime.errors import ConfigError
from cbpt_runtime.models.pixels import to_float, to_uint8
from cbpt_runtime.redteam.image_triggers import (
    BadNet,
    BadNetRandom,
    BadNetStripes,
    Blended,
    BlendedNoise,
    Sig,
    WaNet,
)


def check_choice(what: str, value: object, valid: tuple[str, ...]) -> None:
    """Raise ConfigError that lists the valid values unless this is one of them."""
    if value not in valid:
        raise ConfigError(expected=f"a valid {what}", got=repr(value), fix=f"Valid are: {', '.join(valid)}.")


class Trigger(Protocol):
    """What every trigger is: a callable on a batch of pixels."""

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], generator: torch.Generator
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return triggered copies of `images`; the input is left as it is."""
        ...


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
    check_choice("trigger", name, tuple(TRIGGERS))
    kind = TRIGGERS[name]
    valid = tuple(field.name for field in dataclasses.fields(kind))
    for parameter in parameters:
        check_choice(f"parameter of {name}", parameter, valid)
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
