"""What the settings of every method share: strict keys, and when to compute in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, TypeVar

import torch

from cbpt_runtime.errors import ConfigError

Precision = Literal["auto", "fp32", "bf16"]
Settings = TypeVar("Settings")


def from_known_keys(settings: type[Settings], values: Mapping[str, Any], what: str) -> Settings:
    """A settings dataclass from plain values; `what` names the keys in the error.

    Raises:
        ConfigError: An unknown key or a bad value.
    """
    known = [field.name for field in fields(settings)]  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(
            expected=what + ", ".join(known),
            got=", ".join(unknown),
            fix="Correct or remove the unknown keys.",
        )
    return settings(**values)


def is_mixed(precision: Precision, device: torch.device) -> bool:
    """Whether to compute in bfloat16; `auto` is where the device has instructions for it."""
    return precision == "bf16" or (precision == "auto" and _has_bfloat16(device))


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(
        capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16")
    )
