"""When requests are due in an open loop: whether or not earlier ones were answered."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def poisson_arrivals(
    rate_per_s: float, duration_s: float, generator: np.random.Generator
) -> Float[np.ndarray, " requests"]:
    """Times in [0, duration) of a Poisson process, ascending, in seconds.

    Args:
        rate_per_s: Mean arrivals per second.
        duration_s: How long.
        generator: Where the randomness comes from.
    """
    # Given their number, the arrivals of a Poisson process are independent and uniform.
    count = generator.poisson(rate_per_s * duration_s)
    return np.sort(generator.uniform(0.0, duration_s, count))


def dealt(times: Float[np.ndarray, " requests"], hands: int) -> list[Float[np.ndarray, " part"]]:
    """One schedule dealt to several senders in turns; together they keep it."""
    return [times[hand::hands] for hand in range(hands)]
