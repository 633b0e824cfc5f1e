"""One run: a load put on a system, in an open or a closed loop, or in whole batches."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from cbpt_runtime.bench import samples
from cbpt_runtime.bench.generator import (
    Answers,
    Destination,
    Generators,
    Load,
    Observations,
    poisson_arrivals,
)
from cbpt_runtime.bench.inputs import BenchConfig, Pictures
from cbpt_runtime.bench.records import Checked, Run, Senders, Stages
from cbpt_runtime.bench.systems import System, Timing
from cbpt_runtime.bench.triton import difference, read_statistics, served_models

TOLERANCE = 5e-3  # in probability and alarm: batches of other sizes add up in another order
KEPT_UP = 0.97  # of the offered rate
BUSY_CLIENT = 0.8  # of one processor: beyond it the client may be what is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A system, the files it is asked about, and what it said about them before the timing."""

    system: System
    pictures: Pictures
    expected: Answers
    config: BenchConfig


def open_loop(work: Workload, rate_per_s: float, *, duration_s: float | None = None) -> Run:
    """Send requests of one image to a server as they please, `rate_per_s` of them on average."""
    config = work.config
    duration_s = config.duration_s if duration_s is None else duration_s
    rng = np.random.default_rng([config.seed, round(1e6 * rate_per_s)])
    times = poisson_arrivals(rate_per_s, config.warmup_s + duration_s, rng)
    loads = [  # one schedule dealt to several senders in turns; together they keep it
        _load(work, due_s=times[number :: config.clients], duration_s=duration_s, shift=number)
        for number in range(config.clients)
    ]
    run = _send(work, loads, "open", duration_s)
    offered = float(np.count_nonzero(times >= config.warmup_s) / duration_s)
    return replace(
        run,
        target_rate_per_s=rate_per_s,
        offered_rate_per_s=offered,
        kept_up=bool(offered == 0 or (run.achieved_rate_per_s or 0) >= KEPT_UP * offered),
    )


