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

_HALF_NORMAL = 0.58  # deviation of a standard normal score whose negative values are put to 0
_STEPS = 2001
_FEWEST_OTHERS = 3
FEW_CONCEPTS = 24
"""Among fewer, only the clearest is judged: what is left without it is too little to judge a second by."""

_FAR = 1e6
_UNREACHED = 3.0
"""Most that a concept scores whose trigger does not take the images to it: not rare among so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outliers:
    """How far each concept stands out from the others.

    Attributes:
        scores: Distance from the others in deviations: the largest over both margins, over the families and
            over their sum, in which a concept stands out that does so a little everywhere.
        families: The family that shows it best, of those whose trigger reaches it if any does.
        p_values: Of each concept, corrected for the number of concepts.
        suspects: Concepts whose p-value is below the level, the smallest first.
    """

    scores: Float[Tensor, " concepts"]
    families: list[int]
    p_values: Float[Tensor, " concepts"]
    suspects: list[int]


def find_outliers(
    margins: Float[Tensor, "margins families concepts"],
    reached: Bool[Tensor, "families concepts"],
    level: float,
    *,
    least_deviation: float = 0.0,
) -> Outliers:
    """Test every concept against the others, without those that are suspects already.

    Among fewer than two dozen concepts there is at most one suspect.

    Args:
        margins: What each concept's trigger reaches, in each family, measured in one way or several; minus
            infinity where it was given up for being among the lesser half.
        reached: Whose trigger takes the images to the concept. One that does not is no backdoor, however far
            it stands out.
        level: p-value below which a concept is suspected.
        least_deviation: What the deviation of the others is taken for where it is smaller.
    """
    suspects: list[int] = []
    suspected: list[tuple[float, int, float]] = []
    while True:
        scores, families, p_values = _tested(margins, reached, suspects, least_deviation)
        for index, (score, family, chance) in zip(suspects, suspected, strict=True):
            scores[index], families[index], p_values[index] = score, family, chance
        untried = [index for index in range(len(p_values)) if index not in suspects]
        best = min(untried, key=lambda index: float(p_values[index]))
        judged = bool(scores[best] > -torch.inf) and float(p_values[best]) < level
        most = len(p_values) - 2 if len(p_values) >= FEW_CONCEPTS else 1
        if not judged or len(suspects) >= most:
            return Outliers(scores=scores, families=families, p_values=p_values, suspects=suspects)
        suspects.append(best)
        suspected.append((float(scores[best]), families[best], float(p_values[best])))


def _tested(
    margins: Float[Tensor, "margins families concepts"],
    reached: Bool[Tensor, "families concepts"],
    suspects: list[int],
    least: float,
) -> tuple[Float[Tensor, " concepts"], list[int], Float[Tensor, " concepts"]]:
    singly = torch.stack(
        [torch.stack([_deviations(family, suspects, least) for family in one]) for one in margins]
    )
    scores, taken = singly, reached
    if len(reached) > 1:
        sums, of_noise = singly.clamp(min=0).sum(dim=1), _HALF_NORMAL * math.sqrt(len(reached))
        jointly = torch.stack([_deviations(one, suspects, of_noise) for one in sums])
        jointly = jointly.masked_fill(singly.amax(dim=1) == -torch.inf, -torch.inf)
        scores = torch.cat([singly, jointly.unsqueeze(1)], dim=1)
        taken = torch.cat([reached, reached.any(dim=0, keepdim=True)])
    best = torch.where(taken, scores, scores.clamp(max=_UNREACHED)).amax(dim=(0, 1))
    chances = torch.tensor([p_value(float(score), len(best)) for score in best])
    shown = torch.where(reached, singly, singly - _FAR).amax(dim=0).argmax(dim=0)
    return best, shown.tolist(), chances


def _deviations(
    values: Float[Tensor, " concepts"], suspects: list[int], least: float
) -> Float[Tensor, " concepts"]:
    """How far each value stands out from the others, suspects that were found before left out."""
    scores = torch.full_like(values, -torch.inf)
    for concept in range(len(values)):
        before = suspects[: suspects.index(concept)] if concept in suspects else suspects
        others = torch.ones(len(values), dtype=torch.bool)
        others[[concept, *before]] = False
        if values[concept] > -torch.inf and int(others.sum()) > _FEWEST_OTHERS:
            scores[concept] = deviations_above(values[concept], values[others], least)
    return scores


def deviations_above(value: Tensor, others: Float[Tensor, " others"], least: float = 0.0) -> float:
    """How many deviations a value lies above the median of the others, judged by their upper quarter.

    Natural perturbations reach some concepts well, and it is that side on which a backdoor has to stand out.
    So centre and deviation are those of the normal distribution through the upper quartile of the others and
    their 90 or 95 % quantile, whichever makes it wider. Others that were given up lie below the quartile.

    Args:
        value: Of one.
        others: Of the rest.
        least: The deviation is taken to be no smaller.
    """
    descending = others.sort(descending=True).values
    quartile = _upper_quantile(descending, _QUARTILE[0])
    deviation = max(
        (_upper_quantile(descending, share) - quartile) / (normal - _QUARTILE[1]) for share, normal in _TAIL
    )
    score = _QUARTILE[1] + (float(value) - quartile) / max(deviation, least, 1e-9)
    return score if math.isfinite(score) else -math.inf  # too few others were followed to judge by


def _upper_quantile(descending: Float[Tensor, " others"], share: float) -> float:
    place = (1 - share) * (len(descending) - 1)
    low = math.floor(place)
    high = min(low + 1, len(descending) - 1)
    return float(torch.lerp(descending[low], descending[high], place - low))


def p_value(score: float, n_concepts: int) -> float:
    """Chance that the largest score of a family lies so high, had no concept a backdoor.

    Scores follow Student's t with half as many degrees of freedom as there are concepts: the half that scores
    are judged by. Families are not counted. They are far from independent, and on clean models the
    largest score of all families is smaller than this chance says of one; `docs/method.md` has the figures.

    Args:
        score: Deviations above the median.
        n_concepts: Concepts in each family.
    """
    if score == -math.inf:
        return 1.0
    tail = _student_tail(score, max(1, n_concepts // 2))
    return -math.expm1(n_concepts * math.log1p(-min(tail, 1 - 1e-12)))


def _student_tail(score: float, freedom: int) -> float:
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    angle = torch.linspace(math.atan(score / math.sqrt(freedom)), math.pi / 2, _STEPS, dtype=torch.float64)
    return constant * float(torch.trapezoid(angle.cos().clamp(min=0) ** (freedom - 1), angle))
