"""What an evaluation found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from cbpt_runtime.classification import Prediction
from cbpt_runtime.evaluation import metrics
from cbpt_runtime.evaluation.metrics import Estimate, Rate
from cbpt_runtime.runtime.prediction import above

DETECTION_RATE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRates:
    """What one head achieves; None where the images needed were not given.

    Attributes:
        clean_accuracy: CA, over all clean images.
        floor: Clean non-target images called the target.
        target_recall: Clean target images given the target.
        attack_success_rate: ASR, over triggered images whose true class is not the target.
        attack_success_rate_inclusive: Over all triggered images.
        poisoned_accuracy: PA, triggered images given their true class, over all triggered images.
    """

    clean_accuracy: Rate
    floor: Rate | None = None
    target_recall: Rate | None = None
    attack_success_rate: Rate | None = None
    attack_success_rate_inclusive: Rate | None = None
    poisoned_accuracy: Rate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmQuality:
    """How well the alarm, or another detector, tells triggered images from clean ones.

    Of the triggered images those count whose true class is not the target.

    Attributes:
        auroc: Chance that a triggered image has a higher alarm than a clean one.
        threshold: The highest alarm level that detects 95 % of the triggered images.
        false_alarm_rate: Clean images at or above it.
    """

    auroc: Estimate
    threshold: float
    false_alarm_rate: Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the level chosen at purification is worth on these images.

    Attributes:
        threshold: Above it an image is suspicious.
        false_alarm_rate: Clean images that are.
        detection_rate: Triggered images whose true class is not the target that are; None without any.
    """

    threshold: float
    false_alarm_rate: Rate
    detection_rate: Rate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What both heads say about a labelled set, image by image.

    Attributes:
        labels: True classes.
        before: Classes the only head of a checkpoint, or the reference head of a bundle, gives; None for what
            was exported, which has the purified head alone.
        after: Classes the purified head gives, after a second look where there is one; None for a checkpoint.
        after_head_alone: Classes it gives at the first look; None where nobody looks twice.
        alarm: In [0, 1]; what a detector says of a checkpoint, in its own units; None without one.
        shown: Rows of a few images kept to look at.
        pictures: These images at the model's size.
    """

    labels: Int[np.ndarray, " batch"]
    before: Int[np.ndarray, " batch"] | None
    after: Int[np.ndarray, " batch"] | None
    alarm: Float[np.ndarray, " batch"] | None
    after_head_alone: Int[np.ndarray, " batch"] | None = None
    shown: Int[np.ndarray, " examples"] = field(default_factory=lambda: np.zeros(0, int))
    pictures: UInt8[np.ndarray, "examples height width 3"] = field(
        default_factory=lambda: np.zeros((0, 1, 1, 3), np.uint8)
    )

    @property
    def heads(self) -> dict[str, Int[np.ndarray, " batch"]]:
        """The classes given 'before' and 'after', or one of them."""
        given = {"before": self.before, "after": self.after}
        return {name: called for name, called in given.items() if called is not None}

    def rows(self, chosen: Bool[np.ndarray, " batch"]) -> Measured:
        """Return some of the images; the pictures stay behind."""
        return Measured(
            labels=self.labels[chosen],
            before=None if self.before is None else self.before[chosen],
            after=None if self.after is None else self.after[chosen],
            alarm=None if self.alarm is None else self.alarm[chosen],
            after_head_alone=None if self.after_head_alone is None else self.after_head_alone[chosen],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A bundle measured before (reference head) and after purification, its export, or a checkpoint as it is.

    Attributes:
        source: Path or URL, or what names the checkpoint.
        kind: 'bundle', 'checkpoint', 'onnx', 'repository' or 'url'.
        digest: SHA-256 of the manifest, of the checkpoint's weights or of the graph; None of a server.
        class_names: In the order of the class indices.
        verdict: The bundle's verdict; None for a checkpoint.
        suspects: Names of the bundle's suspected targets.
        target: The target class the attack rates are about, if one was given.
        attack: What put the triggers on: a description of the trigger, or the folder they lay in.
        clean_images: Number of clean images.
        triggered_images: Number of triggered images.
        before: Rates of the reference head, or of a checkpoint's zero-shot head; None for what was exported,
            which has the purified head alone.
        after: Rates of the purified head, after a second look where there is one; None for a checkpoint.
        after_head_alone: Rates of the purified head at the first look; None where nobody looks twice.
        alarm: None without triggered images, or without suspects (the alarm is then always zero) or another
            detector.
        decision: What the level of the alarm that was chosen at purification is worth; None without one.
        encoder: 'untouched', or what a method made of the image tower: 'tuned' or 'prompted'. What was before
            is then not in the bundle: `before` is the zero-shot head of the *new* tower. None for what was
            exported, which does not say.
        detector: What `alarm` is of: 'alarm', 'bdetclip', or None.
        notes: Remarks for the user: what was adapted, and which files were left out.
        clean: Every clean image; not part of `to_dict`.
        triggered: Every triggered image; not part of `to_dict`.
    """

    source: str
    kind: str
    digest: str | None
    class_names: tuple[str, ...]
    verdict: str | None
    suspects: tuple[str, ...]
    target: str | None
    attack: dict[str, Any] | None
    clean_images: int
    triggered_images: int
    before: HeadRates | None
    after: HeadRates | None
    alarm: AlarmQuality | None
    after_head_alone: HeadRates | None = None
    decision: Decision | None = None
    encoder: str | None = "untouched"
    detector: str | None = None
    notes: tuple[str, ...] = ()
    clean: Measured | None = field(default=None, repr=False)
    triggered: Measured | None = field(default=None, repr=False)

    @property
    def heads(self) -> dict[str, HeadRates]:
        """The rates 'before' and 'after', or one of them."""
        given = {"before": self.before, "after": self.after}
        return {name: rates for name, rates in given.items() if rates is not None}

    @property
    def alarm_auroc(self) -> float | None:
        """The alarm's AUROC without its interval."""
        return None if self.alarm is None else self.alarm.auroc.value

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as a JSON-able dict, with what the images add up to class by class."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        for name in ("before", "after_head_alone", "after", "alarm", "decision"):
            plain[name] = None if getattr(self, name) is None else asdict(getattr(self, name))
        plain |= {"suspects": list(self.suspects), "notes": list(self.notes)}
        plain["per_class"] = [] if self.clean is None else per_class(self.clean, self.class_names)
        plain["triggered_predictions"] = (
            [] if self.triggered is None else prediction_counts(self.triggered, self.class_names)
        )
        return plain


