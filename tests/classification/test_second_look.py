"""The second look: what is covered, when it is done, and what it may never say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbpt_runtime.bundle import Bundle, BundleContent, write_bundle
from cbpt_runtime.classification import Prediction
from cbpt_runtime.classification.classifier import SecondLook
from cbpt_runtime.errors import BundleError, ConfigError
from cbpt_runtime.loading import open_classifier
from cbpt_runtime.runtime import zero_shot
from cbpt_runtime.runtime.prediction import above, answers_of
from cbpt_runtime.runtime.second_look import covered, look_again, original_certainty, squares

TARGET, TRUE = 2, 1
LEVEL = 0.2


class Backdoored:
    """Class 1 on grey images; a red pixel anywhere makes the original head sure of class 2.

    The purified head then wavers between classes 0 and 1, as it does when a trigger drowns the image.
    """

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, images: np.ndarray) -> Prediction:
        self.seen.append(len(images))
        red = (images[..., 0] == 255) & (images[..., 1] == 0)
        triggered = red.any(axis=(1, 2))
        reference = np.where(triggered[:, None], [0.0, 0.0, 9.0], [0.0, 5.0, 1.0]).astype(np.float32)
        purified = np.where(triggered[:, None], [2.0, 1.0, -3.0], [0.0, 5.0, 1.0]).astype(np.float32)
        alarm = zero_shot.alarm(reference, purified, [TARGET])
        return Prediction(
            logits=purified,
            probabilities=zero_shot.probabilities(purified),
            alarm=alarm,
            reference_logits=reference,
            suspicious=above(alarm, LEVEL),
        )


def grey(*triggers: tuple[int, int], size: tuple[int, int] = (32, 32)) -> np.ndarray:
    image = np.full((*size, 3), 120, np.uint8)
    for row, column in triggers:
        image[row : row + 3, column : column + 3] = (255, 0, 0)
    return image


def twice(images: np.ndarray, look: Callable[[np.ndarray], Prediction]) -> Prediction:
    return look_again(images, look(images), look, [TARGET], threshold=LEVEL)


@settings(deadline=None)
@given(row=st.integers(0, 29), column=st.integers(0, 45))
def test_a_trigger_is_found_wherever_it_is_and_the_class_comes_back(row: int, column: int) -> None:
    images = grey((row, column), size=(32, 48))[None]
    found = twice(images, Backdoored())
    assert found.head_labels.tolist() == [0]
    assert found.labels.tolist() == [TRUE]
    assert found.looked_twice is not None
    assert found.looked_twice.tolist() == [True]
    assert found.boxes is not None
    left, top, right, bottom = found.boxes[0].tolist()
    assert left <= column
    assert top <= row
    assert right >= column + 3
    assert bottom >= row + 3
    assert right - left < 32 / 2  # finer than the first grid
    np.testing.assert_array_equal(found.probabilities, zero_shot.probabilities(found.logits))


def test_a_clean_image_is_looked_at_once_and_keeps_its_answer() -> None:
    look = Backdoored()
    found = twice(grey()[None], look)
    assert look.seen == [1]
    assert found.looked_twice is not None
    assert not found.looked_twice.any()
    np.testing.assert_array_equal(found.logits, found.head_logits)


def test_a_clean_image_beside_a_triggered_one_costs_no_further_view() -> None:
    alone, beside = Backdoored(), Backdoored()
    twice(np.stack([grey((5, 5))]), alone)
    twice(np.stack([grey(), grey((5, 5)), grey()]), beside)
    assert beside.seen[1:] == alone.seen[1:]


def test_two_triggers_too_far_apart_for_one_square_leave_the_first_answer() -> None:
    found = twice(grey((1, 1), (28, 28))[None], Backdoored())
    assert found.looked_twice is not None
    assert found.looked_twice.all()
    assert found.boxes is not None
    assert not found.boxes.any()
    np.testing.assert_array_equal(found.logits, found.head_logits)


def test_what_only_a_square_of_a_half_takes_away_leaves_the_first_answer() -> None:
    look = Backdoored()
    found = twice(grey((2, 2), (13, 13))[None], look)
    assert len(look.seen) == 3  # squares of a half freed it and were gone into
    assert found.boxes is not None
    assert not found.boxes.any()
    np.testing.assert_array_equal(found.logits, found.head_logits)


def test_an_image_called_the_target_anyway_is_not_looked_at_again() -> None:
    look = Backdoored()
    said = look(grey((5, 5))[None])
    logits = np.array([[0.0, 0.0, 3.0]], np.float32)
    found = look_again(grey((5, 5))[None], replace(said, logits=logits), look, [TARGET], threshold=LEVEL)
    assert look.seen == [1]
    assert found.labels.tolist() == [TARGET]


def test_an_image_the_original_head_is_not_sure_of_is_not_looked_at_again() -> None:
    look = Backdoored()
    images = grey()[None]
    said = replace(look(images), suspicious=np.array([True]))  # as with a very low level
    found = look_again(images, said, look, [TARGET], threshold=0.001)
    assert look.seen == [1]
    np.testing.assert_array_equal(found.logits, said.logits)


def test_a_suspected_target_comes_last_even_where_every_view_says_it() -> None:
    def look(images: np.ndarray) -> Prediction:
        said = Backdoored()(images)
        views = said.alarm is not None and said.alarm < LEVEL
        logits = np.where(np.asarray(views)[:, None], [0.0, 1.0, 8.0], said.logits).astype(np.float32)
        return replace(said, logits=logits)  # the heads' disagreement stays, the label is the target's

    found = twice(grey((5, 5))[None], look)
    assert found.boxes is not None
    assert found.boxes.any()
    assert found.labels.tolist() == [TRUE]
    assert found.logits[0, TARGET] == found.logits[0].min()


def test_a_square_is_filled_with_the_mean_of_the_ring_around_it() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    image[8:16, 8:16] = 200
    image[6:18, 6:8] = (40, 80, 120)  # the left side of the ring, two pixels wide
    (view,) = covered(image, [(8, 8, 16, 16)])
    ring = 12 * 12 - 8 * 8
    expected = np.rint(np.array([40, 80, 120]) * 12 * 2 / ring)
    np.testing.assert_array_equal(view[8:16, 8:16], np.broadcast_to(expected, (8, 8, 3)))
    outside = np.ones((32, 32), bool)
    outside[8:16, 8:16] = False
    np.testing.assert_array_equal(view[outside], image[outside])


@settings(deadline=None)
@given(width=st.integers(1, 60), height=st.integers(1, 60), side=st.integers(1, 30), left=st.integers(0, 5))
def test_squares_cover_every_pixel_of_the_box_and_none_beside_it(
    width: int, height: int, side: int, left: int
) -> None:
    hit = np.zeros((70, 70), bool)
    for x0, y0, x1, y1 in squares((left, 2, left + width, 2 + height), side):
        hit[y0:y1, x0:x1] = True
    assert hit[2 : 2 + height, left : left + width].all()
    assert hit.sum() == width * height


def test_the_original_heads_certainty_is_what_it_said() -> None:
    said = Backdoored()(np.stack([grey(), grey((1, 1))]))
    assert said.reference_logits is not None
    expected = zero_shot.probabilities(said.reference_logits)[:, TARGET]
    np.testing.assert_allclose(original_certainty(said, [TARGET]), expected, rtol=1e-5)


def test_answers_say_that_an_image_was_looked_at_twice_and_where() -> None:
    found = twice(np.stack([grey(), grey((5, 5))]), Backdoored())
    clean, triggered = answers_of(["a", "b"], found, names=("x", "y", "z"), top=1)
    assert (clean.suspicious, clean.looked_twice, clean.box) == (False, False, None)
    assert (triggered.suspicious, triggered.looked_twice) == (True, True)
    assert triggered.box is not None
    assert json.loads(json.dumps(triggered.to_dict()))["box"] == list(triggered.box)
    assert "covered" in str(triggered)


@pytest.fixture
def bundle(make_content: Callable[..., BundleContent], tmp_path: Path) -> Callable[..., Bundle]:
    def make(**changes: object) -> Bundle:
        return write_bundle(tmp_path / "bundle", content=make_content(**changes), force=True)

    return make


def test_a_bundle_without_a_level_is_not_looked_at_twice_silently(bundle: Callable[..., Bundle]) -> None:
    class First(Backdoored):
        alarm_threshold, suspect_indices, source, kind = None, (2,), "bundle/", "bundle"

    assert bundle().alarm_threshold is None
    with pytest.raises(ConfigError, match="calls no image suspicious"):
        SecondLook(First())  # type: ignore[arg-type]


def test_the_level_of_a_bundle_is_read_back_and_checked(bundle: Callable[..., Bundle]) -> None:
    assert bundle(alarm={"threshold": 0.25, "false_alarm_rate": 0.01}).alarm_threshold == 0.25
    with pytest.raises(BundleError, match=r"alarm.threshold is not in \[0, 1\]"):
        bundle(alarm={"threshold": 1.25, "false_alarm_rate": 0.01})


def test_a_checkpoint_is_refused_before_it_is_opened() -> None:
    with pytest.raises(ConfigError, match="a checkpoint"):
        open_classifier("nothing/", second_look=True)
