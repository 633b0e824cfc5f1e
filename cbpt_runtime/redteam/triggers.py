"""Attack triggers by name: pure functions on pixels, and those that were learned against a model.

A trigger maps float32 RGB images in [0, 1] at the model's own input size to triggered images of the same
shape and range. Everything random is drawn from the generator that is passed in; what an attacker fixes once
(a blended image, a warping field) is a property of the trigger itself and does not depend on that generator.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cbpt_runtime.artifacts.names import utf8_path
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
    paste,
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


@dataclass(frozen=True, eq=False, kw_only=True)
class OptimisedPatch:
    """A square patch whose pixels were optimised on a clean model (TrojanVQA; BadCLIP by Liang et al.).

    Args:
        patch: Pixels in [0, 1].
        location: A corner, `center` or `random`.
    """

    patch: Float[Tensor, "3 size size"]
    location: str = "center"

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], generator: torch.Generator
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return triggered copies of the images."""
        patches = self.patch.to(images).expand(len(images), -1, -1, -1)
        return paste(images, patches, self.location, generator)


@dataclass(frozen=True, eq=False, kw_only=True)
class Steganographic:
    """A sample-specific, nearly invisible trigger: an encoder hides a fixed secret in every image.

    ISSBA (Li et al., arXiv:2012.03816) uses a pre-trained StegaStamp encoder that is not published with the
    CLIP attacks; this one is small and trained by us (see `steganography`), so the image of the trigger
    differs but the mechanism is the same: the added residual depends on the image.

    Args:
        encoder: The encoder, in evaluation mode.
        secret: The hidden bits, 0 or 1.
    """

    encoder: SecretEncoder
    secret: Float[Tensor, " bits"]

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], generator: torch.Generator
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return triggered copies of the images."""
        secret = self.secret.to(images).expand(len(images), -1)
        hidden: Tensor = self.encoder(images, secret)
        return hidden


class SecretEncoder(nn.Module):
    """Adds a bounded residual that carries bits to an image of any size of at least 8 pixels.

    Args:
        bits: Length of the secret.
        channels: Width of the hidden layers.
        strength: Largest change of a pixel, in [0, 1] units.
    """

    def __init__(self, *, bits: int = 16, channels: int = 24, strength: float = 8 / 255) -> None:
        super().__init__()
        self.bits = bits
        self.channels = channels
        self.strength = strength
        self.pattern = nn.Linear(bits, channels * 8 * 8)
        self.image_in = nn.Conv2d(3, channels, 3, padding=1)
        self.mix = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.deep = nn.Conv2d(channels, channels, 3, padding=1)
        self.out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], secret: Float[Tensor, "batch bits"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return the images with the secrets in them, in [0, 1]."""
        pattern = self.pattern(2 * secret - 1).view(-1, self.channels, 8, 8)
        pattern = F.interpolate(pattern, size=images.shape[-2:], mode="nearest")
        hidden = F.relu(self.mix(torch.cat((self.image_in(images), pattern), dim=1)))
        hidden = F.relu(self.deep(hidden))
        return (images + self.strength * torch.tanh(self.out(hidden))).clamp(0, 1)


def trigger_bytes(trigger: Trigger) -> bytes:
    """Return a trigger as a safetensors file: its parameters as metadata, what it learned as tensors."""
    tensors: dict[str, Tensor] = {}
    described = describe_trigger(trigger)
    if isinstance(trigger, OptimisedPatch):
        tensors = {"patch": trigger.patch}
    elif isinstance(trigger, Steganographic):
        tensors = {"secret": trigger.secret, **trigger.encoder.state_dict()}
        sizes = {name: getattr(trigger.encoder, name) for name in ("bits", "channels", "strength")}
        described = {**described, **sizes}
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    return save(plain, metadata={"trigger": json.dumps(described)})


def load_trigger(path: Path) -> Trigger:
    """Read a file `trigger_bytes` made; only numbers are read, nothing is executed.

    Raises:
        ConfigError: The file is missing or no trigger file.
    """
    try:
        with utf8_path(path) as name, safe_open(name, framework="pt") as file:
            described = json.loads((file.metadata() or {})["trigger"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return _rebuild(described, tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            expected="a trigger file as `attack implant` writes it beside its victim (trigger.safetensors)",
            got=f"{path}: {type(error).__name__}: {str(error)[:200]}",
            fix="Name such a file, or a trigger by name.",
        ) from error


def _rebuild(described: Mapping[str, object], tensors: dict[str, Tensor]) -> Trigger:
    parameters = dict(described)
    kind = parameters.pop("kind")
    if kind == "OptimisedPatch":
        return OptimisedPatch(patch=tensors["patch"], location=str(parameters["location"]))
    if kind == "Steganographic":
        secret = tensors.pop("secret")
        encoder = SecretEncoder(**parameters)  # type: ignore[arg-type]
        encoder.load_state_dict(tensors)
        return Steganographic(encoder=encoder.eval().requires_grad_(False), secret=secret)
    names = {trigger.__name__: name for name, trigger in TRIGGERS.items() if name != "wanet-clip"}
    return get_trigger(names[str(kind)], **parameters)
