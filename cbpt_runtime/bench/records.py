"""What a bench run finds, as records that say themselves in words, and as ``bench.json`` holds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from cbpt_runtime.bench.generator import Observations
    from cbpt_runtime.evaluation.metrics import Rate

KIND = "cbpt-runtime bench"
SCHEMA_VERSION = 1
COLUMNS = ("run", "answers/s", "p50 ms", "p95 ms", "p99 ms", "max ms", "n", "lost", "batch", "client CPU")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """Answers during the timing, compared with those before it."""

    checked: int
    wrong: int
    largest_difference: float

    @classmethod
    def of(cls, seen: Sequence[Observations]) -> Checked:
        """Return what all senders compared."""
        return cls(
            checked=sum(part.checked for part in seen),
            wrong=sum(part.outcomes.count("wrong") for part in seen),
            largest_difference=max(part.largest_difference for part in seen),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Senders:
    """The processes that sent a load; none where this one asked itself.

    Attributes:
        processes: How many.
        cpu_share: Of one processor, all of them together.
        is_bottleneck: Whether one was so busy that it may be what was measured.
    """

    processes: int = 0
    cpu_share: float = 0.0
    is_bottleneck: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Where the time went in this process: files to pixels, and pixels to answers."""

    decode_ms_per_image: float
    compute_ms_per_image: float
    decode_ms_per_batch: float
    compute_ms_per_batch: float
    mean_batch_size: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One load and what came of it. What its kind of loop does not have is None, and left out of the JSON.

    Attributes:
        loop: 'open', 'closed', or 'none': whole batches one after the other.
        batch_size: Images per request.
        throughput_per_s: Images answered per second; `achieved_rate_per_s` are requests.
        concurrency: Requests on their way at once in a closed loop.
        offered_rate_per_s: What the drawn arrivals made of the rate that was asked for.
        kept_up: Whether an open loop achieved that.
        held: Whether a trial of a search stayed under the bound.
        outcomes: Requests by how they ended.
        latency_ms: Summary of the latencies; `latencies_ms` has all of them.
        lateness_ms: Summary of how much later than due requests were sent.
        passes_per_s: Images per second of every whole batch; `compute_only_per_s`: without decoding.
        stages: Where the time went in this process; `triton`: by the account of a server.
    """

    loop: Literal["open", "closed", "none"]
    batch_size: int
    throughput_per_s: float
    answers: Checked
    generator: Senders
    concurrency: int | None = None
    target_rate_per_s: float | None = None
    offered_rate_per_s: float | None = None
    kept_up: bool | None = None
    held: bool | None = None
    duration_s: float | None = None
    achieved_rate_per_s: float | None = None
    outcomes: dict[str, int] | None = None
    latency_ms: dict[str, Any] | None = None
    histogram: dict[str, Any] | None = None
    latencies_ms: tuple[float, ...] | None = None
    lateness_ms: dict[str, Any] | None = None
    passes_per_s: tuple[float, ...] | None = None
    compute_only_per_s: float | None = None
    stages: Stages | None = None
    triton: dict[str, Any] | None = None

    @property
    def lost(self) -> int:
        """Requests that were not answered, or wrongly."""
        return sum(count for outcome, count in (self.outcomes or {}).items() if outcome != "answered")

    @property
    def mean_batch_size(self) -> float | None:
        """Images computed together, on average; None where nobody counted."""
        counted: list[float | None] = [
            entry["mean_batch_size"]
            for name, entry in (self.triton or {}).items()
            if name.endswith("_classifier")
        ]
        return counted[-1] if counted else None if self.stages is None else self.stages.mean_batch_size

    def ms(self, key: str) -> float | None:
        """Return a number of the summary of the latencies, where the sample carries it."""
        return (self.latency_ms or {}).get(key)

    def __str__(self) -> str:
        """Return what was asked for, in words."""
        if self.loop == "open":
            kept = "" if self.kept_up else " (fell behind)"
            return f"open loop {self.target_rate_per_s:.4g}/s{kept}"
        if self.loop == "none":
            return f"batch {self.batch_size}"
        if self.concurrency == self.batch_size == 1:
            return "one at a time"
        batch = f", batch {self.batch_size}" if self.batch_size > 1 else ""
        return f"closed loop {self.concurrency} at once{batch}"

    def row(self, scenario: str) -> tuple[str, ...]:
        """Return a row under `COLUMNS`."""
        latencies = [self.ms(key) for key in ("p50", "p95", "p99", "max")]
        size, count = self.mean_batch_size, self.ms("n")
        return (
            f"{scenario}, {self}",
            f"{self.throughput_per_s:.4g}",
            *("–" if ms is None else f"{ms:.3g}" if ms < 100 else f"{ms:.0f}" for ms in latencies),
            str(len(self.passes_per_s or ()) if count is None else count),
            str(self.lost),
            "–" if size is None else f"{size:.2g}",
            f"{100 * self.generator.cpu_share:.0f} %" if self.generator.processes else "–",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A rate that was tried, and whether it held."""

    rate_per_s: float
    held: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A search for the highest rate with a percentile of the latencies within a bound.

    Attributes:
        percentile: In percent.
        latency_bound_ms: The bound.
        held_per_s: The highest rate that held; None when none did.
        failed_per_s: The lowest rate above it that did not hold; None when none was tried.
        trials: In the order they were made.
    """

    percentile: float
    latency_bound_ms: float
    held_per_s: float | None
    failed_per_s: float | None
    trials: tuple[Trial, ...]

    def __str__(self) -> str:
        bound = f"p{self.percentile:g} within {self.latency_bound_ms:g} ms"
        if self.held_per_s is None:
            return f"no rate held {bound}"
        failed = "" if self.failed_per_s is None else f"; {self.failed_per_s:.4g} did not hold"
        return f"holds {self.held_per_s:.4g} per second with {bound}{failed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTiming:
    """Latency and size of a graph with a head of so many classes."""

    classes: int
    latency_ms: float
    latencies_ms: tuple[float, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a scenario found; a search where a rate was searched for, heads where they were asked for."""

    runs: tuple[Run, ...]
    search: Search | None = None
    classes: tuple[HeadTiming, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stated:
    """Accuracy and attack success in [0, 1] that somebody else measured, and where that is written."""

    where: str | None = None
    clean_accuracy: float | None = None
    attack_success_rate: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How good the answers of a system are.

    Attributes:
        clean_accuracy: Over the images; None where they do not lie in folders named like classes.
        attack_success_rate: Over triggered images; None without any.
        stated: What a bundle or repository says of itself.
        unmatched: Folders of images that are no class, for the sake of which there is no clean accuracy.
    """

    clean_accuracy: Rate | None
    attack_success_rate: Rate | None
    stated: Stated
    unmatched: tuple[str, ...]

    def __str__(self) -> str:
        """CA and ASR in words, and who measured them."""
        measured, stated = [], []
        for key, short in (("clean_accuracy", "CA"), ("attack_success_rate", "ASR")):
            here, there = getattr(self, key), getattr(self.stated, key)
            if here is not None and here.rate is not None:
                measured.append(f"{short} {100 * here.rate:.1f} % of {here.total}")
            elif there is not None:
                stated.append(f"{short} {100 * there:.1f} % stated")
        return ", ".join(measured + stated) or "CA and ASR unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemResult:
    """What was measured of one system.

    Attributes:
        name: Short, unique in a result.
        kind: 'bundle', 'onnx', 'repository' or 'url'.
        facts: What it is: digests, provider really used, threads, precision; as JSON can hold them.
        quality: How good its answers are.
        checked_before: Answers before the timing.
        scenarios: What each found.
        perf_analyzer: What Triton's own load tool found, where it was asked for.
    """

    name: str
    kind: str
    facts: dict[str, Any]
    quality: Quality
    checked_before: int
    scenarios: dict[str, Measured]
    perf_analyzer: list[dict[str, Any]] | None = None

    @property
    def title(self) -> str:
        """The system, and how good it is."""
        runs_on = ", ".join(
            str(self.facts[key]) for key in ("engine", "provider", "precision") if self.facts.get(key)
        )
        return f"{self.name} ({runs_on}): {self.quality}"

    def runs(self) -> Iterator[tuple[str, Run]]:
        """Every run, after the name of its scenario."""
        for scenario, measured in self.scenarios.items():
            for run in measured.runs:
                yield scenario, run

    def notes(self) -> Iterator[str]:
        """Yield what a reader must know besides the table."""
        for scenario, measured in self.scenarios.items():
            if measured.search is not None:
                yield f"{scenario}: {measured.search}"
            for run in measured.runs:
                if run.generator.is_bottleneck:
                    yield f"{scenario}, {run}: the client was busy; take more --clients"
                if run.answers.wrong:
                    yield f"{scenario}, {run}: {run.answers.wrong} wrong answers"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """Everything a run of `bench` found.

    Attributes:
        finished: When, as ISO 8601.
        machine: What it was measured on.
        versions: Packages that matter for speed.
        config: What was measured, and how long.
        images: What was sent: digest, sizes, formats.
        systems: What was measured of each; 'targets' in the JSON.
    """

    finished: str
    machine: dict[str, Any]
    versions: dict[str, str]
    config: dict[str, Any]
    images: dict[str, Any]
    systems: tuple[SystemResult, ...]

    @property
    def wrong_answers(self) -> int:
        """Answers during the timing that differed from those before it."""
        return sum(run.answers.wrong for system in self.systems for _, run in system.runs())

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``bench.json``."""
        found: dict[str, Any] = {"kind": KIND, "schema_version": SCHEMA_VERSION} | _plain(self)
        return found | {"targets": found.pop("systems")}


def _plain(value: Any) -> Any:
    """Return a record as JSON holds it; fields that nobody set are left out."""
    if is_dataclass(value):
        values = {field.name: (getattr(value, field.name), field.default) for field in fields(value)}
        return {
            name: _plain(each) for name, (each, default) in values.items() if (each, default) != (None, None)
        }
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
