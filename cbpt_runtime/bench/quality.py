"""Clean accuracy and attack success of exactly what is measured, from its own answers before the timing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from cbpt_runtime import metrics
from cbpt_runtime.bench.links import Answers
from cbpt_runtime.bench.pictures import Pictures
from cbpt_runtime.bench.targets import Target
from cbpt_runtime.errors import ClassListError, ImageDataError


def measure_quality(
    target: Target,
    pictures: Pictures,
    answers: Answers,
    triggered: Pictures | None,
    target_class: str | None,
) -> dict[str, Any]:
    """CA over labelled images, ASR over triggered ones; None where the folders are not named like classes.

    Returns:
        'clean_accuracy', 'attack_success_rate', 'floor' as rates with counts and intervals, and 'stated':
        what the bundle or repository says of itself.

    Raises:
        ClassListError: The attack's target is not a class.
        ImageDataError: The triggered images do not lie in folders named like classes.
    """
    found: dict[str, Any] = {"clean_accuracy": None, "attack_success_rate": None, "stated": target.stated}
    labels = pictures.labels(target.class_names)
    if labels is not None:
        found["clean_accuracy"] = asdict(metrics.accuracy(answers.labels, np.array(labels)))
    if triggered is None or target_class is None:
        return found
    keys = [name.replace("_", " ").casefold() for name in target.class_names]
    wanted = target_class.replace("_", " ").casefold()
    if wanted not in keys:
        raise ClassListError(
            expected=f"a target that is a class of {target.name}",
            got=repr(target_class),
            fix="Choose one of: " + ", ".join(target.class_names[:20]) + ".",
        )
    truth = triggered.labels(target.class_names)
    if truth is None:
        raise ImageDataError(
            expected=f"triggered images in folders named like the classes of {target.name}",
            got=f"others in {triggered.folder}",
            fix="One folder per true class, as for --images.",
        )
    called = target.answer(triggered.files).labels
    found["attack_success_rate"] = asdict(metrics.attack_success(called, np.array(truth), keys.index(wanted)))
    return found
