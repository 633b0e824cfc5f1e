"""From which alarm on an image is called suspicious: a level chosen on clean images that were held out.

Source: split conformal prediction (Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World",
2005): where n held-out images and a new one are exchangeable, the new one lies above the m-th smallest alarm
of the n with a chance of at most ``(n + 1 - m) / (n + 1)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float

from cbpt_runtime.runtime import zero_shot


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmDecision:
    """A level of the alarm, and what holds for it.

    Attributes:
        threshold: In [0, 1]; an image whose alarm lies above it is suspicious.
        false_alarm_rate: The share of clean images that was asked for.
        expected_false_alarm_rate: The most to expect of clean images like the held-out ones, on average over
            draws of these; above what was asked where they are too few for it. None where no image was held
            out and those that the head was tuned on had to serve: nothing can be said then.
        images: Clean images that it was chosen on.
        above: How many of them lie above it.
    """

    threshold: float
    false_alarm_rate: float
    expected_false_alarm_rate: float | None
    images: int
    above: int

    def to_dict(self) -> dict[str, float | int | None]:
        """As plain values for JSON."""
        return asdict(self)


def decide(
    alarms: Float[np.ndarray, " images"], *, false_alarm_rate: float, held_out: bool = True
) -> AlarmDecision:
    """Return the lowest level that clean images exceed no more often than asked, as far as they can tell.

    Args:
        alarms: Of clean images, at least one.
        false_alarm_rate: Asked for, in [0, 1].
        held_out: Whether the head was not tuned on them.
    """
    count = len(alarms)
    rank = math.ceil((1 - false_alarm_rate) * (count + 1) - 1e-9)  # 1-based, from the smallest
    rank = min(max(rank, 1), count)
    threshold = np.sort(alarms.astype(np.float32))[rank - 1]
    return AlarmDecision(
        threshold=float(threshold),
        false_alarm_rate=false_alarm_rate,
        expected_false_alarm_rate=(count + 1 - rank) / (count + 1) if held_out else None,
        images=count,
        above=int(np.count_nonzero(alarms.astype(np.float32) > threshold)),
    )


def decide_between_heads(
    features: Float[np.ndarray, "images dim"],
    reference: Float[np.ndarray, "classes dim"],
    purified: Float[np.ndarray, "classes dim"],
    suspects: Sequence[int],
    *,
    logit_scale: float,
    logit_bias: float | None = None,
    false_alarm_rate: float,
    held_out: bool = True,
) -> AlarmDecision:
    """As `decide`, from unit features of clean images and both heads."""
    alarms = zero_shot.alarm(
        zero_shot.logits(features, reference, logit_scale, logit_bias),
        zero_shot.logits(features, purified, logit_scale, logit_bias),
        suspects,
        sigmoid=logit_bias is not None,
    )
    return decide(alarms, false_alarm_rate=false_alarm_rate, held_out=held_out)
