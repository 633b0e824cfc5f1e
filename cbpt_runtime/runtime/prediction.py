"""What a classifier says, here or in a server: of a batch in numbers, of an image in names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

OUTPUTS = ("logits", "probabilities", "alarm", "alarm_target")
"""What a graph of `export` says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What is said about a batch of images.

    Attributes:
        logits: Of the purified head; of the only one where nothing was purified.
        probabilities: Of the same head, in [0, 1].
        alarm: In [0, 1]: how strongly only the original head calls a suspected target. What a detector says
            of a checkpoint, in its own units; None without one.
        reference_logits: Of the head before purification; None where the classifier does not hold it.
        suspicious: Whether the alarm lies above the level chosen at purification; None where none was chosen.
        looked_twice: Whether it was looked at again under occlusions; None where nobody looks twice.
        boxes: Left, top, right and bottom, in pixels, of the occlusion that took the trigger away; zeros
            where there is none. None where nobody looks twice.
        head_logits: Of the purified head at the first look; None where that is all there is.
        alarm_target: Class index the alarm speaks of, -1 where nothing is suspected; None where nothing says.
    """

    logits: Float[np.ndarray, "batch classes"]
    probabilities: Float[np.ndarray, "batch classes"]
    alarm: Float[np.ndarray, " batch"] | None = None
    reference_logits: Float[np.ndarray, "batch classes"] | None = None
    suspicious: Bool[np.ndarray, " batch"] | None = None
    looked_twice: Bool[np.ndarray, " batch"] | None = None
    boxes: Int[np.ndarray, "batch 4"] | None = None
    head_logits: Float[np.ndarray, "batch classes"] | None = None
    alarm_target: Int[np.ndarray, " batch"] | None = None

    @property
    def labels(self) -> Int[np.ndarray, " batch"]:
        """Index of the most likely class of each image."""
        best: np.ndarray = self.logits.argmax(axis=1)
        return best

    @property
    def head_labels(self) -> Int[np.ndarray, " batch"]:
        """The same of the purified head at the first look."""
        return self.labels if self.head_logits is None else self.head_logits.argmax(axis=1)

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
        suspicious: Whether the alarm lies above the level chosen at purification; None where none was chosen.
        looked_twice: Whether it was looked at again under occlusions; None where nobody looks twice.
        box: Left, top, right and bottom, in pixels at the model's size, of the occlusion that took the
            trigger away; the labels are then those of what is left of the image.
        alarm_target: The suspected target the alarm speaks of; None where nothing is suspected.
    """

    image: str
    labels: tuple[Label, ...]
    alarm: float | None
    suspicious: bool | None = None
    looked_twice: bool | None = None
    box: tuple[int, int, int, int] | None = None
    alarm_target: str | None = None

    def __str__(self) -> str:
        """Return the first label and the alarm, on one line."""
        first = self.labels[0] if self.labels else Label(name="no label", probability=0.0)
        alarm = "" if self.alarm is None else f", alarm {self.alarm:.3f}"
        suspicion = ", suspicious" if self.suspicious else ""
        suspicion += "" if self.box is None else " ({}, {} to {}, {} covered)".format(*self.box)
        return f"{self.image}: {first.name} {first.probability:.1%}{alarm}{suspicion}"

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as a JSON-able dict."""
        return asdict(self)


def above(
    alarm: Float[np.ndarray, " batch"] | None, threshold: float | None
) -> Bool[np.ndarray, " batch"] | None:
    """Which images are suspicious; None where there is no alarm, or no level was chosen for it."""
    if alarm is None or threshold is None:
        return None
    suspicious: np.ndarray = alarm > np.float32(threshold)
    return suspicious


def prediction_of(outputs: Mapping[str, np.ndarray], threshold: float | None) -> Prediction:
    """Read the `OUTPUTS` of a graph; suspicious are images whose alarm lies above a level."""
    alarm = outputs["alarm"].ravel()
    return Prediction(
        logits=outputs["logits"],
        probabilities=outputs["probabilities"],
        alarm=alarm,
        suspicious=above(alarm, threshold),
        alarm_target=outputs["alarm_target"].ravel(),
    )


def parse_level(said: str | None) -> float | None:
    """Return the level of the alarm as a graph or a server writes it; None where it writes none.

    Raises:
        ValueError: It is no number in [0, 1].
    """
    if said is None:
        return None
    level = float(said)
    if not 0 <= level <= 1:
        raise ValueError(said)
    return level


def answers_of(images: Iterable[str], said: Prediction, *, names: Sequence[str], top: int) -> list[Answer]:
    """Say in names what a prediction says of each image: the `top` most likely classes, its alarm and so on.

    Equal probabilities keep the order of the classes.
    """
    return [
        _answer(image, said, row, names=names, top=top)
        for row, image in zip(range(len(said.probabilities)), images, strict=True)
    ]


def _answer(image: str, said: Prediction, row: int, *, names: Sequence[str], top: int) -> Answer:
    probabilities = said.probabilities[row]
    best = (-probabilities).argsort(kind="stable")[:top]
    about = -1 if said.alarm_target is None else int(said.alarm_target[row])
    box = () if said.boxes is None else said.boxes[row].tolist()
    return Answer(
        image=image,
        labels=tuple(Label(name=names[i], probability=float(probabilities[i])) for i in best),
        alarm=None if said.alarm is None else float(said.alarm[row]),
        suspicious=None if said.suspicious is None else bool(said.suspicious[row]),
        looked_twice=None if said.looked_twice is None else bool(said.looked_twice[row]),
        box=tuple(box) if any(box) else None,
        alarm_target=None if about < 0 else names[about],
    )
