"""What a sample of latencies can and cannot say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cbpt_runtime.bench.inputs import BEYOND, PERCENTILES

_BINS_PER_DECADE = 20
_RESAMPLES = 2000
_MOST_NUMBERS = 4_000_000  # in memory at once while resampling
_SHOWN_DIGITS = 6


def carries(count: int, percentile: float) -> bool:
    """Whether a sample is large enough for a percentile: at least `BEYOND` observations lie beyond it.

    That is 20 for the median, 100 for p90, 200 for p95 and 1,000 for p99.
    """
    return count * (100 - percentile) / 100 >= BEYOND - 1e-9


def needed(percentile: float) -> int:
    """Return the smallest sample that carries a percentile."""
    return math.ceil(BEYOND * 100 / (100 - percentile) - 1e-9)


def summary(latencies_ms: Float[np.ndarray, " requests"]) -> dict[str, Any]:
    """n, mean, maximum, and the percentiles that n carries, each with a 95 % interval.

    The intervals are distribution-free: the order statistics whose ranks enclose the percentile with 95 %
    probability (H. A. David, "Order Statistics", 1981, section 2.5), for independent observations.
    """
    count = len(latencies_ms)
    if count == 0:
        return {"n": 0}
    ordered = np.sort(latencies_ms)
    found: dict[str, Any] = {
        "n": count,
        "mean": _rounded(ordered.mean()),
        "max": _rounded(ordered[-1]),
    }
    left_out = []
    for percentile in PERCENTILES:
        name = f"p{percentile:g}"
        if not carries(count, percentile):
            left_out.append(name)
            continue
        low, high = _enclosing_ranks(count, percentile / 100)
        found[name] = _rounded(np.percentile(ordered, percentile))
        found[f"{name}_interval"] = [_rounded(ordered[low]), _rounded(ordered[high])]
    if left_out:
        found["n_too_small_for"] = left_out
    return found


def histogram(latencies_ms: Float[np.ndarray, " requests"]) -> dict[str, Any]:
    """Count in bins of equal ratio (20 per decade); only bins from the first to the last that are used."""
    if len(latencies_ms) == 0:
        return {"edges_ms": [], "counts": []}
    # Which bin it is decides, not how an edge is rounded: the ends of the range must not fall out.
    bins = np.floor(_BINS_PER_DECADE * np.log10(np.maximum(latencies_ms, 1e-3))).astype(int)
    first, last = int(bins.min()), int(bins.max())
    edges = 10.0 ** (np.arange(first, last + 2) / _BINS_PER_DECADE)
    counts = np.bincount(bins - first)
    return {"edges_ms": [_rounded(edge) for edge in edges], "counts": counts.tolist()}


def ratio_interval(
    first: Float[np.ndarray, " requests"],
    second: Float[np.ndarray, " others"],
    generator: np.random.Generator,
) -> tuple[float, float, float]:
    """Return the median of the first sample over that of the second, with a 95 % bootstrap interval.

    Neighbouring latencies resemble each other (a queue, a busy moment), so blocks of neighbours are drawn
    instead of single observations: H. R. Künsch, "The jackknife and the bootstrap for general stationary
    observations", 1989. A block is as long as the cube root of the sample is large.

    Returns:
        Ratio, lower and upper end.
    """
    ratio = float(np.median(first) / np.median(second))
    drawn = _resampled_medians(first, generator) / _resampled_medians(second, generator)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return ratio, float(low), float(high)


def _resampled_medians(
    values: Float[np.ndarray, " requests"], generator: np.random.Generator
) -> Float[np.ndarray, " resamples"]:
    count = len(values)
    length = max(1, round(count ** (1 / 3)))
    blocks = -(-count // length)
    at_once = max(1, _MOST_NUMBERS // count)
    parts = []
    for first in range(0, _RESAMPLES, at_once):
        size = (min(at_once, _RESAMPLES - first), blocks, 1)
        starts: Int[np.ndarray, "resamples blocks 1"] = generator.integers(0, count - length + 1, size)
        rows = (starts + np.arange(length)).reshape(size[0], -1)[:, :count]
        parts.append(np.median(values[rows], axis=1))
    return np.concatenate(parts)


def _enclosing_ranks(count: int, share: float) -> tuple[int, int]:
    half = 1.959963984540054 * math.sqrt(count * share * (1 - share))
    low = max(0, math.floor(count * share - half) - 1)
    return low, min(count - 1, math.ceil(count * share + half))


def _rounded(value: float) -> float:
    return float(f"{float(value):.{_SHOWN_DIGITS}g}")
