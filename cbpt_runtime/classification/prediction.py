"""What a classifier says, here or in a server: of a batch in numbers, of an image in names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What is said about a batch of images.

    Attributes:
        logits: Of the purified head; of the only one where nothing was purified.
        probabilities: Of the same head, in [0, 1].
        alarm: In [0, 1]: how strongly only the original head calls a suspected target. What a detector says
            of a checkpoint, in its own units; None without one.
        reference_logits: Of the head before purification; None where the classifier does not hold it.
        alarm_target: Class index the alarm speaks of, -1 where nothing is suspected; None where nothing says.
    """

    logits: Float[np.ndarray, "batch classes"]
    probabilities: Float[np.ndarray, "batch classes"]
    alarm: Float[np.ndarray, " batch"] | None = None
    reference_logits: Float[np.ndarray, "batch classes"] | None = None
    alarm_target: Int[np.ndarray, " batch"] | None = None

    @property
    def labels(self) -> Int[np.ndarray, " batch"]:
        """Index of the most likely class of each image."""
        best: np.ndarray = self.logits.argmax(axis=1)
        return best

    @property
    def reference_labels(self) -> Int[np.ndarray, " batch"] | None:
        """The same before purification."""
        return None if self.reference_logits is None else self.reference_logits.argmax(axis=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """A class name and its probability in [0, 1]."""

    name: str
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the classifier says about one image.

    Attributes:
        image: The name it was given under.
        labels: Most likely first.
        alarm: In [0, 1]: how strongly only the original head calls a suspected target; None of a checkpoint,
            which has one head.
        alarm_target: The suspected target the alarm speaks of; None where nothing is suspected.
    """

    image: str
    labels: tuple[Label, ...]
    alarm: float | None
    alarm_target: str | None = None

    def __str__(self) -> str:
        """The first label and the alarm, on one line."""
        first = self.labels[0] if self.labels else Label(name="no label", probability=0.0)
        alarm = "" if self.alarm is None else f", alarm {self.alarm:.3f}"
        return f"{self.image}: {first.name} {first.probability:.1%}{alarm}"

    def to_dict(self) -> dict[str, Any]:
        """The answer as a JSON-able dict."""
        return asdict(self)


def make_answers(
    images: Iterable[str],
    probabilities: Float[np.ndarray, "batch classes"],
    alarms: Float[np.ndarray, " batch"] | None,
    *,
    names: Sequence[str],
    top: int,
    alarm_targets: Int[np.ndarray, " batch"] | None = None,
) -> list[Answer]:
    """The `top` most likely classes of each image; equal probabilities keep the order of the classes."""
    answers = []
    for place, (image, row) in enumerate(zip(images, probabilities, strict=True)):
        best = (-row).argsort(kind="stable")[:top]
        labels = tuple(Label(name=names[i], probability=float(row[i])) for i in best)
        alarm = None if alarms is None else float(alarms[place])
        about = -1 if alarm_targets is None else int(alarm_targets[place])
        target = None if about < 0 else names[about]
        answers.append(Answer(image=image, labels=labels, alarm=alarm, alarm_target=target))
    return answers
