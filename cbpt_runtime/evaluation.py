"""Measures a bundle on labelled images: both heads, one encoder pass per image.

Triggered images come from a folder; how their trigger was made is nobody's business here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cbpt_runtime import metrics
from cbpt_runtime.bundle import Bundle, read_bundle
from cbpt_runtime.classifier import Prediction, ZeroShotClassifier
from cbpt_runtime.errors import ClassListError, ConfigError
from cbpt_runtime.metrics import Rate
from cbpt_runtime.models.data import ClassList, find_class_folders, read_images, spoken
from cbpt_runtime.types import Progress


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
class Evaluation:
    """A bundle measured before (reference head) and after purification.

    Attributes:
        bundle: Path of the bundle.
        digest: SHA-256 of its manifest.
        verdict: Its verdict.
        suspects: Names of its suspected targets.
        target: The target class the attack rates are about, if one was given.
        clean_images: Number of clean images.
        triggered_images: Number of triggered images.
        before: Rates of the reference head.
        after: Rates of the purified head.
        alarm_auroc: Chance that a triggered image has a higher alarm than a clean one; None without
            triggered images or without suspects (the alarm is then always zero).
    """

    bundle: str
    digest: str
    verdict: str
    suspects: tuple[str, ...]
    target: str | None
    clean_images: int
    triggered_images: int
    before: HeadRates
    after: HeadRates
    alarm_auroc: float | None

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as a JSON-able dict."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """Both heads' predictions and the alarm on a labelled set."""

    labels: Int[np.ndarray, " batch"]
    before: Int[np.ndarray, " batch"]
    after: Int[np.ndarray, " batch"]
    alarm: Float[np.ndarray, " batch"]


def evaluate(
    bundle: Bundle | str | Path,
    images: str | Path,
    triggered: str | Path | None = None,
    target: str | None = None,
    *,
    device: str = "auto",
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a bundle on a labelled folder, and on a folder of triggered images.

    Args:
        bundle: A bundle or the path of one.
        images: Clean images, one folder per class.
        triggered: Triggered images, folder = true class; classes may be missing.
        target: The attack's target class. Needed with ``triggered``; alone it adds floor and target recall.
        device: 'auto', 'cpu' or 'cuda'.
        batch_size: Images encoded at once.
        progress: Told after every batch.

    Raises:
        BundleError: The bundle is damaged.
        ClassListError: The target is not a class of the bundle.
        ConfigError: Triggered images without a target.
        ImageDataError: An image folder does not fit the classes, or an image cannot be read.
    """
    if not isinstance(bundle, Bundle):
        bundle = read_bundle(bundle)
    target_index = _find_target(bundle, triggered, target)
    classes = ClassList(
        names=bundle.class_names,
        templates=tuple(tuple(group) for group in bundle.manifest["classes"]["templates"]),
    )
    clean_folders = find_class_folders(Path(images), classes)
    triggered_folders = None
    if triggered is not None:
        triggered_folders = find_class_folders(Path(triggered), classes, allow_missing=True)

    classifier = ZeroShotClassifier.from_bundle(bundle, device)
    clean = _measure(classifier, clean_folders, "clean images", batch_size, progress)
    poisoned = None
    if triggered_folders is not None:
        poisoned = _measure(classifier, triggered_folders, "triggered images", batch_size, progress)
    return Evaluation(
        bundle=str(bundle.path),
        digest=bundle.digest,
        verdict=bundle.verdict,
        suspects=tuple(str(suspect["name"]) for suspect in bundle.suspects),
        target=None if target_index is None else bundle.class_names[target_index],
        clean_images=len(clean.labels),
        triggered_images=0 if poisoned is None else len(poisoned.labels),
        before=_rates(clean, poisoned, target_index, purified=False),
        after=_rates(clean, poisoned, target_index, purified=True),
        alarm_auroc=metrics.auroc(poisoned.alarm, clean.alarm) if poisoned and bundle.suspects else None,
    )


def _find_target(bundle: Bundle, triggered: str | Path | None, target: str | None) -> int | None:
    if target is None:
        if triggered is not None:
            raise ConfigError(
                expected="the target class of the triggered images",
                got="triggered images alone",
                fix="Name the class with --target.",
            )
        return None
    keys = [_key(name) for name in bundle.class_names]
    if _key(target) not in keys:
        raise ClassListError(
            expected="a target that is a class of the bundle",
            got=repr(target),
            fix="Choose one of: " + ", ".join(bundle.class_names) + ".",
        )
    return keys.index(_key(target))


def _key(name: str) -> str:
    return spoken(name).casefold()


def _measure(
    classifier: ZeroShotClassifier,
    folders: list[list[Path]],
    stage: str,
    batch_size: int,
    progress: Progress | None,
) -> _Measured:
    paths = [path for folder in folders for path in folder]
    labels = np.repeat(np.arange(len(folders)), [len(folder) for folder in folders])
    predictions: list[Prediction] = []
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        predictions.append(classifier.predict(read_images(batch, classifier.bundle.preprocess)))
        if progress is not None:
            progress(stage, start + len(batch), len(paths), {})
    return _Measured(
        labels=labels,
        before=np.concatenate([p.reference_logits.argmax(axis=1) for p in predictions]),
        after=np.concatenate([p.labels for p in predictions]),
        alarm=np.concatenate([p.alarm for p in predictions]),
    )


def _rates(clean: _Measured, poisoned: _Measured | None, target: int | None, *, purified: bool) -> HeadRates:
    predicted = clean.after if purified else clean.before
    accuracy = metrics.accuracy(predicted, clean.labels)
    if target is None:
        return HeadRates(clean_accuracy=accuracy)
    floor = metrics.floor(predicted, clean.labels, target)
    recall = metrics.target_recall(predicted, clean.labels, target)
    if poisoned is None:
        return HeadRates(clean_accuracy=accuracy, floor=floor, target_recall=recall)
    triggered = poisoned.after if purified else poisoned.before
    return HeadRates(
        clean_accuracy=accuracy,
        floor=floor,
        target_recall=recall,
        attack_success_rate=metrics.attack_success(triggered, poisoned.labels, target),
        attack_success_rate_inclusive=metrics.attack_success_inclusive(triggered, target),
        poisoned_accuracy=metrics.accuracy(triggered, poisoned.labels),
    )