_PLAIN = (
    "source",
    "kind",
    "digest",
    "verdict",
    "suspects",
    "target",
    "attack",
    "encoder",
    "detector",
    "clean_images",
    "triggered_images",
)


def measure_batch(labels: Int[np.ndarray, " batch"], said: Prediction, *, is_purified: bool) -> Measured:
    """Return what was said about a few images, next to their true classes.

    Args:
        labels: True classes.
        said: Of the same images.
        is_purified: Whether the head is the one after purification; a checkpoint's only one is that before.
    """
    before, after = (said.reference_labels, said.labels) if is_purified else (said.labels, None)
    alone = None if said.looked_twice is None else said.head_labels
    return Measured(labels=labels, before=before, after=after, alarm=said.alarm, after_head_alone=alone)


def join(
    parts: Sequence[Measured],
    shown: Int[np.ndarray, " examples"] | None = None,
    pictures: UInt8[np.ndarray, "examples height width 3"] | None = None,
) -> Measured:
    """Batches put together, with a few of their images."""

    def joined(values: list[Any]) -> Any:
        return None if values[0] is None else np.concatenate(values)

    whole: dict[str, Any] = {
        name: joined([getattr(part, name) for part in parts])
        for name in ("labels", "before", "after", "after_head_alone", "alarm")
    }
    if shown is not None and pictures is not None:
        whole |= {"shown": shown, "pictures": pictures}
    return Measured(**whole)


