"""Deployment targets: what a server's configuration differs in, checked when it is read."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cbpt_runtime.errors import ConfigError
from cbpt_runtime.export.session import PROVIDERS, Provider

PRECISIONS = ("fp32", "fp16", "int8")
MAX_BATCH = 4096


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """How a classifier is to be served.

    Attributes:
        provider: 'cpu', 'cuda' or 'tensorrt'.
        precision: 'fp32', 'fp16' or 'int8'.
        max_batch: Largest batch the server may form.
        instances: Copies of the classifier; of one GPU, or sharing the CPUs.
        threads: Of one CPU instance; the usable CPUs divided by the instances when 0.
        decoders: Processes that decode and resize images; up to 4, one per usable CPU, when 0.
        max_queue_size: Requests that may wait; more are rejected.
        queue_timeout_ms: How long a request may wait before it is rejected.
        max_queue_delay_us: How long the server may wait for a batch to fill.
        max_pixels: Larger images are refused before they are decoded.
        max_image_bytes: Larger files are refused.
        tensorrt_workspace_bytes: Memory TensorRT may use while it builds an engine.
        tensorrt_cache: Folder for built engines, writable by the server.

    Raises:
        ConfigError: A value is out of range.
    """

    provider: Provider = "cpu"
    precision: str = "fp32"
    max_batch: int = 64
    instances: int = 1
    threads: int = 0
    decoders: int = 0
    max_queue_size: int = 256
    queue_timeout_ms: int = 2000
    max_queue_delay_us: int = 0
    max_pixels: int = 50_000_000
    max_image_bytes: int = 20_000_000
    tensorrt_workspace_bytes: int = 2**31
    tensorrt_cache: str = "/tmp/cbpt-tensorrt"  # noqa: S108

    def __post_init__(self) -> None:
        ranges = {
            "max_batch": (1, MAX_BATCH),
            "instances": (1, 64),
            "threads": (0, 1024),
            "decoders": (0, 256),
            "max_queue_size": (1, 1_000_000),
            "queue_timeout_ms": (1, 3_600_000),
            "max_queue_delay_us": (0, 10_000_000),
            "max_pixels": (1, 1_000_000_000),
            "max_image_bytes": (1, 1_000_000_000),
            "tensorrt_workspace_bytes": (2**20, 2**40),
        }
        problems = [
            f"{name} = {getattr(self, name)!r} (a whole number from {low:,} to {high:,})"
            for name, (low, high) in ranges.items()
            if not _is_whole(getattr(self, name), low, high)
        ]
        for name, valid in (("provider", tuple(PROVIDERS)), ("precision", PRECISIONS)):
            if getattr(self, name) not in valid:
                problems.append(f"{name} = {getattr(self, name)!r} (one of {', '.join(valid)})")
        if not isinstance(self.tensorrt_cache, str) or not Path(self.tensorrt_cache).is_absolute():
            problems.append(f"tensorrt_cache = {self.tensorrt_cache!r} (an absolute path)")
        if problems:
            raise ConfigError(
                expected="profile values in range",
                got="; ".join(problems),
                fix="Correct the profile or the flag.",
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Profile:
        """A profile from its fields; missing ones take their defaults.

        Raises:
            ConfigError: An unknown key or a value out of range.
        """
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ConfigError(
                expected=f"profile keys out of {', '.join(names)}",
                got=", ".join(unknown),
                fix="Remove or correct the key.",
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return asdict(self)


BUILT_IN: dict[str, Profile] = {
    "cpu": Profile(),
    "cuda": Profile(provider="cuda", instances=2),
    "tensorrt": Profile(provider="tensorrt"),
}


def read_profile(name: str | Path, **overrides: Any) -> Profile:
    """A built-in profile by name, or one from a TOML file; overrides that are not None win.

    Raises:
        ConfigError: Neither, not TOML, an unknown key or a value out of range.
    """
    if str(name) in BUILT_IN:
        values = BUILT_IN[str(name)].to_dict()
    else:
        try:
            values = tomllib.loads(Path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigError(
                expected=f"a profile out of {', '.join(BUILT_IN)}, or a TOML file",
                got=f"{name} ({reason})",
                fix="Choose one of them, or start from a file in export/profiles/.",
            ) from error
    values |= {key: value for key, value in overrides.items() if value is not None}
    return Profile.from_dict(values)
