"""Golden answers: strict on the processor they are from; int8 on another may differ, and it is said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cbpt_runtime.errors import ExportError
from cbpt_runtime.export.cpus import kind_of_processor
from cbpt_runtime.export.golden import INT8_TOLERANCE_ELSEWHERE, GoldenSet
from cbpt_runtime.runtime.prediction import Prediction

OTHER = "x86_64 avx2 of another machine"


@pytest.fixture
def golden() -> GoldenSet:
    rows = [
        {"file": "0.png", "label": "cat", "alarm": 0.1, "probabilities": [0.51, 0.49]},
        {"file": "1.png", "label": "dog", "alarm": 0.0, "probabilities": [0.1, 0.9]},
    ]
    return GoldenSet(files=(b"", b""), names=("0.png", "1.png"), answers={"tolerance": 1e-3, "images": rows})


def answers(moved: float) -> Prediction:
    """The golden answers with that much probability moved from the first class to the second."""
    probabilities = np.array([[0.51 - moved, 0.49 + moved], [0.1 - moved, 0.9 + moved]])
    return Prediction(logits=probabilities, probabilities=probabilities, alarm=np.array([0.1, 0.0]))


@pytest.mark.parametrize("made_on", [None, kind_of_processor(), OTHER])
def test_answers_within_rounding_pass_without_a_note(golden: GoldenSet, made_on: str | None) -> None:
    checked = golden.check(answers(5e-4), where="here", made_on=made_on)
    assert checked.largest_difference == pytest.approx(5e-4)
    assert checked.note is None


@pytest.mark.parametrize("made_on", [None, kind_of_processor()])
def test_more_is_an_error_where_the_processor_is_no_excuse(golden: GoldenSet, made_on: str | None) -> None:
    with pytest.raises(
        ExportError, match=r"of here within 0\.001; got probabilities off by 0\.05, .* 1 other labels"
    ):
        golden.check(answers(0.05), where="here", made_on=made_on)


def test_on_another_processor_a_little_more_passes_and_it_is_said_what_differs(golden: GoldenSet) -> None:
    checked = golden.check(answers(0.05), where="here", made_on=OTHER)
    assert checked.note is not None
    for word in ("off by 0.05", "1 other labels (0.png)", OTHER, kind_of_processor(), "verify"):
        assert word in checked.note


def test_places_and_answers_of_a_second_look_are_compared_where_somebody_looked_twice(
    golden: GoldenSet,
) -> None:
    golden.answers["images"][0]["second_look"] = {"box": [1, 2, 3, 4], "probabilities": [0.2, 0.8]}
    once = answers(0.0)
    assert golden.check(once, where="here").largest_difference == 0
    probabilities = np.array([[0.2, 0.8], [0.1, 0.9]])
    twice = replace(
        once,
        probabilities=probabilities,
        looked_twice=np.array([True, False]),
        boxes=np.array([[1, 2, 3, 4], [0, 0, 0, 0]]),
    )
    assert golden.check(twice, where="here").largest_difference == 0
    for changes in (
        {"boxes": np.array([[1, 2, 3, 5], [0, 0, 0, 0]])},
        {"looked_twice": np.array([False, False])},
        {"probabilities": once.probabilities},
    ):
        with pytest.raises(ExportError, match=r"1 other labels \(0\.png\)"):
            golden.check(replace(twice, **changes), where="here")


@pytest.mark.parametrize("moved", [INT8_TOLERANCE_ELSEWHERE + 0.01, np.nan])
def test_much_more_is_an_error_everywhere_and_names_both_processors(golden: GoldenSet, moved: float) -> None:
    with pytest.raises(ExportError, match=f"exported on a processor with {OTHER}, this one has"):
        golden.check(answers(moved), where="here", made_on=OTHER)
