"""Which concepts can be forced as only a backdoor can: p-values, and the suspects among them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_QUARTILE = (0.75, 0.6745)
_TAIL = ((0.9, 1.2816), (0.95, 1.6449))
"""Quantiles of the others, and where a standard normal distribution has them."""

_STEPS = 20001


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


def find_outliers(
    margins: Float[Tensor, "families concepts"],
    alike: Bool[Tensor, "families concepts concepts"],
    level: float,
) -> Outliers:
    """Tests every concept against the others, without those that are suspects already.

    Triggers meant for other concepts that end up in the same place have found the same trigger; they are no
    witnesses of what natural perturbations do.

    Args:
        margins: What each concept's trigger reaches, in each family; minus infinity where it was given up for
            being among the lesser half.
        alike: Whose triggers, in each family, take images to the same place.
        level: p-value below which a concept is suspected.
    """
    suspects: list[int] = []
    while True:
        scores, families, p_values = _tested(margins, alike, suspects)
        untried = [index for index in range(len(p_values)) if index not in suspects]
        best = min(untried, key=lambda index: float(p_values[index]))
        if not float(p_values[best]) < level or len(suspects) + 2 >= len(p_values):
            return Outliers(scores=scores, families=families, p_values=p_values, suspects=suspects)
        suspects.append(best)


def _tested(
    margins: Float[Tensor, "families concepts"],
    alike: Bool[Tensor, "families concepts concepts"],
    suspects: list[int],
) -> tuple[Float[Tensor, " concepts"], list[int], Float[Tensor, " concepts"]]:
    n_families, n_concepts = margins.shape
    scores = torch.full_like(margins, -torch.inf)
    for family in range(n_families):
        for concept in range(n_concepts):
            before = suspects[: suspects.index(concept)] if concept in suspects else suspects
            others = _witnesses(margins[family], alike[family, concept], [concept, *before])
            if margins[family, concept] > -torch.inf and int(others.sum()) > 3:
                scores[family, concept] = deviations_above(margins[family, concept], margins[family, others])
    best, families = scores.max(dim=0)
    chances = torch.tensor([p_value(float(score), n_concepts, n_families) for score in best])
    return best, families.tolist(), chances


def _witnesses(
    margins: Float[Tensor, " concepts"], alike: Bool[Tensor, " concepts"], out: list[int]
) -> Bool[Tensor, " concepts"]:
    """The concepts that one is judged by; those alike, too, where few others were followed up."""
    everybody = torch.ones_like(alike)
    everybody[out] = False
    others = everybody & ~alike
    followed = int((others & (margins > -torch.inf)).sum())
    return others if followed > math.ceil((1 - _QUARTILE[0]) * int(others.sum())) else everybody


def deviations_above(value: Tensor, others: Float[Tensor, " others"]) -> float:
    """How many deviations a value lies above the median of the others, judged by their upper quarter.

    Natural perturbations reach some concepts well, and it is that side on which a backdoor has to stand out.
    So centre and deviation are those of the normal distribution through the upper quartile of the others and
    their 90 or 95 % quantile, whichever makes it wider. Others that were given up lie below the quartile.
    """
    descending = others.sort(descending=True).values
    quartile = _upper_quantile(descending, _QUARTILE[0])
    deviation = max(
        (_upper_quantile(descending, share) - quartile) / (normal - _QUARTILE[1]) for share, normal in _TAIL
    )
    return _QUARTILE[1] + (float(value) - quartile) / max(deviation, 1e-9)


def _upper_quantile(descending: Float[Tensor, " others"], share: float) -> float:
    place = (1 - share) * (len(descending) - 1)
    low = math.floor(place)
    high = min(low + 1, len(descending) - 1)
    return float(torch.lerp(descending[low], descending[high], place - low))


def p_value(score: float, n_concepts: int, n_families: int) -> float:
    """Chance that the largest of all scores lies so high.

    Scores follow Student's t with as many degrees of freedom as there are values in the upper quarter that
    they were judged by, less one; concepts and families are taken for independent.

    Args:
        score: Deviations above the median.
        n_concepts: Concepts in each family.
        n_families: Families.
    """
    if score == -math.inf:
        return 1.0
    tail = _student_tail(score, max(1, n_concepts // 4 - 1))
    return -math.expm1(n_concepts * n_families * math.log1p(-min(tail, 1 - 1e-12)))


def _student_tail(score: float, freedom: int) -> float:
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    angle = torch.linspace(math.atan(score / math.sqrt(freedom)), math.pi / 2, _STEPS, dtype=torch.float64)
    return constant * float(torch.trapezoid(angle.cos().clamp(min=0) ** (freedom - 1), angle))
