"""The search: can any concept be forced with a small universal trigger, far beyond all others?

It asks the encoder and an open vocabulary, not the user's class list, and needs no labels. Its cost does not
depend on how many words there are.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import normalize

from cbpt_runtime.bundle import Concept, Evidence
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

LEAST_SUCCESS = 0.7
"""Share of them that a trigger has to take to its concept, where no reference tells what is natural."""

_NOISE = 1.0  # logits: differences to a reference that vary less say nothing, a little training makes them
_FIRST_STEPS = 0.5
_KEPT = 0.5
_FEW = 24  # concepts that are all followed to the end


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A trusted relative, which the suspect's triggers are tried on.

    Attributes:
        encoder: Its image tower.
        vocabulary: The suspect's words and concepts, in its own texts.
    """

    encoder: ImageEncoder
    vocabulary: Vocabulary


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
        reference_margins: Of the same triggers on the reference, if there is one.
        reference_success: The same.
    """

    margins: Float[Tensor, "2 concepts"]
    success: Float[Tensor, " concepts"]
    directions: Float[Tensor, "concepts dim"]
    reference_margins: Float[Tensor, "2 concepts"] | None = None
    reference_success: Float[Tensor, " concepts"] | None = None

    def judged(self) -> Float[Tensor, "2 concepts"]:
        """Return the margins, beside a reference what they exceed its margins by."""
        known = self.reference_margins
        if known is None:
            return self.margins
        return torch.where(known > -torch.inf, self.margins - known, known)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What the search found.

    Attributes:
        outliers: How each concept stands out, and which are suspected.
        margins: What the outliers were found in.
        directions: Unit mean of the triggered features per concept, in the family that shows it best.
        success: Share of the images that this trigger takes to the concept.
        reference_success: The same on the reference, if there is one.
        words: Index of the word that lies nearest to this direction, among the concept's own.
        families: Names of the families, in the order of `outliers.families`.
    """

    outliers: Outliers
    margins: Float[Tensor, "2 families concepts"]
    directions: Float[Tensor, "concepts dim"]
    success: Float[Tensor, " concepts"]
    reference_success: Float[Tensor, " concepts"] | None
    words: list[int]
    families: tuple[str, ...]

    def concept(self, number: int, vocabulary: Vocabulary) -> Concept:
        """Return what is to be said of one concept."""
        known = self.reference_success
        return Concept(
            word=vocabulary.names[self.words[number]],
            score=float(self.outliers.scores[number]),
            p_value=float(self.outliers.p_values[number]),
            family=self.families[self.outliers.families[number]],
            success=float(self.success[number]),
            reference_success=None if known is None else float(known[number]),
        )

    def evidence(self, vocabulary: Vocabulary) -> Evidence:
        """Return what is to be said of all concepts that were followed to the end."""
        order = self.outliers.p_values.argsort(stable=True).tolist()
        followed = [number for number in order if math.isfinite(self.outliers.scores[number])]
        concepts = tuple(self.concept(number, vocabulary) for number in followed)
        smallest = concepts[0].p_value if concepts else 1.0  # none where all texts are alike
        return Evidence(p_value=smallest, concepts=concepts, words=len(vocabulary.names))


def search(
    suspect: SearchInput,
    config: PurifyConfig,
    progress: Progress | None = None,
    *,
    reference: Reference | None = None,
    stages: StageStore | None = None,
    cluster: str | None = None,
) -> SearchResult:
    """Inverts a small trigger for every concept in every search family, and tests who stands out.

    Args:
        suspect: The encoder under suspicion.
        config: Steps, batch, seed, precision and level.
        progress: Told how far the work is.
        reference: A trusted relative. What counts is then how much more a trigger does to the suspect that
            it was made on: natural perturbations work on both.
        stages: Where finished families are kept and looked for.
        cluster: Address of a Ray cluster to search on; the devices of this machine when None.

    Raises:
        ConfigError: Ray is not installed, or the cluster does not answer.
        PurificationError: The cluster gave a family up.
    """
    texts = suspect.vocabulary.texts
    mixed = is_mixed(config.precision, texts.device)  # another machine may have other instructions
    asked = (suspect, reference, replace(config, precision="bf16" if mixed else "fp32"))
    reached = {} if stages is None else _finished(stages)
    missing = [name for name in SEARCH_FAMILIES if name not in reached]
    for name, reach in in_parallel(_unit, asked, missing, texts.device, cluster=cluster):
        reached[name] = reach
        if stages is not None:
            stages.save(f"search-{name}", {k: v for k, v in asdict(reach).items() if v is not None}, {})
        if progress is not None:
            progress("search", len(reached), len(SEARCH_FAMILIES), {})
    return judge(suspect, [reached[name] for name in SEARCH_FAMILIES], config.suspect_p_value)


