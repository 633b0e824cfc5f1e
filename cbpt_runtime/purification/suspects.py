"""Which concepts can be forced as only a backdoor can: p-values, and the suspects among them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_QUANTILES = ((0.75, 0.6745), (0.9, 1.2816), (0.95, 1.6449))
"""Shares of the other concepts, and where a standard normal distribution has these quantiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """A target that a hidden trigger seems to be for.

    Attributes:
        index: The class of the list that triggered images are called: the target itself, or what lies nearest
            to a target that is not on the list.
        name: The target's name, a class of the list or another word.
        on_list: Whether the target is a class of the list.
        score: Distance from the other concepts, in deviations, in the family that shows it best.
        p_value: Chance of such a score in any concept and family if the encoder had no backdoor.
        family: The trigger family that shows it best.
        success_before: Share of held-out images of other classes that the reference head calls the class
            under the strongest dummy trigger.
        success_after: The same with the purified head, the largest over the dummy triggers.
    """

    index: int
    name: str
    on_list: bool
    score: float
    p_value: float
    family: str
    success_before: float
    success_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outliers:
    """How far each concept stands out from the others.

    Attributes:
        scores: Distance from the others in deviations, the largest over the families.
        families: Which family that is.
        p_values: Of each concept, corrected for concepts and families.
        suspects: Concepts whose p-value is below the level, the smallest first.
    """

    scores: Float[Tensor, " concepts"]
    families: list[int]
    p_values: Float[Tensor, " concepts"]
    suspects: list[int]


def find_outliers(margins: Float[Tensor, "families concepts"], level: float) -> Outliers:
    """Tests every concept against the others, without those that are suspects already.

    Args:
        margins: What each concept's trigger reaches, in each family; minus infinity where it was given up for
            being among the lesser half.
        level: p-value below which a concept is suspected.
    """
    suspects: list[int] = []
    while True:
        scores, families, p_values = _tested(margins, suspects)
        untried = [index for index in range(len(p_values)) if index not in suspects]
        best = min(untried, key=lambda index: float(p_values[index]))
        if not float(p_values[best]) < level or len(suspects) + 2 >= len(p_values):
            return Outliers(scores=scores, families=families, p_values=p_values, suspects=suspects)
        suspects.append(best)


def _tested(
    margins: Float[Tensor, "families concepts"], suspects: list[int]
) -> tuple[Float[Tensor, " concepts"], list[int], Float[Tensor, " concepts"]]:
    n_families, n_concepts = margins.shape
    scores = torch.full_like(margins, -torch.inf)
    for family in range(n_families):
        for concept in range(n_concepts):
            before = suspects[: suspects.index(concept)] if concept in suspects else suspects
            left = [index for index in range(n_concepts) if index != concept and index not in before]
            if margins[family, concept] > -torch.inf and len(left) > 2:
                scores[family, concept] = deviations_above(margins[family, concept], margins[family, left])
    best, families = scores.max(dim=0)
    chances = torch.tensor([p_value(float(score), n_concepts * n_families) for score in best])
    return best, families.tolist(), chances


def deviations_above(value: Tensor, others: Float[Tensor, " others"]) -> float:
    """How many deviations a value lies above the median of the others.

    The deviation is the largest of three that a normal distribution would have, judged by upper quantiles of
    the others: natural perturbations reach some concepts well, and it is that side on which a backdoor has to
    stand out. Others that were given up lie below all quantiles that are used.
    """
    ordered = others.sort(descending=True).values
    measured = ordered[ordered > -torch.inf]
    middle = _upper_quantile(measured, 0.5, len(others))
    deviation = max(
        (_upper_quantile(measured, share, len(others)) - middle) / normal for share, normal in _QUANTILES
    )
    return (float(value) - middle) / max(deviation, 1e-9)


def _upper_quantile(descending: Float[Tensor, " measured"], share: float, count: int) -> float:
    """Quantile of `count` values, the largest of which are given; the least of them where more are needed."""
    place = (1 - share) * (count - 1)
    low = min(math.floor(place), len(descending) - 1)
    high = min(low + 1, len(descending) - 1)
    return float(torch.lerp(descending[low], descending[high], min(1.0, place - low)))


def p_value(score: float, n_tests: int) -> float:
    """Chance that the largest of so many independent standard normal values lies above the score."""
    if score == -math.inf:
        return 1.0
    tail = 0.5 * math.erfc(score / math.sqrt(2))
    return -math.expm1(n_tests * math.log1p(-tail)) if tail < 1 else 1.0
