from __future__ import annotations

import pytest

from cbpt_runtime.bench.search import search_rate


@pytest.mark.parametrize("start", [10.0, 80.0, 100.0, 400.0])
def test_the_search_closes_in_on_the_limit_from_anywhere(start: float) -> None:
    found = search_rate(lambda rate: rate <= 100, start, max_trials=12)
    assert found.held_per_s is not None
    assert found.failed_per_s is not None
    assert found.held_per_s <= 100 < found.failed_per_s
    assert found.failed_per_s / found.held_per_s <= 1.2


def test_a_server_that_holds_nothing_ends_the_search_at_the_lowest_rate() -> None:
    found = search_rate(lambda rate: False, 50.0, lowest_per_s=10.0)
    assert found.held_per_s is None
    assert all(rate >= 10 for rate, _ in found.trials)


def test_a_server_that_holds_everything_ends_the_search_after_its_trials() -> None:
    found = search_rate(lambda rate: True, 1.0, max_trials=5)
    assert (len(found.trials), found.failed_per_s) == (5, None)
    assert found.held_per_s == found.trials[-1][0]


def test_a_lucky_trial_above_a_failed_rate_is_never_made() -> None:
    answers = iter([False, True, True, False, True, True, True, True])
    found = search_rate(lambda rate: next(answers), 100.0)
    failed = min(rate for rate, held in found.trials if not held)
    later = [rate for number, (rate, _) in enumerate(found.trials) if number > 0]
    assert all(rate < found.trials[0][0] for rate in later)
    assert found.held_per_s is not None
    assert found.held_per_s < failed
