"""Measures classifiers on labelled images: one pass over the images per classifier.

Triggered images come from a folder, or the trigger is put on the clean images at the model's input size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import UInt8

from cbpt_runtime.classification import Classifier
from cbpt_runtime.classification.checkpoint import Detector
from cbpt_runtime.errors import ConfigError, ImageDataError
from cbpt_runtime.evaluation.results import (
    Evaluation,
    Measured,
    decision_quality,
    join,
    measure_batch,
    summarise,
)
from cbpt_runtime.loading import Source, open_classifiers
from cbpt_runtime.models.data import ClassList, class_index, find_class_folders, read_images
from cbpt_runtime.models.image_files import unreadable_among, unreadable_error, unreadable_notes
from cbpt_runtime.runtime.preprocess import Preprocess
from cbpt_runtime.trust import ANYONE, Trust

if TYPE_CHECKING:
    from cbpt_runtime.export.session import Provider
    from cbpt_runtime.progress import Progress
    from cbpt_runtime.redteam.triggers import Trigger

Images = UInt8[np.ndarray, "batch height width 3"]
_SHOWN = 6  # pictures kept to look at


def evaluate(
    source: Source,
    images: str | Path,
    triggered: str | Path | None = None,
    target: str | None = None,
    *,
    attack: Trigger | None = None,
    seed: int = 0,
    classes: ClassList | None = None,
    model: str | Path | None = None,
    image_size: int | None = None,
    device: str = "auto",
    provider: Provider = "cpu",
    batch_size: int = 64,
    detector: Detector | None = None,
    skip_unreadable: bool = False,
    trust: Trust = ANYONE,
    second_look: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure one classifier; errors as of `evaluate_all`.

    Args:
        source: A classifier, a bundle, or what names one: a path, the URL of a server, a checkpoint.
        images: Clean images, one folder per class.
        triggered: Triggered images, folder = true class; classes may be missing.
        target: The attack's target class.
        attack: A trigger to put on the clean images, instead of ``triggered``.
        seed: Seed of what the trigger draws anew for each image.
        classes: Class list of checkpoints; that of the first bundle if None.
        model: Architecture of checkpoints that do not say; or served model, where a server has several.
        image_size: Side of the input of checkpoints, instead of their configuration's.
        device: Of bundles and checkpoints: 'auto', 'cpu' or 'cuda'.
        provider: Of ONNX files and repositories: 'cpu', 'cuda' or 'tensorrt'.
        batch_size: Images encoded at once.
        detector: A test-time detector for the checkpoints, measured as the alarm of bundles is.
        skip_unreadable: Leave out images that cannot be read; the notes count and name them.
        trust: What every source given by its path has to show; only bundles and repositories can.
        second_look: Bundles, ONNX files and repositories look again at suspicious images: `after` is what
            comes of it, `after_head_alone` what the purified head says at the first look.
        progress: Told after every batch.
    """
    (measured,) = evaluate_all(
        [source],
        images,
        triggered,
        target,
        attack=attack,
        seed=seed,
        classes=classes,
        model=model,
        image_size=image_size,
        device=device,
        provider=provider,
        batch_size=batch_size,
        detector=detector,
        skip_unreadable=skip_unreadable,
        trust=trust,
        second_look=second_look,
        progress=progress,
    )
    return measured


