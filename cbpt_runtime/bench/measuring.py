"""One run: a load sent to a target, and everything known about what happened as JSON can hold it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cbpt_runtime.bench import samples
from cbpt_runtime.bench.arrivals import dealt, poisson_arrivals
from cbpt_runtime.bench.config import BenchConfig
from cbpt_runtime.bench.engine import Stages, answer_requests
from cbpt_runtime.bench.generator import Destination, Generators, Load, Observations
from cbpt_runtime.bench.links import Answers
from cbpt_runtime.bench.pictures import Pictures
from cbpt_runtime.bench.statistics import difference, read_statistics, served_models
from cbpt_runtime.bench.targets import Target

TOLERANCE = 5e-3  # in probability and alarm: batches of other sizes add up in another order
KEPT_UP = 0.97  # of the offered rate
BUSY_CLIENT = 0.8  # of one processor: beyond it the client may be what is measured
Run = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A target, the files it is asked about, and what it said about them before the timing."""

    target: Target
    pictures: Pictures
    expected: Answers
    config: BenchConfig


def open_loop(subject: Subject, rate_per_s: float, *, duration_s: float | None = None) -> Run:
    """Requests of one image that come as they please, `rate_per_s` of them on average."""
    config = subject.config
    duration_s = config.duration_s if duration_s is None else duration_s
    rng = np.random.default_rng([config.seed, round(1e6 * rate_per_s)])
    times = poisson_arrivals(rate_per_s, config.warmup_s + duration_s, rng)
    hands = dealt(times, _senders(subject))
    loads = [
        _load(subject, due_s=hand, duration_s=duration_s, shift=number) for number, hand in enumerate(hands)
    ]
    run = _send(subject, loads, duration_s)
    offered = float(np.count_nonzero(times >= config.warmup_s) / duration_s)
    return run | {
        "loop": "open",
        "target_rate_per_s": rate_per_s,
        "offered_rate_per_s": offered,
        "kept_up": bool(offered == 0 or run["achieved_rate_per_s"] >= KEPT_UP * offered),
    }


