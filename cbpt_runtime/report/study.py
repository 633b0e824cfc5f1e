"""What the report of a bundle measures: its dummy triggers on clean images nobody tuned on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.evaluation.measuring import measured
from cbpt_runtime.evaluation.results import AlarmQuality, Measured, alarm_quality
from cbpt_runtime.evaluation.subjects import Call, Called
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
    bundle: Bundle,
    images: UInt8[np.ndarray, "batch height width 3"],
    labels: Int[np.ndarray, " batch"],
    call: Call,
) -> Study:
    """Classify clean images with and without the first dummy trigger of each suspected target.

    Args:
        bundle: What to study.
        images: Clean images at the model's size, held out from tuning.
        labels: Their true classes.
        call: The bundle's classifier, as `open_subjects` gives it.
    """
    rows = np.unique(np.linspace(0, len(images) - 1, min(_MOST_IMAGES, len(images))).round().astype(int))
    images, labels = images[rows], labels[rows]
    none = np.zeros(0, int)
    bare: list[Called] = []
    painted: dict[tuple[int, str], list[Called]] = {}
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]
        bare.append(call(batch))
        for key, called in _call_painted(bundle, call, batch).items():
            painted.setdefault(key, []).append(called)
    clean = measured(labels, bare, none, images[:0])
    attacked = []
    for (target, family), parts in painted.items():
        others = labels != target
        kept = [_only(part, own) for part, own in zip(parts, _batches(others), strict=True)]
        found = measured(labels[others], kept, none, images[:0])
        quality = alarm_quality(clean, found, target)
        attacked.append(Attacked(family=family, target=target, measured=found, alarm=quality))
    return Study(clean=clean, attacked=tuple(attacked))


def _call_painted(bundle: Bundle, call: Call, batch: np.ndarray) -> dict[tuple[int, str], Called]:
    """What is said about the batch with the first dummy trigger of each suspected target."""
    found: dict[tuple[int, str], Called] = {}
    targets: set[int] = set()
    for dummy in paint_dummy_triggers(bundle, batch):
        if dummy.target not in targets and len(targets) < _MOST_SUSPECTS:
            targets.add(dummy.target)
            found[dummy.target, dummy.family] = call(dummy.images)
    return found


def _batches(mask: np.ndarray) -> list[np.ndarray]:
    return [mask[start : start + _BATCH] for start in range(0, len(mask), _BATCH)]


def _only(called: Called, rows: np.ndarray) -> Called:
    return Called(
        before=called.before[rows],
        after=None if called.after is None else called.after[rows],
        alarm=None if called.alarm is None else called.alarm[rows],
    )