def _finished(stages: StageStore) -> dict[str, Reach]:
    """Families that an interrupted search has left."""
    found = {name: stages.load(f"search-{name}") for name in SEARCH_FAMILIES}
    return {name: Reach(**stage[0]) for name, stage in found.items() if stage is not None}


def _unit(asked: tuple[SearchInput, Reference | None, PurifyConfig], name: str) -> Reach:
    suspect, reference, config = asked
    return family_reach(suspect, reference, SEARCH_FAMILIES[name], config)


def judge(suspect: SearchInput, reached: list[Reach], level: float) -> SearchResult:
    """Test who stands out in what the triggers of every search family reach.

    Args:
        suspect: The encoder under suspicion.
        reached: Of each family, in the order of the search families.
        level: p-value below which a concept is suspected.
    """
    margins = torch.stack([one.judged() for one in reached], dim=1)
    if reached[0].reference_margins is None:
        taken, least = torch.stack([one.success for one in reached]) >= LEAST_SUCCESS, 0.0
    else:
        taken, least = torch.stack([one.margins[0] for one in reached]) > 0, _NOISE / suspect.scale
    outliers = find_outliers(margins, taken, level, least_deviation=least)
    return _result(suspect.vocabulary, outliers, margins, reached)


def family_reach(
    suspect: SearchInput, reference: Reference | None, family: TriggerFamily, config: PurifyConfig
) -> Reach:
    """Invert a trigger of one family for every concept, and measure what they reach.

    The unit of the search: it depends on nothing but its arguments, wherever it is computed.
    """
    inversion = _inverted(suspect, family, config)
    order = torch.randperm(len(suspect.heldout.images), generator=torch.Generator().manual_seed(config.seed))
    heldout = suspect.heldout.part(order[:MEASURED_IMAGES])
    shown = (heldout.features @ suspect.vocabulary.texts.T).argmax(dim=1)
    asked = partial(_measure, family=family, inversion=inversion, images=heldout.images, shown=shown)
    reach = asked(suspect.encoder, suspect.vocabulary)
    if reference is None:
        return reach
    known = asked(reference.encoder, reference.vocabulary)
    return replace(reach, reference_margins=known.margins, reference_success=known.success)


def _inverted(subject: SearchInput, family: TriggerFamily, config: PurifyConfig) -> Inversion:
    """Half of the steps for all concepts, the rest for the better ones, each then for its nearest word."""
    goals = subject.goals()
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
    order = inversion.recent_margins().argsort(descending=True, stable=True)
    inversion.keep(order[: concepts_kept(len(order))])
    inversion.advance(steps - first)
    return inversion


def concepts_kept(concepts: int) -> int:
    """How many of so many concepts are followed to the end: the better half, all of a few."""
    return min(concepts, max(_FEW, math.ceil(_KEPT * concepts)))


def _measure(
    encoder: ImageEncoder,
    vocabulary: Vocabulary,
    *,
    family: TriggerFamily,
    inversion: Inversion,
    images: UInt8[Tensor, "batch 3 height width"],
    shown: Int[Tensor, " batch"],
) -> Reach:
    """Measure triggers on an encoder, on the images that do not show the concept already."""
    texts, members, rivals = vocabulary.texts, vocabulary.members(), vocabulary.rivals()
    margins = torch.full((2, len(members)), -torch.inf)
    success = torch.zeros(len(members))
    directions = torch.zeros(len(members), texts.shape[1])
    parameters = inversion.result()
    for place, concept in enumerate(inversion.rows.tolist()):
        own = members[concept]
        others = ~own[shown]
        some = images[others] if bool(others.any()) else images
        features = encode_triggered(encoder, partial(family.apply_one, parameters, place), some)
        cosines = features @ texts.T
        reached = cosines.masked_fill(~own, -torch.inf).amax(dim=1)
        rival = cosines.masked_fill(~rivals[concept], -torch.inf).amax(dim=1)
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
    best = [reached[family] for family in outliers.families]
    directions = torch.stack([one.directions[concept] for concept, one in enumerate(best)])
    directions = directions.to(vocabulary.texts)
    nearest = (directions @ vocabulary.texts.T).masked_fill(~vocabulary.members(), -torch.inf).argmax(dim=1)
    known = [one.reference_success for one in best if one.reference_success is not None]
    return SearchResult(
        outliers=outliers,
        margins=margins,
        directions=directions,
        success=_of_each([one.success for one in best]),
        reference_success=_of_each(known) if known else None,
        words=nearest.tolist(),
        families=tuple(SEARCH_FAMILIES),
    )


def _of_each(best: list[Float[Tensor, " concepts"]]) -> Float[Tensor, " concepts"]:
    """Return the value of the first concept in the first, of the second in the second."""
    return torch.stack(best).diagonal().clone()