def closed_loop(
    work: Workload, concurrency: int, *, batch_size: int = 1, duration_s: float | None = None
) -> Run:
    """Run a fixed number of senders, each waiting for its answer: no queue can grow, so latencies flatter.

    What runs in this process is asked by as many of its threads: there is no client.
    """
    duration_s = work.config.duration_s if duration_s is None else duration_s
    if work.system.url is None:
        run = _ask_in_threads(work, concurrency, batch_size, duration_s)
    else:
        hands = min(work.config.clients, concurrency)
        shares = [concurrency // hands + (hand < concurrency % hands) for hand in range(hands)]
        loads = [
            _load(work, duration_s=duration_s, shift=number, concurrency=share, batch_size=batch_size)
            for number, share in enumerate(shares)
        ]
        run = _send(work, loads, "closed", duration_s, batch_size=batch_size)
    return replace(run, concurrency=concurrency)


def passes(work: Workload, batch_size: int, *, least: int = 5) -> Run:
    """Whole batches as fast as a system of this process takes them: images per second of every pass."""
    config, files = work.config, work.pictures.files
    seen = Observations()
    timings: list[Timing] = []
    end = time.monotonic() + config.warmup_s + config.duration_s / len(config.batch_sizes)
    number = 0
    while len(timings) < least or time.monotonic() < end:
        images = [(number * batch_size + place) % len(files) for place in range(batch_size)]
        timing, outcome = _ask(work, images, number, seen)
        seen.outcomes.append(outcome)
        if number:  # the first is to warm up
            timings.append(timing)
        number += 1
    rates = tuple(batch_size / (each.decode_s + each.compute_s) for each in timings)
    return Run(
        loop="none",
        batch_size=batch_size,
        throughput_per_s=float(np.median(rates)),
        answers=Checked.of([seen]),
        generator=Senders(),
        passes_per_s=rates,
        compute_only_per_s=float(np.median([batch_size / each.compute_s for each in timings])),
        stages=_stages(timings),
    )


def _ask_in_threads(work: Workload, concurrency: int, batch_size: int, duration_s: float) -> Run:
    warmup_s, files = work.config.warmup_s, work.pictures.files
    timings: list[Timing] = []
    numbers = itertools.count()
    began = time.monotonic()

    def ask_in_turns(_: int) -> Observations:
        seen = Observations()
        while (now_s := time.monotonic() - began) < warmup_s + duration_s:
            number = next(numbers)
            images = [(number * batch_size + place) % len(files) for place in range(batch_size)]
            timing, outcome = _ask(work, images, number, seen)
            if now_s >= warmup_s:
                timings.append(timing)
                seen.add(now_s, now_s, now_s + timing.decode_s + timing.compute_s, outcome)
        return seen

    with ThreadPoolExecutor(concurrency) as threads:
        seen = list(threads.map(ask_in_turns, range(concurrency)))
    return replace(_described(seen, "closed", duration_s, batch_size), stages=_stages(timings))


def _ask(work: Workload, images: Sequence[int], number: int, seen: Observations) -> tuple[Timing, str]:
    """Ask a system of this process; one answer in so many is checked."""
    answers, timing = work.system.timed([work.pictures.files[image] for image in images])
    if number % work.config.check_every:
        return timing, "answered"
    return timing, seen.check(answers, work.expected.rows(images), TOLERANCE)


def _stages(timings: Sequence[Timing]) -> Stages | None:
    if not timings:
        return None
    images = sum(each.images for each in timings)
    decode_ms = 1e3 * sum(each.decode_s for each in timings)
    compute_ms = 1e3 * sum(each.compute_s for each in timings)
    return Stages(
        decode_ms_per_image=decode_ms / images,
        compute_ms_per_image=compute_ms / images,
        decode_ms_per_batch=decode_ms / len(timings),
        compute_ms_per_batch=compute_ms / len(timings),
        mean_batch_size=images / len(timings),
    )


def _load(
    work: Workload,
    *,
    duration_s: float,
    shift: int,
    due_s: np.ndarray | None = None,
    concurrency: int = 1,
    batch_size: int = 1,
) -> Load:
    count = len(work.pictures.files)
    return Load(
        due_s=due_s,
        concurrency=concurrency,
        batch_size=batch_size,
        warmup_s=work.config.warmup_s,
        duration_s=duration_s,
        order=[(place + shift * count // 4) % count for place in range(count)],
        expected=work.expected,
        check_every=work.config.check_every,
        tolerance=TOLERANCE,
    )


def _send(
    work: Workload,
    loads: Sequence[Load],
    loop: Literal["open", "closed"],
    duration_s: float,
    *,
    batch_size: int = 1,
) -> Run:
    """Start the generators, let the server answer them, and put together what they saw."""
    url, model = str(work.system.url), work.system.facts["model"]
    models = served_models(model)
    destination = Destination(
        url=url, model=model, files=work.pictures.files, timeout_s=work.config.timeout_s
    )
    generators = Generators(loads, destination)
    try:
        counted_from = generators.start() + work.config.warmup_s
        time.sleep(max(0.0, counted_from - time.monotonic()))
        before = read_statistics(url, models)
        seen = generators.results()
        after = read_statistics(url, models)
    finally:
        generators.stop()
    return replace(_described(seen, loop, duration_s, batch_size), triton=difference(before, after))


def _described(
    seen: Sequence[Observations], loop: Literal["open", "closed"], duration_s: float, batch_size: int
) -> Run:
    latencies = np.concatenate([part.latencies_ms() for part in seen])
    outcomes = Counter(outcome for part in seen for outcome in part.outcomes)
    first_s = min((part.due_s[0] for part in seen if part.due_s), default=0.0)
    last_s = max((max(part.done_s) for part in seen if part.done_s), default=0.0)
    # An open loop that is behind goes on answering after its last request was due: that counts, too.
    achieved = outcomes["answered"] / max(duration_s, last_s - first_s)
    shares = [part.cpu_s / part.wall_s for part in seen if part.wall_s]
    return Run(
        loop=loop,
        batch_size=batch_size,
        throughput_per_s=achieved * batch_size,
        answers=Checked.of(seen),
        generator=Senders(
            processes=len(shares),
            cpu_share=sum(shares),
            is_bottleneck=max(shares, default=0.0) > BUSY_CLIENT,
        ),
        duration_s=duration_s,
        achieved_rate_per_s=achieved,
        outcomes=dict(outcomes),
        latency_ms=samples.summary(latencies),
        histogram=samples.histogram(latencies),
        latencies_ms=tuple(round(float(value), 4) for value in latencies),
        lateness_ms=samples.summary(np.concatenate([part.lateness_ms() for part in seen])),
    )
