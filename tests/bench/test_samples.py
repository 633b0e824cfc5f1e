from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbpt_runtime.bench.samples import carries, histogram, needed, ratio_interval, summary


@pytest.mark.parametrize(("percentile", "least"), [(50.0, 20), (90.0, 100), (95.0, 200), (99.0, 1000)])
def test_a_percentile_needs_ten_observations_beyond_it(percentile: float, least: int) -> None:
    assert needed(percentile) == least
    assert carries(least, percentile)
    assert not carries(least - 1, percentile)


def test_percentiles_the_sample_cannot_carry_are_left_out_and_named() -> None:
    found = summary(np.linspace(1.0, 2.0, 150))
    assert {"p50", "p90"} <= set(found)
    assert not {"p95", "p99"} & set(found)
    assert found["n_too_small_for"] == ["p95", "p99"]
    assert (found["n"], found["max"]) == (150, 2.0)


def test_an_empty_sample_says_so_and_nothing_else() -> None:
    assert summary(np.zeros(0)) == {"n": 0}
    assert histogram(np.zeros(0)) == {"edges_ms": [], "counts": []}


def test_the_interval_of_a_percentile_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    truth = -np.log(0.1)  # p90 of the exponential distribution
    hits = 0
    for _ in range(300):
        low, high = summary(rng.exponential(1.0, 400))["p90_interval"]
        hits += low <= truth <= high
    assert 0.91 <= hits / 300 <= 1.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-4, 1e5), min_size=1, max_size=60))
def test_a_histogram_counts_every_observation_in_bins_of_one_ratio(values: list[float]) -> None:
    found = histogram(np.array(values))
    assert sum(found["counts"]) == len(values)
    edges = np.array(found["edges_ms"])
    assert np.allclose(edges[1:] / edges[:-1], 10 ** (1 / 20), rtol=1e-4)


def test_a_ratio_of_equal_samples_is_one_within_its_interval() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.gamma(4.0, 1.0, (2, 500))
    ratio, low, high = ratio_interval(first, second, np.random.default_rng(2))
    assert low < 1 < high
    assert low < ratio < high
    assert high - low < 0.3


def test_a_real_difference_is_found_outside_the_interval() -> None:
    rng = np.random.default_rng(1)
    ratio, low, high = ratio_interval(
        2 * rng.gamma(4.0, 1.0, 500), rng.gamma(4.0, 1.0, 500), np.random.default_rng(2)
    )
    assert low > 1.5
    assert ratio == pytest.approx(2.0, abs=0.3)
    assert high < 2.6


def test_neighbours_that_resemble_each_other_widen_the_interval() -> None:
    rng = np.random.default_rng(3)
    alone = rng.normal(10, 1, 512)
    alike = np.repeat(rng.normal(10, 1, 64), 8)
    widths = []
    for sample in (alone, alike):
        _, low, high = ratio_interval(sample, sample.copy(), np.random.default_rng(4))
        widths.append(high - low)
    assert widths[1] > 1.5 * widths[0]