def summarise(
    clean: Measured, triggered: Measured | None, target: int | None, *, has_detector: bool
) -> tuple[dict[str, HeadRates], AlarmQuality | None]:
    """Rates of each head there is and the quality of the alarm, from what was said image by image."""
    heads = [*clean.heads, *(() if clean.after_head_alone is None else ("after_head_alone",))]
    rates = {head: _rates(head, clean, triggered, target) for head in heads}
    alarm = None
    if has_detector and triggered is not None and target is not None:
        alarm = alarm_quality(clean, triggered, target)
    return rates, alarm


def alarm_quality(clean: Measured, triggered: Measured, target: int) -> AlarmQuality | None:
    """Triggered images whose true class is not the target against all clean images."""
    if clean.alarm is None or triggered.alarm is None:
        return None
    attacks = triggered.alarm[triggered.labels != target]
    auroc = metrics.auroc_interval(attacks, clean.alarm)
    if auroc is None:
        return None
    return AlarmQuality(
        auroc=auroc,
        threshold=metrics.threshold_for_detection(attacks, DETECTION_RATE),
        false_alarm_rate=metrics.false_alarms(attacks, clean.alarm, DETECTION_RATE),
    )


def decision_quality(
    clean: Measured, triggered: Measured | None, target: int | None, threshold: float | None
) -> Decision | None:
    """How often the alarm lies above a level on clean and on triggered images; None without a level."""
    suspicious = above(clean.alarm, threshold)
    if suspicious is None or threshold is None:
        return None
    detected = None if triggered is None else above(triggered.alarm, threshold)
    if triggered is not None and detected is not None and target is not None:
        detected = detected[triggered.labels != target]
    return Decision(
        threshold=threshold,
        false_alarm_rate=metrics.share(suspicious),
        detection_rate=None if detected is None else metrics.share(detected),
    )


def per_class(clean: Measured, names: Sequence[str]) -> list[dict[str, Any]]:
    """Per class its clean images and how many of them each head gets right."""
    total = np.bincount(clean.labels, minlength=len(names))
    rows: list[dict[str, Any]] = [
        {"name": name, "images": int(count)} for name, count in zip(names, total, strict=True)
    ]
    for head, predicted in clean.heads.items():
        right = np.bincount(clean.labels[predicted == clean.labels], minlength=len(names))
        for row, count in zip(rows, right, strict=True):
            row[f"right_{head}"] = int(count)
    return rows


def prediction_counts(triggered: Measured, names: Sequence[str]) -> list[dict[str, Any]]:
    """How often each class is given to triggered images, most often first; classes never given left out."""
    counts = {head: np.bincount(called, minlength=len(names)) for head, called in triggered.heads.items()}
    total = np.sum(list(counts.values()), axis=0)
    return [
        {"name": names[index], **{head: int(count[index]) for head, count in counts.items()}}
        for index in np.argsort(-total, kind="stable")
        if total[index]
    ]


def _rates(head: str, clean: Measured, triggered: Measured | None, target: int | None) -> HeadRates:
    called = getattr(clean, head)
    accuracy = metrics.accuracy(called, clean.labels)
    if target is None:
        return HeadRates(clean_accuracy=accuracy)
    floor = metrics.floor(called, clean.labels, target)
    recall = metrics.target_recall(called, clean.labels, target)
    if triggered is None:
        return HeadRates(clean_accuracy=accuracy, floor=floor, target_recall=recall)
    triggered_called = getattr(triggered, head)
    return HeadRates(
        clean_accuracy=accuracy,
        floor=floor,
        target_recall=recall,
        attack_success_rate=metrics.attack_success(triggered_called, triggered.labels, target),
        attack_success_rate_inclusive=metrics.attack_success_inclusive(triggered_called, target),
        poisoned_accuracy=metrics.accuracy(triggered_called, triggered.labels),
    )
