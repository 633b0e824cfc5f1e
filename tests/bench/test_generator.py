"""The clock starts when a request is due. A server or client that stalls must not be able to hide it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from cbpt_runtime.bench.generator import (
    Answers,
    Destination,
    Generators,
    Load,
    LostError,
    Observations,
    generate,
    poisson_arrivals,
)

IMAGES = 4
PROBABILITIES = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
EXPECTED = Answers.of(PROBABILITIES, np.zeros(IMAGES))


def load(**changes: Any) -> Load:
    settings: dict[str, Any] = {
        "due_s": None,
        "concurrency": 1,
        "batch_size": 1,
        "warmup_s": 0.0,
        "duration_s": 0.3,
        "order": range(IMAGES),
        "expected": EXPECTED,
        "check_every": 1,
        "tolerance": 1e-3,
    }
    return Load(**(settings | changes))


class FakeServer:
    """Answers after a millisecond, but stalls once: for everybody, as a server that pauses does."""

    def __init__(self, *, stall_from_s: float = 9.0, stall_s: float = 0.0, blocks: bool = False) -> None:
        self._begin = time.monotonic()
        self._from, self._for, self._blocks = stall_from_s, stall_s, blocks
        self.asked: list[list[int]] = []

    async def ask(self, images: Sequence[int]) -> Answers:
        self.asked.append(list(images))
        now = time.monotonic() - self._begin
        if self._from <= now < self._from + self._for:
            left = self._from + self._for - now
            if self._blocks:
                time.sleep(left)  # the client itself hangs: nothing is sent meanwhile
            else:
                await asyncio.sleep(left)
        await asyncio.sleep(0.001)
        return EXPECTED.rows(list(images))


def run(link: Any, work: Load) -> Observations:
    async def inside() -> Observations:
        return await generate(link.ask, work)

    return asyncio.run(inside())


@pytest.mark.parametrize("blocks", [False, True])
def test_a_stall_is_seen_by_every_request_that_was_due_during_it(blocks: bool) -> None:
    due = np.arange(0.0, 1.0, 0.01)
    seen = run(FakeServer(stall_from_s=0.3, stall_s=0.4, blocks=blocks), load(due_s=due, duration_s=1.0))
    latencies = seen.latencies_ms()
    assert len(latencies) == len(due)
    # 40 requests were due while it stalled; they waited 200 ms on average. None of it is left out.
    assert (latencies > 100).sum() >= 25
    assert latencies.sum() > 0.8 * 1e3 * 0.4**2 / 2 / 0.01


def test_from_the_actual_send_the_same_stall_would_be_hidden() -> None:
    due = np.arange(0.0, 1.0, 0.01)
    server = FakeServer(stall_from_s=0.3, stall_s=0.4, blocks=True)
    seen = run(server, load(due_s=due, duration_s=1.0))
    from_send = 1e3 * (np.array(seen.done_s) - np.array(seen.sent_s))
    assert (from_send > 100).sum() <= 5
    assert (seen.lateness_ms() > 100).sum() >= 25  # and the lateness is on record


def test_requests_are_sent_when_due_although_none_is_answered() -> None:
    class Silent(FakeServer):
        async def ask(self, images: Sequence[int]) -> Answers:
            self.asked.append(list(images))
            await asyncio.sleep(0.5)
            raise LostError("timeout")

    server = Silent()
    seen = run(server, load(due_s=np.arange(0.0, 0.2, 0.01)))
    assert len(server.asked) == 20
    assert set(seen.outcomes) == {"timeout"}
    assert len(seen.latencies_ms()) == 0


def test_a_closed_loop_never_has_more_on_the_way_than_it_may() -> None:
    class Counting(FakeServer):
        now = most = 0

        async def ask(self, images: Sequence[int]) -> Answers:
            self.now += 1
            self.most = max(self.most, self.now)
            answers = await super().ask(images)
            self.now -= 1
            return answers

    server = Counting()
    seen = run(server, load(concurrency=3, batch_size=2))
    assert server.most == 3
    assert all(len(images) == 2 for images in server.asked)
    assert len(seen.outcomes) == len(server.asked)


def test_warm_up_is_sent_and_not_counted() -> None:
    server = FakeServer()
    seen = run(server, load(due_s=np.arange(0.0, 0.4, 0.02), warmup_s=0.2))
    assert (len(server.asked), len(seen.outcomes)) == (20, 10)
    assert min(seen.due_s) >= 0.2


def test_wrong_answers_are_found_in_the_sample_and_are_no_latency() -> None:
    class Confused(FakeServer):
        async def ask(self, images: Sequence[int]) -> Answers:
            await super().ask(images)
            return EXPECTED.rows([0 for _ in images])

    seen = run(Confused(), load(due_s=np.arange(0.0, 0.2, 0.01)))
    assert seen.outcomes.count("wrong") == 15  # every image but the first is answered as if it were the first
    assert seen.checked == 20
    assert len(seen.latencies_ms()) == 5
    few = run(Confused(), load(due_s=np.arange(0.0, 0.2, 0.01), check_every=4))
    assert few.checked == 5


def test_a_near_tie_is_no_wrong_answer_and_another_label_is() -> None:
    tie = Answers.of(np.array([[0.4, 0.4004, 0.2]]), np.zeros(1))
    other = Answers.of(np.array([[0.4004, 0.4, 0.2]]), np.zeros(1))
    assert tie.difference(other) < 1e-3
    sure = Answers.of(np.array([[0.99, 0.01]]), np.zeros(1))
    not_that = Answers.of(np.array([[0.01, 0.99]]), np.zeros(1))
    assert sure.difference(not_that) == 1.0
    alarmed = Answers.of(np.array([[0.99, 0.01]]), np.array([0.7]))
    assert sure.difference(alarmed) == pytest.approx(0.7)


def test_arrivals_are_those_of_a_poisson_process() -> None:
    times = poisson_arrivals(200.0, 50.0, np.random.default_rng(0))
    assert (np.diff(times) >= 0).all()
    assert 0 <= times[0] < times[-1] < 50
    assert len(times) == pytest.approx(10_000, abs=4 * 100)
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(1 / 200, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # exponential: as wide as long
    per_second = np.histogram(times, 50, (0, 50))[0]
    assert per_second.var() == pytest.approx(per_second.mean(), rel=0.5)


def test_the_same_seed_gives_the_same_schedule() -> None:
    first, second = (poisson_arrivals(20.0, 5.0, np.random.default_rng(7)) for _ in range(2))
    assert (first == second).all()


def test_a_generator_has_a_process_of_its_own_and_leaves_none() -> None:
    nobody = Destination(url="http://127.0.0.1:1", model="clip", files=(b"",) * IMAGES, timeout_s=0.2)
    generators = Generators([load(duration_s=0.3), load(duration_s=0.3)], nobody)
    try:
        generators.start()
        seen = generators.results()
    finally:
        generators.stop()
    for each in seen:
        assert set(each.outcomes) <= {"busy", "unreachable", "timeout"}
        assert 0 < each.cpu_s < each.wall_s
    assert all(process.poll() == 0 for process in generators._processes)


def test_a_generator_imports_nothing_heavy() -> None:
    code = "import sys, cbpt_runtime.bench.generator; print({'torch', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
