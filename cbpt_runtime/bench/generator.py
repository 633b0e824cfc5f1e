"""Sends requests when they are due and notes what came back when. Runs in a process of its own.

In an open loop the latency of a request counts from when it was *due*, not from when it was sent: a client
or server that falls behind cannot hide it (coordinated omission).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import numpy as np
from jaxtyping import Float

from cbpt_runtime.bench.links import Answers, Link, LinkError, PipeLink, WireLink

_LEAD_S = 0.2  # between 'all are ready' and the first request


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one generator sends.

    Attributes:
        due_s: When each request is due, from the start; a closed loop when None.
        concurrency: Requests on their way at once in a closed loop.
        batch_size: Images per request.
        warmup_s: What is due (or, in a closed loop, sent) before this is not counted.
        duration_s: Length of what is counted.
        order: Image numbers in the order they are asked for, from the start again at the end.
        expected: What was answered before the timing.
        check_every: One answer in so many is compared with it.
        tolerance: In probability and alarm.
    """

    due_s: Float[np.ndarray, " requests"] | None
    concurrency: int
    batch_size: int
    warmup_s: float
    duration_s: float
    order: Sequence[int]
    expected: Answers
    check_every: int
    tolerance: float

    def images(self, number: int) -> list[int]:
        """Image numbers of a request."""
        first = number * self.batch_size
        return [self.order[(first + place) % len(self.order)] for place in range(self.batch_size)]


@dataclass(kw_only=True)
class Observations:
    """What happened to the requests that count, one entry each, in the order they were due.

    Attributes:
        due_s: When they were due; when they were sent, in a closed loop.
        sent_s: When they were sent.
        done_s: When the answer, or the error, was there. All from the start of the load.
        outcomes: One of `links.OUTCOMES`.
        checked: Answers compared.
        largest_difference: Between an answer and the one before the timing.
        cpu_s: Processor time of the generator.
        wall_s: How long it ran.
    """

    due_s: list[float] = field(default_factory=list)
    sent_s: list[float] = field(default_factory=list)
    done_s: list[float] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)
    checked: int = 0
    largest_difference: float = 0.0
    cpu_s: float = 0.0
    wall_s: float = 0.0

    def latencies_ms(self) -> Float[np.ndarray, " requests"]:
        """Of answered requests, from when they were due."""
        is_answered = np.array([outcome == "answered" for outcome in self.outcomes], bool)
        waited_s: np.ndarray = np.array(self.done_s, float) - np.array(self.due_s, float)
        return np.asarray(1e3 * waited_s[is_answered])

    def lateness_ms(self) -> Float[np.ndarray, " requests"]:
        """How much later than due requests were sent."""
        late_s: np.ndarray = np.array(self.sent_s, float) - np.array(self.due_s, float)
        return 1e3 * late_s


async def generate(link: Link, load: Load, start: float | None = None) -> Observations:
    """Send a load over a link.

    Args:
        link: Where to.
        load: What.
        start: `time.monotonic` at which it begins; now when None.
    """
    start = time.monotonic() if start is None else start
    seen = Observations()
    began_cpu, began = time.process_time(), time.monotonic()
    rows: list[tuple[float, float, float, str]] = []

    async def one(number: int, due_s: float) -> None:
        sent_s = time.monotonic() - start
        outcome = await _ask(link, load, number, seen)
        if due_s >= load.warmup_s:
            rows.append((due_s, sent_s, time.monotonic() - start, outcome))

    if load.due_s is None:
        await _closed_loop(load, start, one)
    else:
        await _open_loop(load.due_s, start, one)
    for due_s, sent_s, done_s, outcome in sorted(rows):
        seen.due_s.append(due_s)
        seen.sent_s.append(sent_s)
        seen.done_s.append(done_s)
        seen.outcomes.append(outcome)
    seen.cpu_s, seen.wall_s = time.process_time() - began_cpu, time.monotonic() - began
    return seen


