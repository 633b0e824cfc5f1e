"""Sends requests when they are due and notes what came back when. Runs in a process of its own.

In an open loop the latency of a request counts from when it was *due*, not from when it was sent: a client
or server that falls behind cannot hide it (coordinated omission). What is imported here needs neither torch
nor onnxruntime.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import numpy as np
from jaxtyping import Float, Int

from cbpt_runtime.errors import CbptError
from cbpt_runtime.serving.client.asynchronous import AsyncClient
from cbpt_runtime.serving.client.wire import WireError

_LEAD_S = 0.2  # between 'all are ready' and the first request
_MAIN = "import sys; from cbpt_runtime.bench.generator import work; work(int(sys.argv[1]))"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What was said about a few images, as much of it as checking needs.

    Attributes:
        labels: Most likely class.
        probabilities: Its probability.
        alarms: In [0, 1].
    """

    labels: Int[np.ndarray, " batch"]
    probabilities: Float[np.ndarray, " batch"]
    alarms: Float[np.ndarray, " batch"]

    @classmethod
    def of(
        cls, probabilities: Float[np.ndarray, "batch classes"], alarms: Float[np.ndarray, " batch"] | None
    ) -> Answers:
        """Return the most likely class of each image, its probability, and the alarm."""
        labels = probabilities.argmax(axis=1)
        best = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]
        quiet = np.zeros(len(labels))
        return cls(
            labels=labels,
            probabilities=best.astype(np.float64),
            alarms=np.asarray(quiet if alarms is None else alarms, np.float64),
        )

    def rows(self, chosen: Sequence[int]) -> Answers:
        """Return some of them."""
        rows = list(chosen)
        return Answers(
            labels=self.labels[rows], probabilities=self.probabilities[rows], alarms=self.alarms[rows]
        )

    def difference(self, expected: Answers) -> float:
        """Return the largest difference in probability or alarm; 1 where another label is no near tie."""
        surer = np.maximum(self.probabilities, expected.probabilities)
        if ((self.labels != expected.labels) & (surer > 0.5)).any():
            return 1.0
        return float(
            max(
                np.abs(self.probabilities - expected.probabilities).max(initial=0.0),
                np.abs(self.alarms - expected.alarms).max(initial=0.0),
            )
        )