def evaluate_all(
    sources: Sequence[Source],
    images: str | Path,
    triggered: str | Path | None = None,
    target: str | None = None,
    *,
    attack: Trigger | None = None,
    seed: int = 0,
    classes: ClassList | None = None,
    model: str | Path | None = None,
    image_size: int | None = None,
    device: str = "auto",
    provider: Provider = "cpu",
    batch_size: int = 64,
    detector: Detector | None = None,
    skip_unreadable: bool = False,
    trust: Trust = ANYONE,
    second_look: bool = False,
    progress: Progress | None = None,
) -> tuple[Evaluation, ...]:
    """Measure classifiers on a labelled folder, and on triggered images.

    Every image is brought to the model's size here, so that all see the same; a server is sent pixels.

    Args:
        sources: Bundles, ONNX files, model repositories, URLs of servers or checkpoints, all over one class
            list.
        images: Clean images, one folder per class.
        triggered: Triggered images, folder = true class; classes may be missing.
        target: The attack's target class. Needed with triggered images; alone it adds floor and target
            recall.
        attack: A trigger to put on the clean images, instead of ``triggered``.
        seed: Seed of what the trigger draws anew for each image.
        classes: Class list of checkpoints; that of the first bundle if None.
        model: Architecture of checkpoints that do not say; or served model, where a server has several.
        image_size: Side of the input of checkpoints, instead of their configuration's.
        device: Of bundles and checkpoints: 'auto', 'cpu' or 'cuda'.
        provider: Of ONNX files and repositories: 'cpu', 'cuda' or 'tensorrt'.
        batch_size: Images encoded at once.
        detector: A test-time detector for the checkpoints, measured as the alarm of bundles is.
        skip_unreadable: Leave out images that cannot be read; the notes count and name them.
        trust: What every source given by its path has to show; only bundles and repositories can.
        second_look: Bundles, ONNX files and repositories look again at suspicious images: `after` is what
            comes of it, `after_head_alone` what the purified head says at the first look.
        progress: Told after every batch.

    Raises:
        BundleError: A bundle is damaged.
        RepositoryError: A repository is damaged.
        CheckpointError: A checkpoint cannot be used.
        ClassListError: The class lists differ, or the target is not a class.
        ConfigError: Triggered images without a target, or from two sources; a detector without a checkpoint.
        ImageDataError: An image folder does not fit the classes, an image cannot be read, or the trigger is
            larger than the model's input.
        ExportError: A golden answer of a repository is wrong.
        ServingError: A server does not answer.
        TrustError: A source is not the trusted bundle or repository.
    """
    _check_attack(triggered, target, attack)
    with open_classifiers(
        sources,
        classes=classes,
        model=model,
        image_size=image_size,
        device=device,
        provider=provider,
        detector=detector,
        images=Path(images),
        trust=trust,
        second_look=second_look,
    ) as opened:
        first = opened[0]
        index = None if target is None else class_index(first.class_names, target, where=first.source)
        own = (classifier.class_folders for classifier in opened)
        folders = next(filter(None, own), () if classes is None else classes.folders)
        find = partial(_labelled, classifier=first, folders=folders, skip_unreadable=skip_unreadable)
        work = _Work(
            clean=find(Path(images)),
            triggered=None if triggered is None else find(Path(triggered), allow_missing=True),
            triggered_folder=None if triggered is None else str(triggered),
            target=index,
            attack=attack,
            seed=seed,
            batch_size=batch_size,
        )
        return tuple(_evaluate(classifier, work, progress) for classifier in opened)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Labelled:
    """Image files of a folder with the indices of their true classes, and what was left out."""

    paths: list[Path]
    labels: np.ndarray
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What every classifier is measured on."""

    clean: _Labelled
    triggered: _Labelled | None
    triggered_folder: str | None
    target: int | None
    attack: Trigger | None
    seed: int
    batch_size: int


def _check_attack(triggered: str | Path | None, target: str | None, attack: Trigger | None) -> None:
    if triggered is not None and attack is not None:
        raise ConfigError(
            expected="triggered images from one source",
            got="a folder of them and an attack to apply",
            fix="Give --triggered or --attack.",
        )
    if target is None and (triggered is not None or attack is not None):
        raise ConfigError(
            expected="the target class of the triggered images",
            got="triggered images alone",
            fix="Name the class with --target.",
        )


def _evaluate(classifier: Classifier, work: _Work, progress: Progress | None) -> Evaluation:
    def tell(stage: str, done: int, total: int) -> None:
        if progress is not None:
            progress(stage, done, total, {})

    measure = partial(_measure, classifier, batch_size=work.batch_size)
    clean = measure(work.clean, lambda d, t: tell("clean images", d, t))
    notes = (*classifier.notes, *work.clean.notes)
    triggered: Measured | None = None
    described: dict[str, Any] | None = None
    if work.triggered is not None:
        described = {"folder": work.triggered_folder}
        triggered = measure(work.triggered, lambda d, t: tell("triggered images", d, t))
        notes += tuple(note for note in work.triggered.notes if note not in notes)
    elif work.attack is not None:
        from cbpt_runtime.redteam.triggers import describe_trigger

        described = {**describe_trigger(work.attack), "seed": work.seed}
        paint = _painter(work.attack, work.seed)
        triggered = measure(work.clean, lambda d, t: tell("triggered images", d, t), paint)
    target, has_detector = work.target, classifier.detector is not None
    rates, alarm = summarise(clean, triggered, target, has_detector=has_detector)
    return Evaluation(
        source=classifier.source,
        kind=classifier.kind,
        digest=classifier.digest,
        class_names=classifier.class_names,
        verdict=classifier.verdict,
        suspects=classifier.suspects,
        encoder=classifier.encoder,
        detector=classifier.detector,
        target=None if target is None else classifier.class_names[target],
        attack=described,
        clean_images=len(clean.labels),
        triggered_images=0 if triggered is None else len(triggered.labels),
        before=rates.get("before"),
        after=rates.get("after"),
        after_head_alone=rates.get("after_head_alone"),
        alarm=alarm,
        decision=decision_quality(clean, triggered, target, classifier.alarm_threshold),
        notes=notes,
        clean=clean,
        triggered=triggered,
    )


def _painter(attack: Trigger, seed: int) -> Callable[[Images], Images]:
    """Return the trigger with one generator of its own, so that every classifier meets the same triggers."""
    from cbpt_runtime.redteam.triggers import apply_trigger

    generator = torch.Generator().manual_seed(seed)
    return lambda images: apply_trigger(attack, images, generator)


def _labelled(
    root: Path,
    *,
    classifier: Classifier,
    folders: tuple[str, ...],
    skip_unreadable: bool,
    allow_missing: bool = False,
) -> _Labelled:
    """List the images of a folder, read once to leave out those that cannot be read if that is asked for."""
    found = find_class_folders(root, classifier.class_names, folders=folders, allow_missing=allow_missing)
    labelled = [(path, label) for label, folder in enumerate(found) for path in folder]
    reasons: dict[Path, str] = {}
    if skip_unreadable:
        reasons = unreadable_among([path for path, _ in labelled], classifier.preprocess)
    kept = [(path, label) for path, label in labelled if path not in reasons]
    if not kept:
        raise unreadable_error(reasons, len(labelled))
    return _Labelled(
        paths=[path for path, _ in kept],
        labels=np.array([label for _, label in kept]),
        notes=(*found.notes, *unreadable_notes(reasons, root)),
    )


def _measure(
    classifier: Classifier,
    files: _Labelled,
    tell: Callable[[int, int], None],
    paint: Callable[[Images], Images] | None = None,
    *,
    batch_size: int,
) -> Measured:
    """Everything said about the files, read batch by batch."""
    count = len(files.paths)
    shown = np.unique(np.linspace(0, count - 1, min(_SHOWN, count)).round().astype(int))
    is_purified = classifier.kind != "checkpoint"
    parts: list[Measured] = []
    pictures = []
    for start in range(0, count, batch_size):
        batch = _read_batch(files.paths, start, batch_size, classifier.preprocess)
        batch = batch if paint is None else paint(batch)
        labels = files.labels[start : start + len(batch)]
        parts.append(measure_batch(labels, classifier.predict(batch), is_purified=is_purified))
        pictures.append(batch[shown[(shown >= start) & (shown < start + len(batch))] - start])
        tell(start + len(batch), count)
    return join(parts, shown, np.concatenate(pictures))


def _read_batch(paths: list[Path], start: int, size: int, preprocess: Preprocess) -> Images:
    """Return some of the images; where one cannot be read, all that cannot are named."""
    try:
        return read_images(paths[start : start + size], preprocess)
    except ImageDataError as error:
        raise unreadable_error(unreadable_among(paths, preprocess), len(paths)) from error
