from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from cbpt_runtime.runtime import zero_shot

LOGITS = npst.arrays(np.float32, (4, 3), elements=st.floats(-1000, 1000, width=32))


def test_logits_are_scaled_cosines_plus_the_bias() -> None:
    features = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    head = np.array([[1.0, 0.0], [0.6, 0.8]], np.float32)
    np.testing.assert_allclose(zero_shot.logits(features, head, 10.0), [[10, 6], [0, 8]], rtol=1e-6)
    np.testing.assert_allclose(zero_shot.logits(features, head, 10.0, -2.0), [[8, 4], [-2, 6]], rtol=1e-6)


@given(LOGITS)
def test_softmax_probabilities_sum_to_one_and_do_not_overflow(logits: np.ndarray) -> None:
    probabilities = zero_shot.probabilities(logits)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert probabilities.dtype == np.float32
    assert (probabilities >= 0).all()


@given(LOGITS)
def test_sigmoid_probabilities_match_the_definition_and_do_not_overflow(logits: np.ndarray) -> None:
    probabilities = zero_shot.probabilities(logits, sigmoid=True)
    clipped = np.clip(logits.astype(np.float64), -80, 80)
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-clipped)), rtol=1e-5, atol=1e-30)


@given(LOGITS, LOGITS, st.booleans())
def test_the_alarm_stays_in_the_unit_interval(before: np.ndarray, after: np.ndarray, sigmoid: bool) -> None:
    alarm = zero_shot.alarm(before, after, (0, 2), sigmoid=sigmoid)
    assert alarm.shape == (4,)
    assert ((alarm >= 0) & (alarm <= 1)).all()


def test_the_alarm_rings_when_only_the_original_head_calls_the_suspect() -> None:
    before = np.array([[0, 20], [0, 20], [20, 0]], np.float32)
    after = np.array([[20, 0], [0, 20], [20, 0]], np.float32)
    alarm = zero_shot.alarm(before, after, (1,))
    assert alarm[0] == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(alarm[1:], 0, atol=1e-6)


def test_the_alarm_is_zero_without_suspects() -> None:
    logits = np.array([[0, 20]], np.float32)
    np.testing.assert_array_equal(zero_shot.alarm(logits, -logits, ()), [0])
