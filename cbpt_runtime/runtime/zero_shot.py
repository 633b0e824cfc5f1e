"""The maths of a baked head: cosine logits, probabilities, and the alarm between the two heads.

NumPy only, so the classifier, the evaluation, the report and a server share it without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

with suppress(ImportError):  # a server has none, and does not check shapes
    from jaxtyping import Float, Int


def logits(
    features: Float[np.ndarray, "batch dim"],
    head: Float[np.ndarray, "classes dim"],
    logit_scale: float,
    logit_bias: float | None = None,
) -> Float[np.ndarray, "batch classes"]:
    """Scaled cosines between unit image features and unit class embeddings.

    Args:
        features: Unit-norm image features.
        head: Unit-norm class embeddings.
        logit_scale: The model's temperature, already exponentiated.
        logit_bias: Added to every logit where the model has one (SigLIP).

    Returns:
        float32 logits, not bounded.
    """
    scaled = np.float32(logit_scale) * (features.astype(np.float32) @ head.astype(np.float32).T)
    return scaled if logit_bias is None else scaled + np.float32(logit_bias)


def probabilities(
    logits: Float[np.ndarray, "batch classes"], *, sigmoid: bool = False
) -> Float[np.ndarray, "batch classes"]:
    """Turn logits into probabilities in [0, 1].

    Args:
        logits: Scaled cosines.
        sigmoid: Independent probability per class, for models with a logit bias (SigLIP); otherwise a
            softmax over the classes.
    """
    result: np.ndarray
    if sigmoid:
        result = np.exp(-np.logaddexp(np.float32(0), -logits))
    else:
        result = np.exp(logits - logits.max(axis=1, keepdims=True))
        result /= result.sum(axis=1, keepdims=True)
    return result


def alarm(
    reference_logits: Float[np.ndarray, "batch classes"],
    purified_logits: Float[np.ndarray, "batch classes"],
    suspects: Sequence[int],
    *,
    sigmoid: bool = False,
) -> Float[np.ndarray, " batch"]:
    """How strongly only the original head calls a suspected target.

    For every suspected target t this is ``p_reference[t] * (1 - p_purified[t])``; the alarm is the largest
    of them. It is near one where the original head is sure of t and the purified head is sure it is not.

    Args:
        reference_logits: Logits of the head before purification.
        purified_logits: Logits of the purified head, same images in the same order.
        suspects: Class indices of the suspected targets.
        sigmoid: As in `probabilities`.

    Returns:
        One float32 in [0, 1] per image; zeros when nothing is suspected.
    """
    return alarm_and_target(reference_logits, purified_logits, suspects, sigmoid=sigmoid)[0]


def alarm_and_target(
    reference_logits: Float[np.ndarray, "batch classes"],
    purified_logits: Float[np.ndarray, "batch classes"],
    suspects: Sequence[int],
    *,
    sigmoid: bool = False,
) -> tuple[Float[np.ndarray, " batch"], Int[np.ndarray, " batch"]]:
    """Return the `alarm`, and the class index of the suspect it speaks of; -1 when nothing is suspected."""
    if not suspects:
        silent = np.zeros(len(reference_logits), np.float32)
        return silent, np.full(len(silent), -1, np.int64)
    columns = list(suspects)
    before = probabilities(reference_logits, sigmoid=sigmoid)[:, columns]
    after = probabilities(purified_logits, sigmoid=sigmoid)[:, columns]
    loudness = before * (1 - after)
    return loudness.max(axis=1), np.array(columns, np.int64)[loudness.argmax(axis=1)]
