"""The search: can any concept be forced with a small universal trigger, far beyond all others?

It asks the encoder and an open vocabulary, not the user's class list, and needs no labels. Its cost does not
depend on how many words there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from cbpt_runtime.config import is_mixed
from cbpt_runtime.models.clip import ImageEncoder
from cbpt_runtime.progress import Progress
from cbpt_runtime.purification.clean_features import CleanFeatures
from cbpt_runtime.purification.config import PurifyConfig
from cbpt_runtime.purification.detection import Outliers, find_outliers
from cbpt_runtime.purification.devices import in_parallel
from cbpt_runtime.purification.inversion import Goals, Inversion, encode_triggered
from cbpt_runtime.purification.stages import StageStore
from cbpt_runtime.purification.trigger_families import SEARCH_FAMILIES, TriggerFamily
from cbpt_runtime.purification.vocabulary import Vocabulary

MEASURED_IMAGES = 64
"""Held-out images that a trigger's reach is measured on."""

_TAKEN = 0.7  # share of the images that a trigger has to take to its concept, beside a reference
_FIRST_STEPS = 0.5
_KEPT = 0.5
_FEW = 24  # concepts that are all followed to the end


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchInput:
    """An encoder, and what is asked of it.

    Attributes:
        encoder: The image tower.
        vocabulary: Words and concepts.
        scale: The model's logit scale.
        clean: Images that triggers are made on; their labels are not looked at.
        heldout: Images that they are measured on.
    """

    encoder: ImageEncoder
    vocabulary: Vocabulary
    scale: float
    clean: CleanFeatures
    heldout: CleanFeatures

    def goals(self) -> Goals:
        """Every concept against all words that are not near one of its own."""
        return Goals(
            texts=self.vocabulary.texts,
            positives=self.vocabulary.members(),
            negatives=self.vocabulary.rivals(),
            scale=self.scale,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What the triggers of one family reach on images that they were not made on.

    Attributes:
        margins: Per concept the mean of a triggered image's cosine to the nearest of its words minus that to
            the nearest rival: over all images, then over the half with the lesser margins, because a backdoor
            works on every image alike; minus infinity where the concept was given up halfway.
        success: Share of the images that are nearest to a word of the concept.
        directions: Unit mean of the triggered features; zeros where it was given up.
    """

    margins: Float[Tensor, "2 concepts"]
    success: Float[Tensor, " concepts"]
    directions: Float[Tensor, "concepts dim"]


Unit = tuple[Tensor, Reach]
"""What a family gives: margins to be judged, [2, concepts], and what the suspect's triggers reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What the search found.

    Attributes:
        outliers: How each concept stands out, and which are suspected.
        margins: What the outliers were found in.
        directions: Unit mean of the triggered features per concept, in the family that shows it best.
        success: Share of the images that this trigger takes to the concept.
        words: Index of the word that lies nearest to this direction, among the concept's own.
        families: Names of the families, in the order of `outliers.families`.
    """

    outliers: Outliers
    margins: Float[Tensor, "2 families concepts"]
    directions: Float[Tensor, "concepts dim"]
    success: Float[Tensor, " concepts"]
    words: list[int]
    families: tuple[str, ...]

    def facts(self, concept: int) -> dict[str, Any]:
        """What is to be said of one concept, as plain values."""
        return {
            "score": float(self.outliers.scores[concept]),
            "p_value": float(self.outliers.p_values[concept]),
            "family": self.families[self.outliers.families[concept]],
            "success": float(self.success[concept]),
        }

    def to_dict(self, vocabulary: Vocabulary) -> dict[str, Any]:
        """As plain values: one row per concept, the most suspicious first."""
        order = self.outliers.p_values.argsort(stable=True).tolist()
        rows = [
            {"word": vocabulary.names[self.words[concept]], **self.facts(concept)}
            for concept in order
            if math.isfinite(self.outliers.scores[concept])
        ]
        smallest = rows[0]["p_value"] if rows else 1.0  # none where all texts are alike
        return {"p_value": smallest, "concepts": rows, "words": len(vocabulary.names)}


def search(
    suspect: SearchInput,
    config: PurifyConfig,
    progress: Progress | None = None,
    *,
    reference: SearchInput | None = None,
    stages: StageStore | None = None,
    cluster: str | None = None,
) -> SearchResult:
    """Inverts a small trigger for every concept in every search family, and tests who stands out.

    Args:
        suspect: The encoder under suspicion.
        config: Steps, batch, seed, precision and level.
        progress: Told how far the work is.
        reference: A trusted encoder, asked for the same concepts on the same images. What counts is then how
            much more the suspect can be forced: natural perturbations work on both.
        stages: Where finished families are kept and looked for.
        cluster: Address of a Ray cluster to search on; the devices of this machine when None.

    Raises:
        ConfigError: Ray is not installed, or the cluster does not answer.
        PurificationError: The cluster gave a family up.
    """
    texts = suspect.vocabulary.texts
    mixed = is_mixed(config.precision, texts.device)  # another machine may have other instructions
    asked = (suspect, reference, replace(config, precision="bf16" if mixed else "fp32"))
    units = {} if stages is None else _finished(stages)
    missing = [name for name in SEARCH_FAMILIES if name not in units]
    for name, unit in in_parallel(_unit, asked, missing, texts.device, cluster=cluster):
        units[name] = unit
        if stages is not None:
            parts = {field.name: getattr(unit[1], field.name) for field in fields(Reach)}
            stages.save(f"search-{name}", {"judged": unit[0], **parts}, {})
        if progress is not None:
            progress("search", len(units), len(SEARCH_FAMILIES), {})
    stacked = torch.stack([units[name][0] for name in SEARCH_FAMILIES], dim=1)
    reached = [units[name][1] for name in SEARCH_FAMILIES]
    reached = [replace(one, directions=one.directions.to(texts.device)) for one in reached]
    outliers = find_outliers(stacked, _taken(reached, reference), config.suspect_p_value)
    return _result(suspect.vocabulary, outliers, stacked, reached)


def _finished(stages: StageStore) -> dict[str, Unit]:
    """Families that an interrupted search has left."""
    found = {name: stages.load(f"search-{name}") for name in SEARCH_FAMILIES}
    parts = {name: stage[0] for name, stage in found.items() if stage is not None}
    return {name: (tensors.pop("judged"), Reach(**tensors)) for name, tensors in parts.items()}


def _unit(asked: tuple[SearchInput, SearchInput | None, PurifyConfig], name: str) -> Unit:
    suspect, reference, config = asked
    return _family_margins(suspect, reference, SEARCH_FAMILIES[name], config)


def _family_margins(
    suspect: SearchInput, reference: SearchInput | None, family: TriggerFamily, config: PurifyConfig
) -> Unit:
    """One family, asked for every concept: margins to be judged, and what the suspect's triggers reach.

    The unit of the search: it depends on nothing but its arguments, wherever it is computed.
    """
    order = torch.randperm(len(suspect.heldout.images), generator=torch.Generator().manual_seed(config.seed))
    measured, goals = order[:MEASURED_IMAGES], suspect.goals()
    inversion = _inverted(suspect, family, goals, config)
    reach = _measure(suspect, family, inversion, goals, measured)
    if reference is None:
        return reach.margins, reach
    goals = reference.goals()
    same = _inverted(reference, family, goals, config, rows=inversion.rows)
    known = _measure(reference, family, same, goals, measured).margins
    return torch.where(known > -torch.inf, reach.margins - known, known), reach


def _taken(reached: list[Reach], reference: SearchInput | None) -> Bool[Tensor, "families concepts"]:
    """Whose triggers take the images to their concept.

    On average, where the suspect stands alone. Beside a reference most of them: the difference of two
    inversions varies more, and natural triggers that take half of the images are among the largest.
    """
    if reference is None:
        return torch.stack([one.margins[0] for one in reached]) > 0
    return torch.stack([one.success for one in reached]) >= _TAKEN


def _inverted(
    subject: SearchInput,
    family: TriggerFamily,
    goals: Goals,
    config: PurifyConfig,
    rows: Int[Tensor, " kept"] | None = None,
) -> Inversion:
    """Half of the steps for all concepts, the rest for the better ones, each then for its nearest word."""
    steps = config.search_steps * family.step_multiplier
    first = max(1, round(_FIRST_STEPS * steps))
    inversion = Inversion(
        subject.encoder,
        family,
        goals,
        subject.clean,
        batch=config.search_batch,
        seed=config.seed,
        mixed=is_mixed(config.precision, goals.texts.device),
    )
    inversion.advance(first)
    inversion.narrow()
    if rows is None:
        order = inversion.recent_margins().argsort(descending=True, stable=True)
        rows = order[: max(_FEW, math.ceil(_KEPT * len(order)))]
    inversion.keep(rows)
    inversion.advance(steps - first)
    return inversion


def _measure(
    subject: SearchInput,
    family: TriggerFamily,
    inversion: Inversion,
    goals: Goals,
    which: Int[Tensor, " images"],
) -> Reach:
    heldout = subject.heldout.part(which)
    count, dim = len(goals.positives), goals.texts.shape[1]
    margins = torch.full((2, count), -torch.inf)
    success = torch.zeros(count)
    directions = torch.zeros(count, dim, device=goals.texts.device)
    shown = (heldout.features @ goals.texts.T).argmax(dim=1)
    parameters = inversion.result()
    for place, concept in enumerate(inversion.rows.tolist()):
        own = goals.positives[concept]
        others = ~own[shown]
        images = heldout.images[others] if bool(others.any()) else heldout.images
        features = encode_triggered(subject.encoder, partial(family.apply_one, parameters, place), images)
        cosines = features @ goals.texts.T
        reached = cosines.masked_fill(~own, -torch.inf).amax(dim=1)
        rival = cosines.masked_fill(~goals.negatives[concept], -torch.inf).amax(dim=1)
        ascending = (reached - rival).sort().values
        worse = ascending[: math.ceil(len(ascending) / 2)]
        margins[:, concept] = torch.stack([ascending.mean(), worse.mean()])
        success[concept] = (reached > rival).float().mean()
        directions[concept] = normalize(features.mean(dim=0), dim=0)
    return Reach(margins=margins, success=success, directions=directions)


def _result(
    vocabulary: Vocabulary,
    outliers: Outliers,
    margins: Float[Tensor, "2 families concepts"],
    reached: list[Reach],
) -> SearchResult:
    concepts = range(vocabulary.n_concepts)
    best = [reached[outliers.families[concept]] for concept in concepts]
    directions = torch.stack([one.directions[concept] for concept, one in zip(concepts, best, strict=True)])
    nearest = (directions @ vocabulary.texts.T).masked_fill(~vocabulary.members(), -torch.inf).argmax(dim=1)
    return SearchResult(
        outliers=outliers,
        margins=margins,
        directions=directions,
        success=torch.stack([one.success[concept] for concept, one in zip(concepts, best, strict=True)]),
        words=nearest.tolist(),
        families=tuple(SEARCH_FAMILIES),
    )
