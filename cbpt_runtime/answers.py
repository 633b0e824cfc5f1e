"""What a classifier says about an image file, whether it runs here or in a server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float


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
        alarm: In [0, 1]: how strongly only the original head calls a suspected target.
    """

    image: str
    labels: tuple[Label, ...]
    alarm: float

    def __str__(self) -> str:
        """The first label and the alarm, on one line."""
        first = self.labels[0] if self.labels else Label(name="no label", probability=0.0)
        return f"{self.image}: {first.name} {first.probability:.1%}, alarm {self.alarm:.3f}"

    def to_dict(self) -> dict[str, Any]:
        """The answer as a JSON-able dict."""
        return asdict(self)


def make_answers(
    images: Iterable[str],
    probabilities: Float[np.ndarray, "batch classes"],
    alarms: Float[np.ndarray, " batch"],
    *,
    names: Sequence[str],
    top: int,
) -> list[Answer]:
    """The `top` most likely classes of each image; equal probabilities keep the order of the classes."""
    answers = []
    for image, row, alarm in zip(images, probabilities, alarms, strict=True):
        best = (-row).argsort(kind="stable")[:top]
        labels = tuple(Label(name=names[i], probability=float(row[i])) for i in best)
        answers.append(Answer(image=image, labels=labels, alarm=float(alarm)))
    return answers
