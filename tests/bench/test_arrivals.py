from __future__ import annotations

import numpy as np
import pytest

from cbpt_runtime.bench.arrivals import dealt, poisson_arrivals


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


def test_several_senders_keep_one_schedule_together() -> None:
    times = poisson_arrivals(50.0, 4.0, np.random.default_rng(1))
    hands = dealt(times, 3)
    assert (np.sort(np.concatenate(hands)) == times).all()
    assert max(map(len, hands)) - min(map(len, hands)) <= 1
