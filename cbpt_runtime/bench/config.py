"""What is measured, and how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cbpt_runtime.config import Above, Between, Config

Scenario = Literal["single-stream", "server", "offline", "sweep"]
SCENARIOS: tuple[Scenario, ...] = ("single-stream", "server", "offline", "sweep")
PERCENTILES = (50.0, 90.0, 95.0, 99.0)
BEYOND = 10  # observations that must lie beyond a percentile before it is named
MAX_TRIAL_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig(Config):
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
    rates_per_s: tuple[Annotated[float, Above(0)], ...] = ()
    concurrencies: tuple[Annotated[int, Between(1)], ...] = (1, 2, 4, 8, 16)
    batch_sizes: tuple[Annotated[int, Between(1)], ...] = (1, 2, 4, 8, 16, 32)
    class_counts: tuple[Annotated[int, Between(2)], ...] = ()
    duration_s: Annotated[float, Above(0)] = 10.0
    warmup_s: Annotated[float, Between(0)] = 1.0
    latency_bound_ms: Annotated[float, Above(0)] = 100.0
    percentile: float = 95.0
    timeout_s: Annotated[float, Above(0)] = 10.0
    clients: Annotated[int, Between(1)] = 1
    check_every: Annotated[int, Between(1)] = 4
    max_images: Annotated[int, Between(1)] = 256
    skip_unreadable: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        Config.__post_init__(self)
        if self.percentile not in PERCENTILES:
            self.refuse({"percentile": "one of " + ", ".join(f"{one:g}" for one in PERCENTILES)})
