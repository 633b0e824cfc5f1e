"""Clean accuracy and attack success of exactly what is measured, from its own answers before the timing."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from cbpt_runtime.bench.links import Answers
from cbpt_runtime.bench.pictures import Pictures
from cbpt_runtime.bench.targets import Target
from cbpt_runtime.errors import ImageDataError
from cbpt_runtime.evaluation import metrics
from cbpt_runtime.models.data import class_index
from cbpt_runtime.models.image_files import first_few


def measure_quality(
    target: Target,
    pictures: Pictures,
    answers: Answers,
    triggered: Pictures | None,
    target_class: str | None,
) -> dict[str, Any]:
    """CA over labelled images, ASR over triggered ones; None where the folders are not named like classes.

    Returns:
        'clean_accuracy', 'attack_success_rate', 'floor' as rates with counts and intervals; 'stated': what
        the bundle or repository says of itself; 'unmatched': folders of images that are no class, for the
        sake of which there is no clean accuracy.

    Raises:
        ClassListError: The attack's target is not a class.
        ImageDataError: The triggered images do not lie in folders named like classes.
    """
    found: dict[str, Any] = {"clean_accuracy": None, "attack_success_rate": None, "stated": target.stated}
    labels, found["unmatched"] = _labels(target, pictures)
    if not found["unmatched"]:
        found["clean_accuracy"] = asdict(metrics.accuracy(answers.labels, labels))
    if triggered is None or target_class is None:
        return found
    wanted = class_index(target.class_names, target_class, where=target.name)
    truth, unmatched = _labels(target, triggered)
    if unmatched:
        raise ImageDataError(
            expected=f"triggered images in folders named like the classes of {target.name}",
            got=f"others in {triggered.folder}: {first_few(unmatched)}",
            fix="One folder per true class, as for --images.",
        )
    called = target.answer(triggered.files).labels
    found["attack_success_rate"] = asdict(metrics.attack_success(called, truth, wanted))
    return found


def _labels(target: Target, pictures: Pictures) -> tuple[Int[np.ndarray, " images"], list[str]]:
    """True classes, -1 where there is none; and the folders of these images."""
    found = pictures.labels(target.class_names, target.class_folders)
    missing = {
        Path(name).parent.as_posix()
        for name, label in zip(pictures.names, found, strict=True)
        if label is None
    }
    return np.array([-1 if label is None else label for label in found]), sorted(missing)
