"""A second look at suspicious images: without the trigger, where covering a part of them takes it away.

A suspicious image is looked at again with a square of it covered, filled with the colour around it: at every
place of a coarse grid, then at places of finer grids inside the square that worked best. Where the original
head is no longer sure of the suspected target, the square has covered the trigger, and the purified head
answers on what is left. Where only the largest squares do that, or none, there is no patch under them,
and the first answer stays.

It is not done for an image that the purified head calls a suspected target anyway, or of which the original
head is not sure, and never ends with a suspected target:
no attack succeeds more often than without it, whatever an attacker knows. NumPy only: it also runs inside a
server, and travels in the repositories that are exported with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from .prediction import Prediction
from .preprocess import Pixels
from .zero_shot import probabilities

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

SIZES = (0.5, 0.3, 0.2)
"""Sides of the squares, as shares of the shorter side of the image, from coarse to fine."""
PATCH = 0.3
"""Side of the squares, one of `SIZES`, that have to cover the trigger: a half takes from any trigger."""
PLACES = 3
"""Places along an axis at least; as many more as squares need to overlap by half."""
RING = 1 / 16
"""Width of the ring that a square is filled from, as a share of the shorter side of the image."""
KEPT = 3
"""Views at most that the answer is the mean of: those where the original head is least sure of the target."""
UNSURE = 0.2
"""Probability of the target at which the original head counts as unsure, where the alarm's level is lower."""

Box = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels."""

Look = Callable[[Pixels], Prediction]
"""A first look: what a classifier says of pixels, with its alarm."""


@dataclass(slots=True)
class _Search:
    """Where the trigger of one image may be, and what was seen without it."""

    row: int
    box: Box
    seen: list[tuple[float, Float[np.ndarray, " classes"]]] = field(default_factory=list)


def look_again(
    images: Pixels,
    said: Prediction,
    look: Look,
    suspects: Sequence[int],
    *,
    threshold: float,
    sigmoid: bool = False,
) -> Prediction:
    """Look again at every suspicious image that only the original head calls a suspected target.

    Args:
        images: RGB at the model's own size.
        said: Of a first look at them.
        look: Looks at the views.
        suspects: Class indices of the suspected targets.
        threshold: Level of the alarm; the original head is sure of the suspected target where its probability
            is above this, and above `UNSURE`.
        sigmoid: As in `zero_shot.probabilities`.

    Returns:
        The same prediction with other logits and probabilities for the images that a square has freed of the
        trigger, in which a suspected target comes last; and `looked_twice`, `boxes` and `head_logits`.
    """
    doubtful = np.zeros(len(images), bool) if said.suspicious is None else said.suspicious
    level = max(threshold, UNSURE)
    twice = doubtful & ~np.isin(said.labels, list(suspects)) & (original_certainty(said, suspects) > level)
    height, width = images.shape[1:3]
    going = [_Search(row=int(row), box=(0, 0, width, height)) for row in np.flatnonzero(twice)]
    for size in SIZES:
        side = max(1, round(size * min(height, width)))
        going = _look_inside(going, images, look, suspects, side, level)
        if size == PATCH:
            freed = going
    logits, boxes = said.logits.copy(), np.zeros((len(images), 4), np.int64)
    for search in freed:
        best = sorted(search.seen, key=lambda view: view[0])[:KEPT]
        logits[search.row] = np.mean([row for _, row in best], axis=0)
        logits[search.row, list(suspects)] = logits[search.row].min()
        boxes[search.row] = search.box
    return replace(
        said,
        logits=logits,
        probabilities=probabilities(logits, sigmoid=sigmoid),
        looked_twice=twice,
        boxes=boxes,
        head_logits=said.logits,
    )


def _look_inside(
    searches: Sequence[_Search],
    images: Pixels,
    look: Look,
    suspects: Sequence[int],
    side: int,
    level: float,
) -> list[_Search]:
    """Cover squares inside every search's box; those that took the trigger away go on in the best one."""
    grids = [squares(search.box, side) for search in searches]
    if not grids:
        return []
    views = [covered(images[search.row], grid) for search, grid in zip(searches, grids, strict=True)]
    seen = look(np.concatenate(views))
    certainty = original_certainty(seen, suspects)
    going, end = [], 0
    for search, grid in zip(searches, grids, strict=True):
        start, end = end, end + len(grid)
        free = [view for view in range(start, end) if certainty[view] <= level]
        search.seen += [(float(certainty[view]), seen.logits[view]) for view in free]
        if free:
            search.box = grid[int(certainty[start:end].argmin())]
            going.append(search)
    return going


def squares(box: Box, side: int) -> list[Box]:
    """Every place of a grid at which a square is covered; together they cover the box."""
    left, top, right, bottom = box
    return [
        (x, y, min(x + side, right), min(y + side, bottom))
        for y in _starts(top, bottom, side)
        for x in _starts(left, right, side)
    ]


def covered(
    image: UInt8[np.ndarray, "height width 3"], boxes: Sequence[Box]
) -> UInt8[np.ndarray, "views height width 3"]:
    """Return the image with each box covered by the mean colour of a ring around it."""
    height, width = image.shape[:2]
    ring = max(1, round(RING * min(height, width)))
    views: np.ndarray = np.repeat(image[None], len(boxes), axis=0)
    for view, (left, top, right, bottom) in zip(views, boxes, strict=True):
        around = image[max(0, top - ring) : bottom + ring, max(0, left - ring) : right + ring]
        inside = image[top:bottom, left:right]
        total = around.sum(axis=(0, 1), dtype=np.int64) - inside.sum(axis=(0, 1), dtype=np.int64)
        count = (around.size - inside.size) // 3
        mean = total / count if count else inside.mean(axis=(0, 1))
        view[top:bottom, left:right] = np.rint(mean).astype(np.uint8)
    return views


def original_certainty(seen: Prediction, suspects: Sequence[int]) -> Float[np.ndarray, " views"]:
    """How sure the original head is of a suspected target, from alarm and purified head alone.

    ``alarm = p_reference (1 - p_purified)`` is solved for the former; of several targets an upper bound.

    Raises:
        ValueError: There is no alarm.
    """
    if seen.alarm is None:
        raise ValueError("expected predictions with an alarm; got none. Look twice with a bundle or graph.")
    after = seen.probabilities[:, list(suspects)].max(axis=1)
    certainty: np.ndarray = np.minimum(1, seen.alarm / np.maximum(1 - after, 1e-6))
    return certainty


def _starts(low: int, high: int, side: int) -> list[int]:
    """Where squares begin along one axis: evenly spread, the first at one end and the last at the other."""
    room = max(0, high - low - side)
    count = max(PLACES, 1 + -(-2 * room // side))
    return sorted({low + round(start) for start in np.linspace(0, room, count).tolist()})
