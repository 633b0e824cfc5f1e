"""The highest rate a server keeps up with while its latency stays under a bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_GROWTH = 1.3
_CLOSE_ENOUGH = 1.05


@dataclass(frozen=True, slots=True, kw_only=True)
class RateSearch:
    """What a search found.

    Attributes:
        held_per_s: The highest rate that held; None when none did.
        failed_per_s: The lowest rate above it that did not hold; None when none was tried.
        trials: Rates in the order they were tried, and whether they held.
    """

    held_per_s: float | None
    failed_per_s: float | None
    trials: tuple[tuple[float, bool], ...]


def search_rate(
    holds: Callable[[float], bool], start_per_s: float, *, lowest_per_s: float = 0.0, max_trials: int = 8
) -> RateSearch:
    """Grow or shrink from a first guess until one rate held and one did not, then halve the gap.

    Args:
        holds: Tries a rate. What it says need not be monotone, as measurements are not; a rate above one
            that failed is never tried again.
        start_per_s: First guess.
        lowest_per_s: Rates below are not tried; the search ends without one that held.
        max_trials: Trials at most; the search also ends when the gap is within 5 %.
    """
    trials: list[tuple[float, bool]] = []
    held: float | None = None
    failed: float | None = None
    rate = start_per_s
    while len(trials) < max_trials and rate >= lowest_per_s:
        good = holds(rate)
        trials.append((rate, good))
        if good:
            held = rate
        else:
            failed = rate
        if held is None:
            rate /= _GROWTH**2
        elif failed is None:
            rate *= _GROWTH
        elif failed / held <= _CLOSE_ENOUGH:
            break
        else:
            rate = (held * failed) ** 0.5
    return RateSearch(held_per_s=held, failed_per_s=failed, trials=tuple(trials))
