"""The search: can any concept be forced with a small universal trigger, far beyond all others?

It asks the encoder and an open vocabulary, not the user's class list, and needs no labels. Its cost does not
depend on how many words there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from cbpt_runtime.models.clip import ImageEncoder
from cbpt_runtime.purification.config import PurifyConfig
from cbpt_runtime.purification.evidence import Clean
from cbpt_runtime.purification.inversion import Goals, Inversion, subset, triggered_features
from cbpt_runtime.purification.suspects import Outliers, find_outliers
from cbpt_runtime.purification.vocabulary import Vocabulary
from cbpt_runtime.settings import is_mixed
from cbpt_runtime.triggers import SEARCH_FAMILIES, TriggerFamily
from cbpt_runtime.types import Progress

MEASURED_IMAGES = 64
"""Held-out images that a trigger's reach is measured on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """What the triggers of one family reach on images that they were not made on.

    Attributes:
        margins: Per concept the mean cosine to the nearest of its words minus that to the nearest rival;
            minus infinity where it was given up halfway.
        success: Share of the images that are nearest to a word of the concept.
        directions: Unit mean of the triggered features; zeros where it was given up.
    """

    margins: Float[Tensor, " concepts"]
    success: Float[Tensor, " concepts"]
    directions: Float[Tensor, "concepts dim"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What the search found.

    Attributes:
        outliers: How each concept stands out, and which are suspected.
        directions: Unit mean of the triggered features per concept, in the family that shows it best.
        success: Share of the images that this trigger takes to the concept.
        words: Index of the word that lies nearest to this direction, among the concept's own.
        families: Names of the families, in the order of `outliers.families`.
    """

    outliers: Outliers
    directions: Float[Tensor, "concepts dim"]
    success: Float[Tensor, " concepts"]
    words: list[int]
    families: tuple[str, ...]

    def to_dict(self, vocabulary: Vocabulary) -> dict[str, Any]:
        """As plain values: one row per concept, the most suspicious first."""
        order = self.outliers.p_values.argsort(stable=True).tolist()
        rows = [
            {
                "word": vocabulary.names[self.words[concept]],
                "score": float(self.outliers.scores[concept]),
                "p_value": float(self.outliers.p_values[concept]),
                "family": self.families[self.outliers.families[concept]],
                "success": float(self.success[concept]),
            }
            for concept in order
        ]
        return {"p_value": rows[0]["p_value"], "concepts": rows, "words": len(vocabulary.names)}


def search(
    encoder: ImageEncoder,
    vocabulary: Vocabulary,
    scale: float,
    clean: Clean,
    heldout: Clean,
    config: PurifyConfig,
    progress: Progress | None = None,
) -> SearchResult:
    """Inverts a small trigger for every concept in every search family, and tests who stands out.

    Args:
        encoder: The suspect.
        vocabulary: Words and concepts.
        scale: The model's logit scale.
        clean: Images that triggers are made on; their labels are not looked at.
        heldout: Images that they are measured on.
        config: Steps, batch, seed, precision and level.
        progress: Told how far the work is.
    """
    measured = subset(heldout, MEASURED_IMAGES, torch.Generator().manual_seed(config.seed))
    goals = Goals(
        texts=vocabulary.texts,
        positives=vocabulary.members(),
        negatives=vocabulary.rivals(),
        scale=scale,
    )
    reached = []
    for number, (_, family) in enumerate(SEARCH_FAMILIES.items()):
        reached.append(_reach(encoder, family, goals, clean, measured, config))
        if progress is not None:
            progress("search", number + 1, len(SEARCH_FAMILIES), {})
    outliers = find_outliers(torch.stack([one.margins for one in reached]).cpu(), config.suspect_p_value)
    return _result(vocabulary, outliers, reached)


def _reach(
    encoder: ImageEncoder,
    family: TriggerFamily,
    goals: Goals,
    clean: Clean,
    measured: Clean,
    config: PurifyConfig,
) -> Reached:
    """Half of the steps for all concepts, the rest for the better half, each then for its nearest word."""
    steps = config.search_steps * family.effort
    inversion = Inversion(
        encoder,
        family,
        goals,
        clean,
        batch=config.search_batch,
        seed=config.seed,
        mixed=is_mixed(config.precision, goals.texts.device),
    )
    inversion.advance(steps - steps // 2)
    inversion.narrow()
    order = inversion.recent_margins().argsort(descending=True, stable=True)
    inversion.keep(order[: len(order) - len(order) // 2])
    inversion.advance(steps // 2)
    return _measure(encoder, family, inversion, goals, measured)


def _measure(
    encoder: ImageEncoder, family: TriggerFamily, inversion: Inversion, goals: Goals, measured: Clean
) -> Reached:
    count, dim = len(goals.positives), goals.texts.shape[1]
    margins = torch.full((count,), -torch.inf)
    success = torch.zeros(count)
    directions = torch.zeros(count, dim, device=goals.texts.device)
    shown = (measured.features @ goals.texts.T).argmax(dim=1)
    parameters = inversion.result()
    for place, concept in enumerate(inversion.rows.tolist()):
        own = goals.positives[concept]
        others = ~own[shown]
        images = measured.images[others] if bool(others.any()) else measured.images
        features = triggered_features(encoder, family, parameters, place, images)
        cosines = features @ goals.texts.T
        reached = cosines.masked_fill(~own, -torch.inf).amax(dim=1)
        rival = cosines.masked_fill(~goals.negatives[concept], -torch.inf).amax(dim=1)
        margins[concept] = (reached - rival).mean()
        success[concept] = (reached > rival).float().mean()
        directions[concept] = normalize(features.mean(dim=0), dim=0)
    return Reached(margins=margins, success=success, directions=directions)


def _result(vocabulary: Vocabulary, outliers: Outliers, reached: list[Reached]) -> SearchResult:
    concepts = range(vocabulary.n_concepts)
    best = [reached[outliers.families[concept]] for concept in concepts]
    directions = torch.stack([one.directions[concept] for concept, one in zip(concepts, best, strict=True)])
    nearest = (directions @ vocabulary.texts.T).masked_fill(~vocabulary.members(), -torch.inf).argmax(dim=1)
    return SearchResult(
        outliers=outliers,
        directions=directions,
        success=torch.stack([one.success[concept] for concept, one in zip(concepts, best, strict=True)]),
        words=nearest.tolist(),
        families=tuple(SEARCH_FAMILIES),
    )
