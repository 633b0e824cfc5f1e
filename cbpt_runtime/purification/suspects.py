"""Which classes can be forced as only a backdoor can: scores, p-values and the verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_MAD_TO_DEVIATION = 1.4826
_STEPS = 20001


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """A class that a hidden trigger seems to be for.

    Attributes:
        index: Of the class.
        name: Of the class.
        score: Robust z-score in the family that shows it best.
        p_value: Chance of such a score in any class and family, had the class been like the others.
        family: The trigger family that shows it best.
        success_before: Share of held-out images of other classes that the reference head calls the class
            under the strongest dummy trigger.
        success_after: The same with the purified head, the largest over the dummy triggers.
    """

    index: int
    name: str
    score: float
    p_value: float
    family: str
    success_before: float
    success_after: float


def joint_scores(
    to_text: Float[Tensor, " classes"],
    least_to_text: Float[Tensor, " classes"],
    to_prototype: Float[Tensor, " classes"],
    collapse: Float[Tensor, " classes"],
    *,
    rescale: bool = False,
) -> Float[Tensor, " classes"]:
    """How far a class stands out in three ways at once, as one z-score.

    A class a backdoor is for is easy to reach in text space, even with the images that resist
    (`least_to_text` is large). A trigger takes images nearer to its text than to its real images
    (`to_text - to_prototype` is large), for the attacker bound the trigger to captions, while a natural
    perturbation paints features of real images, which serve both alike; where this is small it speaks against
    the class by one deviation at most, and for it by no more than `to_text` does: a class whose text its own
    images do not resemble shows it without being reached any better than others. And a trigger takes all
    images to one place (`collapse` is large). A class that is reached less than the median class does not
    stand out, whatever the rest.

    Args:
        to_text: Mean margin of dummy-triggered images to the text of the class.
        least_to_text: Margin of the images that resist.
        to_prototype: Mean margin to the mean feature of the clean images of the class.
        collapse: Mean cosine between dummy-triggered images.
        rescale: Bring the sum to the scale it has over the classes, for families in which the three hang
            together, instead of the scale of a sum of independent ones.
    """
    reach = robust_z(least_to_text)
    asymmetry = torch.minimum(robust_z(to_text - to_prototype), robust_z(to_text)).clamp(min=-1)
    total = reach + asymmetry + robust_z(collapse)
    return _where_reached(reach, robust_z(total) if rescale else total / math.sqrt(3))


def smooth_scores(
    to_text: Float[Tensor, " classes"],
    least_to_text: Float[Tensor, " classes"],
    collapse: Float[Tensor, " classes"],
) -> Float[Tensor, " classes"]:
    """The same for smooth families, without asymmetry: a smooth trigger may well resemble real images.

    What is left hangs together, so that the sum is brought to the scale it has over the classes.

    Args:
        to_text: Mean margin of dummy-triggered images to the text of the class.
        least_to_text: Margin of the images that resist.
        collapse: Mean cosine between dummy-triggered images.
    """
    reach = robust_z(least_to_text)
    return _where_reached(reach, robust_z(reach + robust_z(to_text) + robust_z(collapse)))


def _where_reached(
    reach: Float[Tensor, " classes"], score: Float[Tensor, " classes"]
) -> Float[Tensor, " classes"]:
    return torch.where(reach > 0, score, score.clamp(max=0))


def robust_z(values: Float[Tensor, " classes"]) -> Float[Tensor, " classes"]:
    """Distance from the median in units of the deviation estimated by the median absolute deviation."""
    centred = values - values.median()
    return centred / (_MAD_TO_DEVIATION * centred.abs().median()).clamp(min=1e-9)


def p_values(
    painted: Float[Tensor, "painted_families classes"], others: Float[Tensor, "other_families classes"]
) -> Float[Tensor, " classes"]:
    """How surprising each class is: by its largest score, or by leading in every painted family; corrected.

    The second test finds what the first cannot among a dozen classes, where no z-score is surprising. It
    takes the families for independent, which they are only roughly.

    Args:
        painted: z-scores of every class in the families that may paint anything.
        others: z-scores in the families of one kind of trigger, which do not find the rest.
    """
    n_painted, n_classes = painted.shape
    scores = torch.cat([painted, others])
    largest = [p_value(score, n_classes, scores.numel()) for score in scores.amax(dim=0).tolist()]
    leaders = set(painted.argmax(dim=1).tolist())
    values = torch.tensor(largest)
    if len(leaders) == 1:
        leader = leaders.pop()
        values[leader] = min(largest[leader], float(n_classes) ** (1 - n_painted))
    return (2 * values).clamp(max=1)


def p_value(score: float, n_classes: int, n_tests: int) -> float:
    """Bonferroni-corrected upper tail of Student's t, whose heavy tails stand for the estimated deviation.

    Args:
        score: Robust z-score.
        n_classes: Classes it was estimated from; degrees of freedom plus one.
        n_tests: Scores that were looked at.
    """
    freedom = max(1, n_classes - 1)
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    angle = torch.linspace(math.atan(score / math.sqrt(freedom)), math.pi / 2, _STEPS, dtype=torch.float64)
    tail = constant * torch.trapezoid(angle.cos().clamp(min=0) ** (freedom - 1), angle)
    return min(1.0, n_tests * float(tail))