def closed_loop(
    subject: Subject, concurrency: int, *, batch_size: int = 1, duration_s: float | None = None
) -> Run:
    """A fixed number of senders, each waiting for its answer: no queue can grow, so latencies flatter."""
    duration_s = subject.config.duration_s if duration_s is None else duration_s
    hands = min(_senders(subject), concurrency)
    shares = [concurrency // hands + (hand < concurrency % hands) for hand in range(hands)]
    loads = [
        _load(subject, duration_s=duration_s, shift=number, concurrency=share, batch_size=batch_size)
        for number, share in enumerate(shares)
    ]
    run = _send(subject, loads, duration_s, batch_size=batch_size)
    return run | {"loop": "closed", "concurrency": concurrency, "batch_size": batch_size}


def one_after_the_other(subject: Subject) -> Run:
    """A target of this process asked for one image after the other, by this process: there is no client."""
    target, config = subject.target, subject.config
    run = target.run
    if run is None:
        return closed_loop(subject, 1)
    seen, stages = Observations(), Stages()
    began = time.monotonic()
    number = 0
    while (now_s := time.monotonic() - began) < config.warmup_s + config.duration_s:
        image = number % len(subject.pictures.files)
        start = time.perf_counter()
        pixels = target.decode([subject.pictures.files[image]])
        decoded = time.perf_counter()
        answers = run(pixels)
        done = time.perf_counter()
        if now_s >= config.warmup_s:
            stages.add(1, decoded - start, done - decoded)
            seen.due_s.append(now_s)
            seen.sent_s.append(now_s)
            seen.done_s.append(now_s + done - start)
            seen.outcomes.append(_checked(subject, answers, [image], number, seen))
        number += 1
    found = _described([seen], config.duration_s, 1)
    return found | {"loop": "closed", "concurrency": 1, "batch_size": 1, "stages": stages.to_dict()}


def passes(subject: Subject, batch_size: int, *, least: int = 5) -> Run:
    """Whole batches as fast as a target of this process takes them: images per second of every pass."""
    target, config = subject.target, subject.config
    run = target.run
    if run is None:
        raise RuntimeError("only targets of this process")
    files = subject.pictures.files
    seen, stages = Observations(), Stages()
    rates: list[float] = []
    end = time.monotonic() + config.warmup_s + config.duration_s / len(config.batch_sizes)
    number = 0
    while len(rates) < least or time.monotonic() < end:
        images = [(number * batch_size + place) % len(files) for place in range(batch_size)]
        start = time.perf_counter()
        pixels = target.decode([files[image] for image in images])
        decoded = time.perf_counter()
        answers = run(pixels)
        done = time.perf_counter()
        if number:  # the first is to warm up
            stages.add(batch_size, decoded - start, done - decoded)
            rates.append(batch_size / (done - start))
        _checked(subject, answers, images, number, seen)
        number += 1
    return {
        "loop": "none",
        "batch_size": batch_size,
        "throughput_per_s": float(np.median(rates)),
        "passes_per_s": rates,
        "compute_only_per_s": float(np.median(batch_size * 1e3 / np.array(stages.compute_ms))),
        "stages": stages.to_dict(),
        "answers": _answers([seen]),
        "generator": {"processes": 0, "cpu_share": 0.0, "is_bottleneck": False},
    }


def _senders(subject: Subject) -> int:
    return subject.config.clients if subject.target.url is not None else 1


def _load(
    subject: Subject,
    *,
    duration_s: float,
    shift: int,
    due_s: np.ndarray | None = None,
    concurrency: int = 1,
    batch_size: int = 1,
) -> Load:
    count = len(subject.pictures.files)
    return Load(
        due_s=due_s,
        concurrency=concurrency,
        batch_size=batch_size,
        warmup_s=subject.config.warmup_s,
        duration_s=duration_s,
        order=[(place + shift * count // 4) % count for place in range(count)],
        expected=subject.expected,
        check_every=subject.config.check_every,
        tolerance=TOLERANCE,
    )


def _send(subject: Subject, loads: Sequence[Load], duration_s: float, *, batch_size: int = 1) -> Run:
    """Start the generators, answer them or let the server do it, and put together what they saw."""
    target, config = subject.target, subject.config
    files = subject.pictures.files if target.url is not None else ()
    destination = Destination(url=target.url, model=target.model, files=files, timeout_s=config.timeout_s)
    generators = Generators(loads, destination)
    extra: Run = {}
    try:
        counted_from = generators.start() + config.warmup_s
        if target.url is None:
            seen, stages = answer_requests(
                target, subject.pictures.files, generators.connections, counted_from
            )
            extra["stages"] = stages.to_dict()
        else:
            models = served_models(str(target.model))
            time.sleep(max(0.0, counted_from - time.monotonic()))
            before = read_statistics(target.url, models)
            seen = generators.results()
            extra["triton"] = difference(before, read_statistics(target.url, models))
    finally:
        generators.stop()
    return _described(seen, duration_s, batch_size) | extra


def _described(seen: Sequence[Observations], duration_s: float, batch_size: int) -> Run:
    latencies = np.concatenate([part.latencies_ms() for part in seen])
    lateness = np.concatenate([part.lateness_ms() for part in seen])
    outcomes = Counter(outcome for part in seen for outcome in part.outcomes)
    last_s = max((part.done_s[-1] for part in seen if part.done_s), default=0.0)
    first_s = min((part.due_s[0] for part in seen if part.due_s), default=0.0)
    # An open loop that is behind goes on answering after its last request was due: that counts, too.
    spent_s = max(
        duration_s, max((max(part.done_s) for part in seen if part.done_s), default=last_s) - first_s
    )
    achieved = outcomes["answered"] / spent_s
    share = max((part.cpu_s / part.wall_s for part in seen if part.wall_s), default=0.0)
    return {
        "duration_s": duration_s,
        "achieved_rate_per_s": achieved,
        "throughput_per_s": achieved * batch_size,
        "outcomes": dict(outcomes),
        "latency_ms": samples.summary(latencies),
        "histogram": samples.histogram(latencies),
        "latencies_ms": [round(float(value), 4) for value in latencies],
        "lateness_ms": samples.summary(lateness),
        "answers": _answers(seen),
        "generator": {
            "processes": sum(1 for part in seen if part.wall_s),
            "cpu_share": sum(part.cpu_s / part.wall_s for part in seen if part.wall_s),
            "is_bottleneck": share > BUSY_CLIENT,
        },
    }


def _answers(seen: Sequence[Observations]) -> dict[str, Any]:
    return {
        "checked": sum(part.checked for part in seen),
        "wrong": sum(part.outcomes.count("wrong") for part in seen),
        "largest_difference": max(part.largest_difference for part in seen),
    }


def _checked(
    subject: Subject, answers: Answers, images: Sequence[int], number: int, seen: Observations
) -> str:
    if number % subject.config.check_every:
        return "answered"
    found = answers.difference(subject.expected.rows(list(images)))
    seen.checked += len(images)
    seen.largest_difference = max(seen.largest_difference, found)
    return "answered" if found <= TOLERANCE else "wrong"
