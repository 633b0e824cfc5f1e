"""What the report of a bundle measures: its dummy triggers on clean images nobody tuned on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8

from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.evaluation.results import AlarmQuality, Measured, alarm_quality, join, measure_batch
from cbpt_runtime.purification.dummy_triggers import paint_dummy_triggers

_MOST_SUSPECTS = 3
_MOST_IMAGES = 512
_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Attacked:
    """Clean images of other classes with the dummy trigger of one suspected target.

    Attributes:
        family: Family of the trigger.
        target: Class index of the suspected target.
        measured: What both heads say.
        alarm: How well the alarm tells them from the clean images.
    """

    family: str
    target: int
    measured: Measured
    alarm: AlarmQuality | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Both heads of a bundle on clean images, bare and with dummy triggers.

    Attributes:
        clean: The images as they are.
        attacked: One entry per suspected target, most suspicious first, three at most.
    """

    clean: Measured
    attacked: tuple[Attacked, ...]


def study_bundle(
    classifier: BundleClassifier,
    images: UInt8[np.ndarray, "batch height width 3"],
    labels: Int[np.ndarray, " batch"],
) -> Study:
    """Classify clean images with and without the first dummy trigger of each suspected target.

    Args:
        classifier: Of the bundle to study.
        images: Clean images at the model's size, held out from tuning.
        labels: Their true classes.
    """
    rows = np.unique(np.linspace(0, len(images) - 1, min(_MOST_IMAGES, len(images))).round().astype(int))
    images, labels = images[rows], labels[rows]
    bare: list[Measured] = []
    painted: dict[tuple[int, str], list[Measured]] = {}
    for start in range(0, len(images), _BATCH):
        batch, true = images[start : start + _BATCH], labels[start : start + _BATCH]
        bare.append(measure_batch(true, classifier.predict(batch), is_purified=True))
        for key, triggered in _painted(classifier, batch).items():
            found = measure_batch(true, classifier.predict(triggered), is_purified=True)
            painted.setdefault(key, []).append(found.rows(true != key[0]))
    clean = join(bare)
    attacked = []
    for (target, family), parts in painted.items():
        whole = join(parts)
        quality = alarm_quality(clean, whole, target)
        attacked.append(Attacked(family=family, target=target, measured=whole, alarm=quality))
    return Study(clean=clean, attacked=tuple(attacked))


def _painted(classifier: BundleClassifier, batch: np.ndarray) -> dict[tuple[int, str], np.ndarray]:
    """The batch with the first dummy trigger of each suspected target, by target and family."""
    found: dict[tuple[int, str], np.ndarray] = {}
    targets: set[int] = set()
    for dummy in paint_dummy_triggers(classifier.bundle, batch):
        if dummy.target not in targets and len(targets) < _MOST_SUSPECTS:
            targets.add(dummy.target)
            found[dummy.target, dummy.family] = dummy.images
    return found
