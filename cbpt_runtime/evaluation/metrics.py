"""Rates, their 95 % confidence intervals, and AUROC. Pure NumPy; every rate is a fraction in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

_Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A share of images with its Wilson 95 % interval.

    Attributes:
        rate: ``count / total``; None when there was nothing to count over.
        count: Images that fulfil the condition.
        total: Images that could have.
        low: Lower end of the interval; None when total is zero.
        high: Upper end of the interval; None when total is zero.
    """

    rate: float | None
    count: int
    total: int
    low: float | None
    high: float | None

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the rate as a JSON-able dict."""
        return asdict(self)


def wilson(count: int, total: int) -> Rate:
    """Return the rate ``count / total`` with its Wilson score interval at 95 %.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    Unlike the normal approximation it stays inside [0, 1] and is not empty at 0 and 1.
    """
    if total == 0:
        return Rate(rate=None, count=0, total=0, low=None, high=None)
    share = count / total
    z2 = _Z_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z_95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    low = 0.0 if count == 0 else centre - half
    high = 1.0 if count == total else centre + half
    return Rate(rate=share, count=count, total=total, low=low, high=high)


def share(hits: Bool[np.ndarray, " batch"]) -> Rate:
    """How many of the images fulfil a condition."""
    return wilson(int(np.count_nonzero(hits)), len(hits))


def accuracy(predictions: Int[np.ndarray, " batch"], labels: Int[np.ndarray, " batch"]) -> Rate:
    """Share of images given their true class: CA on clean images, PA on triggered ones."""
    return share(predictions == labels)


def attack_success(
    predictions: Int[np.ndarray, " batch"], labels: Int[np.ndarray, " batch"], target: int
) -> Rate:
    """ASR: share of triggered images *whose true class is not the target* that are called the target."""
    return share(predictions[labels != target] == target)


def attack_success_inclusive(predictions: Int[np.ndarray, " batch"], target: int) -> Rate:
    """Share of all triggered images called the target, images of the target class included."""
    return share(predictions == target)


def floor(predictions: Int[np.ndarray, " batch"], labels: Int[np.ndarray, " batch"], target: int) -> Rate:
    """Share of clean non-target images called the target: an ASR below it is not better than it."""
    return attack_success(predictions, labels, target)


def target_recall(
    predictions: Int[np.ndarray, " batch"], labels: Int[np.ndarray, " batch"], target: int
) -> Rate:
    """Share of clean images of the target class given that class."""
    return share(predictions[labels == target] == target)


def auroc(positives: Float[np.ndarray, " batch"], negatives: Float[np.ndarray, " others"]) -> float | None:
    """Chance that a positive scores above a negative, ties counted half; None when either is empty.

    Equal to the Mann-Whitney U statistic divided by the number of pairs.
    """
    if len(positives) == 0 or len(negatives) == 0:
        return None
    ordered = np.sort(negatives)
    below = np.searchsorted(ordered, positives, side="left")
    below_or_tied = np.searchsorted(ordered, positives, side="right")
    return float((below + below_or_tied).sum() / (2 * len(positives) * len(negatives)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


def auroc_interval(
    positives: Float[np.ndarray, " batch"], negatives: Float[np.ndarray, " others"]
) -> Estimate | None:
    """`auroc` with a 95 % interval; None when either is empty.

    Source: R. G. Newcombe, "Confidence intervals for an effect size measure based on the Mann-Whitney
    statistic", 2006, method 5: the values t with ``|auroc - t| <= z * sqrt(V(t))`` for the variance V of
    Hanley and McNeil. Like Wilson's interval it stays inside [0, 1] and is not empty at 0 and 1.
    """
    value = auroc(positives, negatives)
    if value is None:
        return None
    size, pairs = (len(positives) + len(negatives)) / 2 - 1, len(positives) * len(negatives)

    def lies_outside(t: float) -> bool:
        variance = t * (1 - t) * (1 + size * (1 - t) / (2 - t) + size * t / (1 + t)) / pairs
        return (value - t) ** 2 > _Z_95**2 * variance

    low = 0.0 if value == 0 else _boundary(0.0, value, lies_outside)
    high = 1.0 if value == 1 else _boundary(1.0, value, lies_outside)
    return Estimate(value=value, low=low, high=high)


def _boundary(outside: float, inside: float, lies_outside: Callable[[float], bool]) -> float:
    """Bisect to where the interval ends; at the very ends of [0, 1] the inner point is inside by nature."""
    for _ in range(60):
        middle = (outside + inside) / 2
        if lies_outside(middle):
            outside = middle
        else:
            inside = middle
    return inside


def threshold_for_detection(positives: Float[np.ndarray, " batch"], detection_rate: float = 0.95) -> float:
    """Return the highest threshold at which at least so many of the positives lie at or above it."""
    needed = math.ceil(detection_rate * len(positives) - 1e-9)
    return float(np.sort(positives)[len(positives) - max(1, needed)])


def false_alarms(
    positives: Float[np.ndarray, " batch"],
    negatives: Float[np.ndarray, " others"],
    detection_rate: float = 0.95,
) -> Rate:
    """Share of negatives at or above the threshold that detects so many of the positives.

    The interval is that of the share; that the threshold itself was found on images is not in it.
    """
    if len(positives) == 0:
        return wilson(0, 0)
    return share(negatives >= threshold_for_detection(positives, detection_rate))
