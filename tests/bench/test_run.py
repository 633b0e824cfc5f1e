from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest

from cbpt_runtime.bench.generator import Answers
from cbpt_runtime.bench.inputs import Pictures
from cbpt_runtime.bench.run import measure_quality
from cbpt_runtime.bench.systems import System
from cbpt_runtime.classification import Classifier, Prediction
from cbpt_runtime.errors import ClassListError, ImageDataError
from cbpt_runtime.runtime.preprocess import Preprocess

NAMES = ("T-shirt/top", "café", "sea lion", "kite")


class Named(Classifier):
    """Has classes, and is asked nothing."""

    kind = "url"
    source = place = "it"
    class_names = NAMES

    def __init__(self, folders: tuple[str, ...]) -> None:
        self.class_folders = folders

    @property
    def preprocess(self) -> Preprocess:
        raise AssertionError

    def predict(self, images: np.ndarray) -> Prediction:
        raise AssertionError


def system(folders: tuple[str, ...] = ()) -> System:
    return System(name="it", classifier=Named(folders), facts={}, max_batch=8)


def pictures(*folders: str) -> Pictures:
    names = tuple(f"{folder}/{number}.png" for number, folder in enumerate(folders))
    return Pictures(folder=Path("images"), names=names, files=(b"",) * len(names))


@pytest.fixture
def answers() -> Answers:
    """Says class 0, 1, 2, 3."""
    zeros = np.zeros(4, np.float32)
    return Answers(labels=np.arange(4), probabilities=zeros + 1, alarms=zeros)


def test_folders_are_matched_as_every_other_verb_matches_them(answers: Answers) -> None:
    shown = pictures("t-shirt top", unicodedata.normalize("NFD", "Café"), "sea  lion", "KITE")
    found = measure_quality(system(), shown, answers, None, None)
    assert found.clean_accuracy is not None
    assert (found.unmatched, found.clean_accuracy.rate) == ((), 1.0)


def test_a_class_list_may_have_other_folders(answers: Answers) -> None:
    shown = pictures("n01", "n02", "sea_lion", "n04")
    found = measure_quality(system(("n01", "n02", "n03", "n04")), shown, answers, None, None)
    assert found.clean_accuracy is not None
    assert found.clean_accuracy.rate == 1.0


def test_folders_that_are_no_class_are_named_and_nothing_is_measured(answers: Answers) -> None:
    shown = pictures("kite", "owl", "train/fox", "owl")
    found = measure_quality(system(), shown, answers, None, None)
    assert (found.unmatched, found.clean_accuracy) == (("owl", "train/fox"), None)


def test_triggered_images_and_their_target_have_to_be_of_the_classes(answers: Answers) -> None:
    shown = pictures("kite", "kite", "kite", "kite")
    with pytest.raises(ClassListError, match=r"a class of it; got 'owl'. Choose one of: T-shirt/top, café"):
        measure_quality(system(), shown, answers, shown, "owl")
    with pytest.raises(ImageDataError, match="others in images: owl"):
        measure_quality(system(), shown, answers, pictures("owl"), "Sea_Lion")
