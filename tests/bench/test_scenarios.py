from __future__ import annotations

import pytest

from cbpt_runtime.bench.scenarios import search_rate


@pytest.mark.parametrize("start", [10.0, 80.0, 100.0, 400.0])
def test_the_search_closes_in_on_the_limit_from_anywhere(start: float) -> None:
    held, failed, _ = search_rate(lambda rate: rate <= 100, start, max_trials=12)
    assert held is not None
    assert failed is not None
    assert held <= 100 < failed
    assert failed / held <= 1.2


def test_a_server_that_holds_nothing_ends_the_search_at_the_lowest_rate() -> None:
    held, _, trials = search_rate(lambda rate: False, 50.0, lowest_per_s=10.0)
    assert held is None
    assert all(trial.rate_per_s >= 10 for trial in trials)


def test_a_server_that_holds_everything_ends_the_search_after_its_trials() -> None:
    held, failed, trials = search_rate(lambda rate: True, 1.0, max_trials=5)
    assert (len(trials), failed) == (5, None)
    assert held == trials[-1].rate_per_s


def test_a_lucky_trial_above_a_failed_rate_is_never_made() -> None:
    answers = iter([False, True, True, False, True, True, True, True])
    held, _, trials = search_rate(lambda rate: next(answers), 100.0)
    failed = min(trial.rate_per_s for trial in trials if not trial.held)
    assert all(trial.rate_per_s < trials[0].rate_per_s for trial in trials[1:])
    assert held is not None
    assert held < failed