@dataclass(kw_only=True)
class Observations:
    """What one sender saw of its requests that count, one entry each, in the order they were due.

    Attributes:
        due_s: When they were due; when they were sent, in a closed loop.
        sent_s: When they were sent.
        done_s: When the answer, or the error, was there. All from the start of the load.
        outcomes: 'answered', 'wrong', or the kind of a `serving.wire.WireError`.
        checked: Answers compared, one per image.
        largest_difference: Between an answer and the one before the timing.
        cpu_s: Processor time of the sender's process; 0 without one of its own.
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

    def add(self, due_s: float, sent_s: float, done_s: float, outcome: str) -> None:
        """One request more."""
        self.due_s.append(due_s)
        self.sent_s.append(sent_s)
        self.done_s.append(done_s)
        self.outcomes.append(outcome)

    def check(self, answers: Answers, expected: Answers, tolerance: float) -> str:
        """Compare answers with those from before the timing; the outcome."""
        difference = answers.difference(expected)
        self.checked += len(answers.labels)
        self.largest_difference = max(self.largest_difference, difference)
        return "answered" if difference <= tolerance else "wrong"

    def latencies_ms(self) -> Float[np.ndarray, " requests"]:
        """Of answered requests, from when they were due."""
        is_answered = np.array([outcome == "answered" for outcome in self.outcomes], bool)
        waited_s: np.ndarray = np.array(self.done_s, float) - np.array(self.due_s, float)
        return np.asarray(1e3 * waited_s[is_answered])

    def lateness_ms(self) -> Float[np.ndarray, " requests"]:
        """How much later than due requests were sent."""
        late_s: np.ndarray = np.array(self.sent_s, float) - np.array(self.due_s, float)
        return 1e3 * late_s


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """The server a load is sent to.

    Attributes:
        url: Its URL.
        model: Its model.
        files: What is sent.
        timeout_s: For one request.
    """

    url: str
    model: str | None
    files: Sequence[bytes]
    timeout_s: float


class LostError(Exception):
    """A request without an answer; its outcome is the kind of a `serving.wire.WireError`."""

    def __init__(self, outcome: str) -> None:
        self.outcome = outcome
        super().__init__(outcome)


Ask = Callable[[Sequence[int]], Awaitable[Answers]]
"""Asks about a few images by their numbers; raises LostError."""


def poisson_arrivals(
    rate_per_s: float, duration_s: float, generator: np.random.Generator
) -> Float[np.ndarray, " requests"]:
    """Draw the times in [0, duration) of a Poisson process, ascending, in seconds."""
    # Given their number, the arrivals of a Poisson process are independent and uniform.
    count = generator.poisson(rate_per_s * duration_s)
    return np.sort(generator.uniform(0.0, duration_s, count))


async def generate(ask: Ask, load: Load, start: float | None = None) -> Observations:
    """Send a load.

    Args:
        ask: Sends one request.
        load: What is sent.
        start: `time.monotonic` at which it begins; now when None.
    """
    start = time.monotonic() if start is None else start
    seen = Observations()
    began_cpu, began = time.process_time(), time.monotonic()
    rows: list[tuple[float, float, float, str]] = []

    async def one(number: int, due_s: float) -> None:
        sent_s = time.monotonic() - start
        outcome = await _outcome(ask, load, number, seen)
        if due_s >= load.warmup_s:
            rows.append((due_s, sent_s, time.monotonic() - start, outcome))

    if load.due_s is None:
        await _closed_loop(load, start, one)
    else:
        await _open_loop(load.due_s, start, one)
    for row in sorted(rows):
        seen.add(*row)
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


async def _outcome(ask: Ask, load: Load, number: int, seen: Observations) -> str:
    images = load.images(number)
    try:
        answers = await ask(images)
    except LostError as error:
        return error.outcome
    if number % load.check_every:
        return "answered"
    return seen.check(answers, load.expected.rows(images), load.tolerance)


class Generators:
    """Processes that send one load each, all from the same moment on.

    Args:
        loads: What each sends.
        destination: Where to.
    """

    def __init__(self, loads: Sequence[Load], destination: Destination) -> None:
        self._connections: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        for load in loads:
            ours, theirs = multiprocessing.Pipe()
            number = theirs.fileno()
            # Not a process of `multiprocessing`: that would import the whole of this program's main module.
            command = [sys.executable, "-c", _MAIN, str(number)]
            self._processes.append(subprocess.Popen(command, pass_fds=(number,)))  # noqa: S603
            theirs.close()
            ours.send((load, destination))
            self._connections.append(ours)

    def start(self) -> float:
        """Wait until all are ready, then let them begin together; `time.monotonic` at which they do."""
        for connection in self._connections:
            connection.recv()
        begin = time.monotonic() + _LEAD_S
        for connection in self._connections:
            connection.send(begin)
        return begin

    def results(self) -> list[Observations]:
        """Return what each saw, once it is done."""
        return [connection.recv() for connection in self._connections]

    def stop(self) -> None:
        """Leave no process behind."""
        for process, connection in zip(self._processes, self._connections, strict=True):
            connection.close()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def work(descriptor: int) -> None:
    """Do what a generator's process does, at its end of the pipe."""
    asyncio.run(_work(Connection(descriptor)))


async def _work(connection: Connection) -> None:
    """Send requests once: a retry would hide what is measured."""
    load, to = connection.recv()
    async with AsyncClient(to.url, model=to.model, timeout_s=to.timeout_s, retries=0) as client:

        async def ask(images: Sequence[int]) -> Answers:
            try:
                found = await client.predict_files([to.files[image] for image in images])
            except CbptError as error:
                cause = error.__cause__
                raise LostError(cause.kind if isinstance(cause, WireError) else "broken") from error
            return Answers.of(found.probabilities, found.alarm)

        with contextlib.suppress(LostError):
            await ask(load.images(0))  # connected before the clock runs
        connection.send("ready")
        start = connection.recv()
        gc.collect()
        gc.freeze()
        seen = await generate(ask, load, start)
    connection.send(seen)
