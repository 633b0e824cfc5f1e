"""What is measured, and how long."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cbpt_runtime.errors import ConfigError

Scenario = Literal["single-stream", "server", "offline", "sweep"]
SCENARIOS: tuple[Scenario, ...] = ("single-stream", "server", "offline", "sweep")
PERCENTILES = (50.0, 90.0, 95.0, 99.0)
BEYOND = 10  # observations that must lie beyond a percentile before it is named
MAX_TRIAL_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """What is measured, and how long.

    Attributes:
        scenarios: Any of single-stream, server, offline and sweep.
        rates_per_s: Open-loop rates of the server scenario; searched for when empty.
        concurrencies: Requests on their way at once in the closed-loop sweep.
        batch_sizes: Images per batch in the offline scenario; larger ones than the target takes are left out.
        class_counts: Sizes of heads timed with the graph of an ONNX file or repository.
        duration_s: Of each run, without warm-up.
        warmup_s: Before each run; what happens in it is not counted.
        latency_bound_ms: What the searched rate must stay under ...
        percentile: ... in this share of the requests, in percent.
        timeout_s: After which a request counts as lost.
        clients: Processes that send requests to a server.
        check_every: One answer in so many is compared with the one from before the timing.
        max_images: Files read from the folder of images.
        skip_unreadable: Do without files that are no whole images.
        seed: Of arrivals and of the order of images.

    Raises:
        ConfigError: A value is out of range.
    """

    scenarios: tuple[Scenario, ...] = SCENARIOS
    rates_per_s: tuple[float, ...] = ()
    concurrencies: tuple[int, ...] = (1, 2, 4, 8, 16)
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    class_counts: tuple[int, ...] = ()
    duration_s: float = 10.0
    warmup_s: float = 1.0
    latency_bound_ms: float = 100.0
    percentile: float = 95.0
    timeout_s: float = 10.0
    clients: int = 1
    check_every: int = 4
    max_images: int = 256
    skip_unreadable: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("duration_s", "latency_bound_ms", "timeout_s", "clients", "check_every", "max_images")
        problems = [
            f"{name} = {getattr(self, name)} (above 0)"
            for name in positive
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0)
        ]
        for name in ("rates_per_s", "concurrencies", "batch_sizes", "class_counts"):
            bad = [value for value in getattr(self, name) if not (math.isfinite(value) and value > 0)]
            problems += [f"{name} = {value} (above 0)" for value in bad]
        if not (math.isfinite(self.warmup_s) and self.warmup_s >= 0):
            problems.append(f"warmup_s = {self.warmup_s} (at least 0)")
        if self.percentile not in PERCENTILES:
            problems.append(f"percentile = {self.percentile:g} (one of 50, 90, 95, 99)")
        unknown = [name for name in self.scenarios if name not in SCENARIOS]
        problems += [f"scenario {name!r} (one of {', '.join(SCENARIOS)})" for name in unknown]
        if any(count < 2 for count in self.class_counts):
            problems.append("class_counts below 2")
        if problems:
            raise ConfigError(
                expected="bench settings in range", got="; ".join(problems), fix="Correct the flag."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return asdict(self)
