"""Settings: a range beside each field, checked when they are made; and when to compute in bfloat16."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from cbpt_runtime.errors import ConfigError

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, slots=True)
class Between:
    """The least and the largest value of a number, both allowed; finite numbers only.

    For `Annotated[int, Between(1, 64)]` and `Annotated[float, Between(0, 1)]`.
    """

    least: float
    largest: float = sys.float_info.max

    def holds(self, value: float) -> bool:
        """Say whether a number lies in the range."""
        return self.least <= value <= self.largest

    def __str__(self) -> str:
        if self.largest == sys.float_info.max:
            return f"of at least {self.least:g}"
        return f"from {self.least:,} to {self.largest:,}"


@dataclass(frozen=True, slots=True)
class Above:
    """What a number has to be above, and the largest value if there is one; finite numbers only."""

    bound: float
    largest: float = sys.float_info.max

    def holds(self, value: float) -> bool:
        """Say whether a number lies in the range."""
        return self.bound < value <= self.largest

    def __str__(self) -> str:
        return f"above {self.bound:g}" + (
            "" if self.largest == sys.float_info.max else f", at most {self.largest:,}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Base of all settings: fields are checked by their annotations, and travel as JSON.

    `bool`, `Literal`, `Annotated[int, ...]`, `Annotated[float, ...]`, tuples of them and `None` beside them
    are checked; a field of another type is not.

    Raises:
        ConfigError: A value is of another kind or out of its range; the text names every such field.
    """

    def __post_init__(self) -> None:
        values = {name: (hint, getattr(self, name)) for name, hint in _hints(type(self)).items()}
        self.refuse(
            {name: expected for name, (hint, value) in values.items() if (expected := _problem(hint, value))}
        )

    def refuse(self, expected: Mapping[str, str]) -> None:
        """Raise ConfigError for fields that are not as expected, if there are any."""
        if expected:
            raise ConfigError(
                expected="; ".join(f"{name} to be {what}" for name, what in expected.items()),
                got="; ".join(f"{name} = {getattr(self, name)!r}" for name in expected),
                fix="Correct the value.",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make settings from plain values; missing ones take their defaults.

        Raises:
            ConfigError: An unknown key or a bad value.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(
                expected="keys out of " + ", ".join(known),
                got=", ".join(unknown),
                fix="Correct or remove the unknown keys.",
            )
        return cls(**values)


def read_settings(path: str | Path | None = None, **overrides: Any) -> dict[str, Any]:
    """Read keys and values from a JSON file, if there is one; overrides that are not None win.

    Raises:
        ConfigError: The file cannot be read, or is not a JSON object.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigError(
                expected=f"a JSON file with a configuration at {path}",
                got=str(reason),
                fix="Write one JSON object; `method.config` of a bundle's manifest.json shows all keys.",
            ) from error
        if not isinstance(values, dict):
            raise ConfigError(
                expected=f"one JSON object in {path}",
                got=type(values).__name__,
                fix='Write the keys to change, for example {"seed": 1}.',
            )
    return values | {key: value for key, value in overrides.items() if value is not None}


def is_mixed(precision: Precision, device: torch.device) -> bool:
    """Say whether to compute in bfloat16; `auto` is where the device has instructions for it."""
    return precision == "bf16" or (precision == "auto" and _has_bfloat16(device))


def _hints(kind: type[Config]) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def _problem(hint: Any, value: object, ranges: tuple[Any, ...] = ()) -> str:
    """Return what is expected instead of the value; empty where it is fine."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _problem(arguments[0], value, arguments[1:])
    if origin in (Union, UnionType):
        problems = [_problem(one, value, ranges) for one in arguments]
        return "" if "" in problems else " or ".join(problems)
    if origin is tuple and isinstance(value, tuple):
        return next((problem for one in value if (problem := _problem(arguments[0], one))), "")
    if origin is Literal:
        return "" if value in arguments else "one of " + ", ".join(map(str, arguments))
    if hint is type(None):
        return "" if value is None else "nothing"
    if hint is bool:
        return "" if isinstance(value, bool) else "true or false"
    if hint in (int, float):
        kinds = int if hint is int else (int, float)
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        if is_number and all(one.holds(value) for one in ranges):
            return ""
        return " ".join(["a whole number" if hint is int else "a number", *map(str, ranges)])
    return ""


def _has_bfloat16(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if torch.backends.cpu.get_cpu_capability() == "AVX2":  # all it has, or all it may
        return False
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(
        capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16")
    )