async def _closed_loop(load: Load, start: float, one: Callable) -> None:
    """As many senders as asked for; each sends its next request when the last one was answered."""
    await asyncio.sleep(max(0.0, start - time.monotonic()))
    end_s = load.warmup_s + load.duration_s
    number = 0

    async def sender() -> None:
        nonlocal number
        while (now_s := time.monotonic() - start) < end_s:
            number += 1
            await one(number - 1, now_s)

    await asyncio.gather(*(sender() for _ in range(load.concurrency)))


async def _open_loop(due_s: Float[np.ndarray, " requests"], start: float, one: Callable) -> None:
    """Every request when it is due. A thread keeps the time: the loop's own clock is coarse."""
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[None]] = []
    all_begun = asyncio.Event()

    def begin(number: int) -> None:
        tasks.append(loop.create_task(one(number, float(due_s[number]))))

    def keep_time() -> None:
        for number, due in enumerate(due_s):
            wait_s = start + float(due) - time.monotonic()
            if wait_s > 0:
                time.sleep(wait_s)
            loop.call_soon_threadsafe(begin, number)
        loop.call_soon_threadsafe(all_begun.set)

    threading.Thread(target=keep_time, name="arrivals", daemon=True).start()
    await all_begun.wait()
    await asyncio.gather(*tasks)


async def _ask(link: Link, load: Load, number: int, seen: Observations) -> str:
    images = load.images(number)
    try:
        answers = await link.ask(images)
    except LinkError as error:
        return error.outcome
    if number % load.check_every:
        return "answered"
    difference = answers.difference(load.expected.rows(images))
    seen.checked += 1
    seen.largest_difference = max(seen.largest_difference, difference)
    return "answered" if difference <= load.tolerance else "wrong"


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where a generator's process sends to: a URL, or the engine at its pipe when None.

    Attributes:
        url: Of a server.
        model: Its model.
        files: What is sent.
        timeout_s: For one request.
    """

    url: str | None
    model: str | None
    files: Sequence[bytes]
    timeout_s: float


class Generators:
    """Processes that send one load each, all from the same moment on.

    Args:
        loads: What each sends.
        destination: Where to.
    """

    def __init__(self, loads: Sequence[Load], destination: Destination) -> None:
        self.connections: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        for load in loads:
            ours, theirs = multiprocessing.Pipe()
            number = theirs.fileno()
            # Not a process of `multiprocessing`: that would import the whole of this program's main module.
            command = [sys.executable, "-m", "cbpt_runtime.bench.sender", str(number)]
            self._processes.append(subprocess.Popen(command, pass_fds=(number,)))  # noqa: S603
            theirs.close()
            ours.send((load, destination))
            self.connections.append(ours)

    def start(self) -> float:
        """Wait until all are ready, then let them begin together; `time.monotonic` at which they do."""
        for connection in self.connections:
            connection.recv()
        begin = time.monotonic() + _LEAD_S
        for connection in self.connections:
            connection.send(begin)
        return begin

    def results(self) -> list[Observations]:
        """What each saw, once it is done."""
        return [connection.recv() for connection in self.connections]

    def stop(self) -> None:
        """Leave no process behind."""
        for process, connection in zip(self._processes, self.connections, strict=True):
            connection.close()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def work(connection: Connection) -> None:
    """What a generator's process does."""
    load, destination = connection.recv()
    asyncio.run(_work_async(connection, load, destination))


async def _work_async(connection: Connection, load: Load, destination: Destination) -> None:
    link: Link
    if destination.url is None:
        connection.send(os.getpid())
        start = connection.recv()
        link = PipeLink(connection, destination.timeout_s)
    else:
        link = WireLink(destination.url, destination.model, destination.files, destination.timeout_s)
        with contextlib.suppress(LinkError):
            await link.ask(load.images(0))  # connected before the clock runs
        connection.send(os.getpid())
        start = connection.recv()
    gc.collect()
    gc.freeze()
    seen = await generate(link, load, start)
    await link.close()
    connection.send(seen)
