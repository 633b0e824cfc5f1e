from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbpt_runtime.evaluation import metrics

SCORES = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=12).map(np.array)


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.27754),  # reference values: R's binom.confint(method = "wilson")
        (1, 10, 0.01787, 0.40415),
        (5, 10, 0.23659, 0.76341),
        (10, 10, 0.72246, 1.0),
        (95, 100, 0.88825, 0.97846),
    ],
)
def test_wilson_intervals_match_published_values(count: int, total: int, low: float, high: float) -> None:
    rate = metrics.wilson(count, total)
    assert rate.rate == count / total
    assert (rate.low, rate.high) == (pytest.approx(low, abs=2e-5), pytest.approx(high, abs=2e-5))


@given(st.integers(1, 10_000), st.data())
def test_wilson_intervals_contain_the_rate_and_stay_in_the_unit_interval(
    total: int, data: st.DataObject
) -> None:
    rate = metrics.wilson(data.draw(st.integers(0, total)), total)
    assert 0 <= rate.low <= rate.rate <= rate.high <= 1


def test_a_rate_over_nothing_is_none_not_zero() -> None:
    assert metrics.wilson(0, 0).to_dict() == {"rate": None, "count": 0, "total": 0, "low": None, "high": None}


def test_attack_rates_on_a_case_small_enough_to_count_by_hand() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    predictions = np.array([2, 0, 2, 2, 2, 1])
    assert metrics.attack_success(predictions, labels, 2).rate == 3 / 4
    assert metrics.attack_success_inclusive(predictions, 2).rate == 4 / 6
    assert metrics.accuracy(predictions, labels).rate == 2 / 6
    assert metrics.floor(predictions, labels, 2).rate == 3 / 4
    assert metrics.target_recall(predictions, labels, 2).rate == 1 / 2


@given(SCORES, SCORES)
def test_auroc_is_the_share_of_pairs_in_order_ties_half(positives: np.ndarray, negatives: np.ndarray) -> None:
    pairs = np.sign(positives[:, None] - negatives[None, :])
    assert metrics.auroc(positives, negatives) == pytest.approx(((pairs + 1) / 2).mean())


def test_auroc_without_images_is_none() -> None:
    assert metrics.auroc(np.array([]), np.array([1.0])) is None


def test_the_interval_of_auroc_ends_where_newcombes_equation_holds() -> None:
    rng = np.random.default_rng(0)
    positives, negatives = rng.normal(1, 1, 40), rng.normal(0, 1, 60)
    found = metrics.auroc_interval(positives, negatives)
    assert found.value == metrics.auroc(positives, negatives)
    for end in (found.low, found.high):
        spread = 1 + 49 * (1 - end) / (2 - end) + 49 * end / (1 + end)
        variance = end * (1 - end) * spread / (40 * 60)
        assert abs(found.value - end) == pytest.approx(1.959964 * np.sqrt(variance), rel=1e-5)


@given(SCORES, SCORES)
def test_the_interval_of_auroc_holds_it_and_is_never_empty(
    positives: np.ndarray, negatives: np.ndarray
) -> None:
    found = metrics.auroc_interval(positives, negatives)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.high - found.low > 0.01


def test_the_interval_of_auroc_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    truth = 0.7602  # P(N(1, 1) > N(0, 1))
    hits = 0
    for _ in range(300):
        found = metrics.auroc_interval(rng.normal(1, 1, 30), rng.normal(0, 1, 50))
        hits += found.low <= truth <= found.high
    assert 0.92 <= hits / 300 <= 0.99


def test_false_alarms_are_counted_at_the_level_that_detects_enough() -> None:
    positives = np.arange(20) / 20  # 0.00, 0.05, ... 0.95
    assert metrics.threshold_for_detection(positives) == 0.05
    assert metrics.threshold_for_detection(positives, 1.0) == 0.0
    assert metrics.false_alarms(positives, np.array([0.0, 0.04, 0.05, 0.5])).rate == 2 / 4
    assert metrics.false_alarms(np.array([]), np.array([0.5])).rate is None


def test_an_alarm_that_misses_more_than_one_in_twenty_has_no_useful_level() -> None:
    positives = np.array([0.0, 0.0, *[0.9] * 18])
    assert metrics.false_alarms(positives, np.zeros(7)).rate == 1.0
