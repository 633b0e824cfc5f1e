"""A second look at suspicious images: without the trigger, where covering a part of them takes it away.

A suspicious image is looked at again under a grid of occlusions, each filled with the colour around it. Where
the original head is no longer sure of the suspected target, the occlusion has covered the trigger, and the
purified head answers on what is left. Where no occlusion does that, the first answer stays. NumPy only, so
that a bundle, a graph and a server share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int, UInt8

from cbpt_runtime.classification import zero_shot
from cbpt_runtime.classification.classifier import Classifier, Pixels
from cbpt_runtime.classification.prediction import Prediction
from cbpt_runtime.errors import ConfigError
from cbpt_runtime.models.preprocess import Preprocess

SIZES = (0.2, 0.3)
"""Sides of the occlusions, as shares of the shorter side of the image."""
STEP = 0.5
"""From one occlusion to the next, as a share of its side."""
RING = 1 / 16
"""Width of the ring that an occlusion is filled from, as a share of the shorter side of the image."""
KEPT = 5
"""Views that the answer is the mean of: those in which the original head is least sure of the target."""

Look = Callable[[UInt8[np.ndarray, "views height width 3"]], Prediction]
"""A first look: what a classifier says of pixels, with its alarm."""


class SecondLook(Classifier):
    """A classifier that looks again at suspicious images; others cost nothing more.

    Args:
        first: Whose answers those of the first look are: a bundle, a graph or a repository, whose suspected
            targets and level of the alarm are known.

    Raises:
        ConfigError: It calls nothing suspicious: a checkpoint, a bundle without suspects, or an older one
            without a level.
    """

    def __init__(self, first: Classifier) -> None:
        threshold = first.alarm_threshold
        if threshold is None or not first.suspect_indices:
            raise ConfigError(
                expected="a bundle or graph with suspected targets and a level of the alarm, to look twice",
                got=f"{first.source} ({first.kind}), which calls no image suspicious",
                fix="Purify again with this version, or leave the second look away.",
            )
        self.first, self._threshold = first, threshold
        self.kind, self.source, self.digest, self.place = first.kind, first.source, first.digest, first.place
        self.class_names, self.class_folders = first.class_names, first.class_folders
        self.verdict, self.encoder = first.verdict, first.encoder
        self.notes = (*first.notes, f"{first.source}: suspicious images are looked at twice")

    @property
    def preprocess(self) -> Preprocess:
        """How an image becomes the model's pixels."""
        return self.first.preprocess

    @property
    def suspects(self) -> tuple[str, ...]:
        """Names of the suspected targets."""
        return self.first.suspects

    @property
    def suspect_indices(self) -> tuple[int, ...]:
        """Class indices of the suspected targets."""
        return self.first.suspect_indices

    @property
    def alarm_threshold(self) -> float | None:
        """Above which alarm an image is suspicious."""
        return self._threshold

    def predict(self, images: Pixels) -> Prediction:
        """Classify images with the purified head, suspicious ones without what may be the trigger."""
        first = self.first
        said = first.predict(images)
        return look_again(
            images,
            said,
            first.predict,
            first.suspect_indices,
            threshold=self._threshold,
            sigmoid=first.sigmoid,
        )

    def close(self) -> None:
        """Close what the first look needs."""
        self.first.close()


def look_again(
    images: UInt8[np.ndarray, "batch height width 3"],
    said: Prediction,
    look: Look,
    suspects: Sequence[int],
    *,
    threshold: float,
    sigmoid: bool = False,
) -> Prediction:
    """Look again at every suspicious image that is not called a suspected target anyway.

    Args:
        images: RGB at the model's own size.
        said: Of a first look at them.
        look: Looks at the views, one image's at a time.
        suspects: Class indices of the suspected targets.
        threshold: Level of the alarm; the trigger is taken away where the original head's probability of a
            suspected target is at most this in some view.
        sigmoid: As in `zero_shot.probabilities`.

    Returns:
        The same prediction with other logits and probabilities for the images that an occlusion has freed of
        the trigger, and `looked_twice`, `boxes` and `head_logits` filled in.
    """
    doubtful = np.zeros(len(images), bool) if said.suspicious is None else said.suspicious
    rows = np.flatnonzero(doubtful & ~np.isin(said.labels, list(suspects)))
    logits, boxes = said.logits.copy(), np.zeros((len(images), 4), np.int64)
    grid = occlusions(images.shape[1], images.shape[2])
    for row in rows:
        seen = look(covered(images[row], grid))
        certainty = original_certainty(seen, suspects)
        order = certainty.argsort(kind="stable")[:KEPT]
        if certainty[order[0]] <= threshold:
            logits[row] = seen.logits[order].mean(axis=0)
            boxes[row] = grid[order[0]]
    twice = np.zeros(len(images), bool)
    twice[rows] = True
    return replace(
        said,
        logits=logits,
        probabilities=zero_shot.probabilities(logits, sigmoid=sigmoid),
        looked_twice=twice,
        boxes=boxes,
        head_logits=said.logits,
    )


def occlusions(height: int, width: int) -> Int[np.ndarray, "views 4"]:
    """Left, top, right and bottom of every occlusion, in pixels; those of a size cover the whole image."""
    shorter = min(height, width)
    boxes = [
        (left, top, left + side, top + side)
        for side in (max(1, round(size * shorter)) for size in SIZES)
        for top in _starts(height, side)
        for left in _starts(width, side)
    ]
    return np.array(boxes)


def covered(
    image: UInt8[np.ndarray, "height width 3"], boxes: Int[np.ndarray, "views 4"]
) -> UInt8[np.ndarray, "views height width 3"]:
    """The image under each occlusion, filled with the mean colour of a ring around it."""
    height, width = image.shape[:2]
    ring = max(1, round(RING * min(height, width)))
    views = np.repeat(image[None], len(boxes), axis=0)
    for view, (left, top, right, bottom) in zip(views, boxes, strict=True):
        around = image[max(0, top - ring) : bottom + ring, max(0, left - ring) : right + ring]
        inside = image[top:bottom, left:right]
        total = around.sum(axis=(0, 1), dtype=np.float64) - inside.sum(axis=(0, 1), dtype=np.float64)
        count = around.shape[0] * around.shape[1] - inside.shape[0] * inside.shape[1]
        mean = total / count if count else inside.mean(axis=(0, 1))
        view[top:bottom, left:right] = np.rint(mean).astype(np.uint8)
    return views


def original_certainty(seen: Prediction, suspects: Sequence[int]) -> Float[np.ndarray, " views"]:
    """How sure the original head is of a suspected target, from alarm and purified head alone.

    ``alarm = p_reference (1 - p_purified)`` is solved for the former; of several targets an upper bound.
    """
    if seen.alarm is None:
        raise ValueError("a second look needs the alarm")
    after = seen.probabilities[:, list(suspects)].max(axis=1)
    certainty: np.ndarray = np.minimum(1, seen.alarm / np.maximum(1 - after, 1e-6))
    return certainty


def _starts(length: int, side: int) -> list[int]:
    """Where occlusions begin along one axis: evenly spread, the last at the very end."""
    count = 1 + -(-(length - side) // max(1, round(STEP * side)))
    return sorted({round(start) for start in np.linspace(0, length - side, max(1, count)).tolist()})
