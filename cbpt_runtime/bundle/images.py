"""The clean images a bundle carries: some to calibrate int8 on, others to measure what an export costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8

from cbpt_runtime.models.data import CleanSplit

MAX_CALIBRATION = 128
MAX_HELDOUT = 512
MAX_SIZE_BYTES = 96 * 2**20  # all 640 images at 224×224


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanImages:
    """Clean labelled images at the model's own size, in turns over the classes.

    Attributes:
        calibration: uint8 RGB, out of those purification tuned on.
        calibration_labels: Class indices.
        heldout: As `calibration`, out of those it only selected on; may be empty.
        heldout_labels: As `calibration_labels`.
    """

    calibration: UInt8[np.ndarray, "calibration height width 3"]
    calibration_labels: Int[np.ndarray, " calibration"]
    heldout: UInt8[np.ndarray, "heldout height width 3"]
    heldout_labels: Int[np.ndarray, " heldout"]

    def to_tensors(self) -> dict[str, np.ndarray]:
        """Return the arrays by the names they have in ``images.safetensors``."""
        return {
            "calibration_images": self.calibration,
            "calibration_labels": self.calibration_labels.astype(np.int64),
            "heldout_images": self.heldout,
            "heldout_labels": self.heldout_labels.astype(np.int64),
        }


def choose_clean_images(split: CleanSplit) -> CleanImages:
    """Choose a bounded part of a split, every class as often as any other or once less; always the same."""
    height, width = split.tune_images.shape[1:3]
    affordable = MAX_SIZE_BYTES // (3 * height * width)
    calibration = min(MAX_CALIBRATION, affordable * MAX_CALIBRATION // (MAX_CALIBRATION + MAX_HELDOUT))
    tuned = _in_turns(split.tune_labels, max(1, calibration))
    heldout = _in_turns(split.heldout_labels, min(MAX_HELDOUT, max(1, affordable - calibration)))
    return CleanImages(
        calibration=split.tune_images[tuned],
        calibration_labels=split.tune_labels[tuned],
        heldout=split.heldout_images[heldout],
        heldout_labels=split.heldout_labels[heldout],
    )


def check_clean_images(
    tensors: dict[str, np.ndarray], *, image_size: tuple[int, int], classes: int
) -> list[str]:
    """Return what is wrong with the content of an ``images.safetensors``; empty when nothing is."""
    problems = []
    for part in ("calibration", "heldout"):
        images, labels = tensors.get(f"{part}_images"), tensors.get(f"{part}_labels")
        if images is None or labels is None:
            problems.append(f"no {part} images with labels")
        elif images.dtype != np.uint8 or images.shape[1:] != (*image_size, 3):
            problems.append(f"{part}_images is {images.dtype} {list(images.shape)}")
        elif labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            problems.append(f"{part}_labels is {labels.dtype} {list(labels.shape)}")
        elif labels.size and not 0 <= labels.min() <= labels.max() < classes:
            problems.append(f"{part}_labels names a class that is not there")
    return problems


def _in_turns(labels: Int[np.ndarray, " images"], count: int) -> Int[np.ndarray, " chosen"]:
    """Return indices of at most `count` images: the first of every class, the second and so on.

    Of a round that does not fit any more, classes evenly spread over the list are taken.
    """
    turn = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        turn[own] = np.arange(len(own))
    order: np.ndarray = np.lexsort((labels, turn))[:count]
    if len(order) < len(labels) and len(order):
        last = turn[order[-1]]
        whole = order[turn[order] < last]
        candidates = np.flatnonzero(turn == last)
        candidates = candidates[np.argsort(labels[candidates])]
        spread = np.linspace(0, len(candidates) - 1, len(order) - len(whole)).round().astype(np.int64)
        order = np.concatenate([whole, candidates[spread]])
    return order
