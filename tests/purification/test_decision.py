"""The level of the alarm: what split conformal prediction promises, and what it cannot."""

from __future__ import annotations

import numpy as np
import pytest

from cbpt_runtime.purification.decision import decide, decide_between_heads
from cbpt_runtime.runtime import zero_shot


@pytest.mark.parametrize(
    ("images", "rate", "above", "expected"),
    [(99, 0.01, 0, 1 / 100), (199, 0.01, 1, 2 / 200), (800, 0.01, 7, 8 / 801), (999, 0.05, 49, 50 / 1000)],
)
def test_the_level_is_the_quantile_with_the_correction_for_one_more_image(
    images: int, rate: float, above: int, expected: float
) -> None:
    found = decide(np.linspace(0, 1, images, dtype=np.float32), false_alarm_rate=rate)
    assert (found.above, found.images) == (above, images)
    assert found.expected_false_alarm_rate == pytest.approx(expected)
    assert found.expected_false_alarm_rate <= rate


def test_too_few_images_give_the_largest_alarm_and_say_that_less_is_promised_than_was_asked() -> None:
    found = decide(np.array([0.1, 0.7, 0.3], np.float32), false_alarm_rate=0.01)
    assert found.threshold == np.float32(0.7)
    assert found.above == 0
    assert found.expected_false_alarm_rate == 1 / 4


def test_images_the_head_was_tuned_on_promise_nothing() -> None:
    found = decide(np.arange(5, dtype=np.float32), false_alarm_rate=0.01, held_out=False)
    assert found.expected_false_alarm_rate is None


def test_new_images_exceed_the_level_as_often_as_promised() -> None:
    generator = np.random.default_rng(0)
    rates = []
    for _ in range(400):
        found = decide(generator.beta(0.1, 3, 150).astype(np.float32), false_alarm_rate=0.05)
        rates.append(np.mean(generator.beta(0.1, 3, 500) > found.threshold))
    promised = found.expected_false_alarm_rate
    assert promised is not None
    assert np.mean(rates) == pytest.approx(promised, abs=0.004)


def test_equal_alarms_are_not_above_their_own_level() -> None:
    assert decide(np.zeros(50, np.float32), false_alarm_rate=0.01).above == 0


def test_the_alarms_are_those_of_the_two_heads() -> None:
    generator = np.random.default_rng(1)
    features, before, after = (
        (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        for rows in (generator.standard_normal((count, 6)) for count in (40, 5, 5))
    )
    alarms = zero_shot.alarm(
        zero_shot.logits(features, before, 9.0), zero_shot.logits(features, after, 9.0), [2]
    )
    found = decide_between_heads(features, before, after, [2], logit_scale=9.0, false_alarm_rate=0.1)
    assert found == decide(alarms, false_alarm_rate=0.1)
    assert found.above > 0
