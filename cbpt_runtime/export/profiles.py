"""Deployment targets: what a server's configuration differs in, checked when it is read."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cbpt_runtime.config import Between, Config
from cbpt_runtime.errors import ConfigError

MAX_BATCH = 4096
Provider = Literal["cpu", "cuda", "tensorrt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile(Config):
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
        second_look: Whether suspicious images are looked at again, partly covered.
        tensorrt_workspace_bytes: Memory TensorRT may use while it builds an engine.
        tensorrt_cache: Folder for built engines, writable by the server.

    Raises:
        ConfigError: A value is out of range.
    """

    provider: Provider = "cpu"
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    max_batch: Annotated[int, Between(1, MAX_BATCH)] = 64
    instances: Annotated[int, Between(1, 64)] = 1
    threads: Annotated[int, Between(0, 1024)] = 0
    decoders: Annotated[int, Between(0, 256)] = 0
    max_queue_size: Annotated[int, Between(1, 1_000_000)] = 256
    queue_timeout_ms: Annotated[int, Between(1, 3_600_000)] = 2000
    max_queue_delay_us: Annotated[int, Between(0, 10_000_000)] = 0
    max_pixels: Annotated[int, Between(1, 1_000_000_000)] = 50_000_000
    max_image_bytes: Annotated[int, Between(1, 1_000_000_000)] = 20_000_000
    second_look: bool = False
    tensorrt_workspace_bytes: Annotated[int, Between(2**20, 2**40)] = 2**31
    tensorrt_cache: str = "/tmp/cbpt-tensorrt"  # noqa: S108

    def __post_init__(self) -> None:
        Config.__post_init__(self)
        if not isinstance(self.tensorrt_cache, str) or not Path(self.tensorrt_cache).is_absolute():
            self.refuse({"tensorrt_cache": "an absolute path"})


BUILT_IN: dict[str, Profile] = {
    "cpu": Profile(),
    "cuda": Profile(provider="cuda", instances=2),
    "tensorrt": Profile(provider="tensorrt"),
}


def read_profile(name: str | Path, **overrides: Any) -> Profile:
    """Return a built-in profile by name, or one from a TOML file; overrides that are not None win.

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
