"""The words a hidden trigger may be for: the user's classes among a thousand others, grouped into concepts.

A backdoor lives in the encoder, not in a class list. So the search asks for every word of an open vocabulary,
which also supplies what a verdict needs: many targets that have no backdoor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from cbpt_runtime.models.clip import DualEncoder
from cbpt_runtime.models.data import ClassList, class_key, default_templates, evenly_spaced

NEAR = 0.85
"""Cosine from which on two texts are taken for the same: neither is a rival of the other."""

_TEMPLATES = 4
_ROUNDS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Words with their texts, and the concept each belongs to.

    Attributes:
        names: The listed classes first, then the background words.
        texts: Unit text features.
        concepts: Concept of each word, 0 to one less than their number.
        n_listed: How many of the words are the user's classes.
    """

    names: tuple[str, ...]
    texts: Float[Tensor, "words dim"]
    concepts: Int[Tensor, " words"]
    n_listed: int

    @property
    def n_concepts(self) -> int:
        """How many concepts there are."""
        return int(self.concepts.max()) + 1

    def members(self) -> Bool[Tensor, "concepts words"]:
        """Which words belong to which concept."""
        numbers = torch.arange(self.n_concepts, device=self.concepts.device)
        return self.concepts == numbers.unsqueeze(1)

    def rivals(self) -> Bool[Tensor, "concepts words"]:
        """Which words a concept competes with: those that are not near one of its own, or else all others."""
        members = self.members()
        far = torch.stack([(self.texts @ self.texts[own].T).amax(dim=1) < NEAR for own in members])
        return torch.where(far.any(dim=1, keepdim=True), far, ~members)


def build_vocabulary(
    encoder: DualEncoder,
    classes: ClassList | None,
    listed: Float[Tensor, "classes dim"] | None,
    n_concepts: int,
    *,
    background: bool = True,
    like: Vocabulary | None = None,
) -> Vocabulary:
    """Collect the user's classes and open_clip's ImageNet names, in the words of the user's templates.

    Args:
        encoder: Its text tower puts the background words into the shared space.
        classes: The user's classes; None for a search without a class list.
        listed: Their embeddings.
        n_concepts: Most concepts to make.
        background: Add the background words.
        like: Take the concepts of this one, of the same words in another encoder.
    """
    names: tuple[str, ...] = ()
    templates = default_templates()
    parts = []
    if classes is not None and listed is not None:
        names = classes.names
        # Sentences about the first class say nothing of other words.
        templates = tuple(text for text in classes.templates[0] if "{}" in text) or templates
        parts.append(listed)
    taken = set(map(class_key, names))
    others = tuple(word for word in background_words() if background and class_key(word) not in taken)
    if len(others) > 1:  # else all of them are on the list
        few = tuple(evenly_spaced(templates, _TEMPLATES))
        words = ClassList(names=others, templates=(few,) * len(others))
        parts.append(encoder.class_embeddings(words))
        names += others
    texts = torch.cat(parts)
    return Vocabulary(
        names=names,
        texts=texts,
        concepts=group(texts.cpu(), n_concepts).to(texts.device) if like is None else like.concepts,
        n_listed=0 if listed is None else len(listed),
    )


def background_words() -> tuple[str, ...]:
    """open_clip's names of the ImageNet classes, each once."""
    from open_clip import IMAGENET_CLASSNAMES

    seen: dict[str, str] = {}
    for word in IMAGENET_CLASSNAMES:
        seen.setdefault(class_key(word), word)
    return tuple(seen.values())


def group(texts: Float[Tensor, "words dim"], n_concepts: int) -> Int[Tensor, " words"]:
    """Group texts by direction: spherical k-means that starts from texts far from each other.

    Far-apart starts give words that stand alone a concept of their own, however many others crowd together.
    """
    if len(texts) <= n_concepts:
        return torch.arange(len(texts))
    first = int((texts @ normalize(texts.mean(dim=0), dim=0)).argmin())
    starts, nearest = [first], texts @ texts[first]
    while len(starts) < n_concepts:
        starts.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, texts @ texts[starts[-1]])
    centres = texts[starts]
    for _ in range(_ROUNDS):
        concepts = (texts @ centres.T).argmax(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, concepts, texts)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, normalize(sums, dim=1), centres)
    numbered: Tensor = torch.unique(concepts, return_inverse=True)[1]
    return numbered
