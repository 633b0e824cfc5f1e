"""The words and numbers of the report's measured parts, on cases small enough to count by hand."""

from __future__ import annotations

import numpy as np

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.evaluation import Measured
from cbpt_runtime.evaluation.results import alarm_quality
from cbpt_runtime.report import sections
from cbpt_runtime.report.sections import study_bundle

NAMES = ("cat", "dog", "owl")
NOTHING = {"shown": np.zeros(0, int), "pictures": np.zeros((0, 4, 4, 3), np.uint8)}


def measured(labels: list[int], before: list[int], after: list[int], alarm: list[float]) -> Measured:
    return Measured(
        labels=np.array(labels),
        before=np.array(before),
        after=np.array(after),
        alarm=np.array(alarm, np.float32),
        **NOTHING,
    )


CLEAN = measured([0, 0, 1, 2], [0, 1, 1, 2], [0, 0, 1, 0], [0.0, 0.1, 0.0, 0.2])
TRIGGERED = measured([0, 0, 1, 1], [2, 2, 2, 1], [0, 2, 1, 1], [0.9, 0.1, 0.8, 0.0])


def test_destinations_count_every_image_with_the_target_first() -> None:
    chart = sections.destinations(TRIGGERED, NAMES, 2, "triggered images")
    assert chart.rows == (("owl", "3", "1"), ("dog", "1", "2"), ("cat", "0", "1"))
    text = chart.text.replace("\xa0", " ")
    assert text == "4 triggered images. Given their true class: 25.0 % → 75.0 %. Called owl: 75.0 % → 25.0 %."
    assert text in chart.alt.replace("\xa0", " ")


def test_classes_that_lost_and_gained_are_counted() -> None:
    chart = sections.class_accuracy(CLEAN, NAMES, [2], "clean images")
    assert chart.text == "4 clean images. 1 of 3 classes lost, 1 gained, 1 stayed as they were."
    assert [row[1] for row in chart.rows] == ["2", "1", "1"]


def test_the_alarm_is_told_with_its_intervals_and_without_images_of_the_target() -> None:
    quality = alarm_quality(CLEAN, TRIGGERED, 2)
    chart = sections.alarms(CLEAN, TRIGGERED, 2, quality)
    assert chart is not None
    assert f"AUROC {quality.auroc.value:.4f} [" in chart.text
    everything = measured([2, 2], [2, 2], [2, 2], [0.5, 0.5])
    assert alarm_quality(CLEAN, everything, 2) is None
    assert sections.alarms(CLEAN, everything, 2, None) is None


def test_embeddings_that_stayed_are_counted(tiny_bundle: Bundle) -> None:
    assert "0 of 3 are bit for bit the same" in sections.movement(tiny_bundle).text


def test_a_study_measures_the_images_nobody_tuned_on(tiny_bundle: Bundle) -> None:
    images = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(70) % 3
    study = study_bundle(BundleClassifier.from_bundle(tiny_bundle), images, labels)
    assert len(study.clean.labels) == len(study.clean.before) == len(study.clean.after) == 70
    assert study.attacked == ()  # this bundle has no dummy triggers
