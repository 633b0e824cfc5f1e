"""Words that stand in many prompts of a class list, and whether one of them owns the answers.

Whoever made the weights may have made the text tower, too, and may recommend a prompt. A word in it that
pulls every class to one text decides what the baked head says, whatever the image shows. So each word that
stands in a quarter of the prompts or more is left out, and replaced by ordinary words in the same place: what
it does to the classes is compared with leaving it out, and with what the ordinary words do. No image is
looked at.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from cbpt_runtime.models.clip import DualEncoder
from cbpt_runtime.models.data import ClassList, evenly_spaced, spoken
from cbpt_runtime.models.prompt_findings import LEAST_SHARE, PromptCheck, TemplateAgreement, WordEffect

SUBSTITUTES = (
    "good", "small", "large", "bright", "dark", "clean", "close", "new", "old", "nice", "plain", "simple",
    "single", "whole", "usual", "common", "recent", "early", "local", "other", "same", "short", "high",
    "free",
)  # fmt: skip
"""Ordinary words to compare a word with."""

PLACES = ("own", "front")
"""Where a word is looked at: where it stands, and in front of the rest of the prompt.

A tower that knows few words is upset by any word beside the name, among which no other stands out.
"""

_MAX_CLASSES = 24
_MAX_TEMPLATES = 2
_MAX_PROMPTS = 1024
_LEAST_DEVIATION = 5e-3
_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]+")


def check_prompts(encoder: DualEncoder, classes: ClassList) -> PromptCheck:
    """Look at what each frequent word in the prompts does to the classes.

    A few thousand short texts go through the text tower for each such word, whatever the length of the list.

    Args:
        encoder: The suspect.
        classes: Names and templates.
    """
    shared = set(classes.templates)
    templates = classes.templates[0] if len(shared) == 1 else ()
    words = frequent_words(classes)
    effects = tuple(_effect(encoder, classes, word, share) for word, share in words.items())
    return PromptCheck(
        words=effects,
        templates=len(templates),
        least_agreeing=_least_agreeing(encoder, classes, templates) if len(templates) > 1 else None,
        suspects=tuple(effect.word for effect in effects if effect.oddities),
    )


def frequent_words(classes: ClassList) -> dict[str, float]:
    """Words in a quarter of the prompts or more, of more than half of the classes, and that share.

    Runs of punctuation count as words. The name that stands for '{}' is not looked at.
    """
    own = [[_words(template) for template in templates] for templates in classes.templates]
    found = {word for templates in own for words in templates for word in words}
    per_class = {
        word: [sum(word in words for words in templates) / len(templates) for templates in own]
        for word in found
    }
    shares = {word: sum(rates) / len(rates) for word, rates in per_class.items()}
    kept = [
        word
        for word, rates in per_class.items()
        if shares[word] >= LEAST_SHARE and 2 * sum(rate > 0 for rate in rates) > len(rates)
    ]
    return {word: shares[word] for word in sorted(kept, key=lambda word: (-shares[word], word))}


def replaced(template: str, word: str, by: str) -> str:
    """Return the template with every occurrence of a word replaced, case ignored; `by` may be empty."""

    def change(match: re.Match[str]) -> str:
        return f" {by} " if match.group().lower() == word else match.group()

    parts = [_WORD.sub(change, part) for part in template.split("{}")]
    return " ".join("{}".join(parts).split())


def word_effect(
    plain: Float[Tensor, "classes dim"],
    sampled: Int[Tensor, " sampled"],
    moved: Float[Tensor, "variants sampled dim"],
) -> dict[str, Tensor]:
    """Return what variants of a prompt do to the classes.

    Args:
        plain: Unit embeddings of all classes without the word.
        sampled: Which classes the variants are of.
        moved: Unit embeddings of those classes with each word in the place of the one in question.

    Returns:
        Of each variant, `agreement`, `spread`, `pull` and `pulled_to` as in `WordEffect`.
    """
    before = plain[sampled] @ plain.T
    cosines = moved @ plain.T
    others = torch.ones_like(before).scatter_(1, sampled.unsqueeze(1), 0.0)
    distance = ((1 - before) * others).sum() / others.sum()
    nearer = ((cosines - before) * others).sum(dim=1) / others.sum(dim=0).clamp(min=1)
    most, pulled_to = nearer.max(dim=1)
    return {
        "agreement": (cosines.argmax(dim=2) == sampled).float().mean(dim=1),
        "spread": _spread(moved) / _spread(plain[sampled]).clamp(min=1e-12),
        "pull": (most - nearer.mean(dim=1)) / distance.clamp(min=1e-6),
        "pulled_to": pulled_to,
    }


def _spread(embeddings: Float[Tensor, "*variants classes dim"]) -> Float[Tensor, "*variants"]:
    return (embeddings - embeddings.mean(dim=-2, keepdim=True)).square().sum(dim=-1).mean(dim=-1)


def _effect(encoder: DualEncoder, classes: ClassList, word: str, share: float) -> WordEffect:
    """Return the effect of a word where it stands or, if it is odd only there, in front of the rest."""
    prompts = _Prompts.of(classes, word)
    plain = _mean_embeddings(encoder, [prompts.texts(label, "") for label in range(len(prompts.names))])
    words = [word, *(substitute for substitute in SUBSTITUTES if substitute not in prompts.taken)]
    effects = []
    for place in prompts.places():
        texts = [prompts.texts(label, by, place) for by in words for label in prompts.sampled]
        moved = _mean_embeddings(encoder, texts).unflatten(0, (len(words), -1))
        found = word_effect(plain, torch.tensor(prompts.sampled, device=plain.device), moved)
        pull, usual_pull = found["pull"][0], found["pull"][1:]
        score = (pull - usual_pull.mean()) / usual_pull.std().clamp(min=_LEAST_DEVIATION)
        effects.append(
            WordEffect(
                word=word,
                share=round(share, 4),
                place=place,
                agreement=_figure(found["agreement"][0]),
                agreement_usual=_figure(found["agreement"][1:].median()),
                spread=_figure(found["spread"][0]),
                spread_usual=_figure(found["spread"][1:].median()),
                pull=_figure(pull),
                pull_score=_figure(score),
                pulled_to=classes.names[int(found["pulled_to"][0])],
            )
        )
    return next((effect for effect in effects if effect.oddities), effects[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompts:
    """The prompts a word is looked at in.

    Attributes:
        word: The word.
        names: Of all classes, spoken.
        templates: Of each class those that have the word; others where none has.
        sampled: Classes to move.
        taken: Words that cannot stand for an ordinary one.
    """

    word: str
    names: tuple[str, ...]
    templates: tuple[Sequence[str], ...]
    sampled: Sequence[int]
    taken: frozenset[str]

    @classmethod
    def of(cls, classes: ClassList, word: str) -> _Prompts:
        names = tuple(spoken(name) for name in classes.names)
        most = max(1, min(_MAX_TEMPLATES, _MAX_PROMPTS // len(names)))
        has = [tuple(text for text in own if word in _words(text)) for own in classes.templates]
        return cls(
            word=word,
            names=names,
            templates=tuple(
                evenly_spaced(own or everything, most)
                for own, everything in zip(has, classes.templates, strict=True)
            ),
            sampled=evenly_spaced([label for label, own in enumerate(has) if own], _MAX_CLASSES),
            taken=frozenset().union(*map(_words, names), *(_words(text) for own in has for text in own)),
        )

    def places(self) -> tuple[str, ...]:
        """Where to look at the word; a word that stands in front already has one place."""
        first = self.sampled[0]
        is_there = self.texts(first, self.word) == self.texts(first, self.word, "front")
        return PLACES[:1] if is_there else PLACES

    def texts(self, label: int, by: str, place: str = "own") -> list[str]:
        """Return the prompts of a class with another word in the place of this one, or in front."""
        texts = [
            replaced(text, self.word, by) if place == "own" else f"{by} {replaced(text, self.word, '')}"
            for text in self.templates[label]
        ]
        return [text.replace("{}", self.names[label]) for text in texts]


def _least_agreeing(encoder: DualEncoder, classes: ClassList, templates: Sequence[str]) -> TemplateAgreement:
    names = [spoken(name) for name in evenly_spaced(classes.names, _MAX_CLASSES)]
    texts = [template.replace("{}", name) for template in templates for name in names]
    features = encoder.encode_texts(texts).view(len(templates), len(names), -1)
    features = features - features.mean(dim=1, keepdim=True)  # what a template adds to all changes no answer
    others = normalize(features.sum(dim=0) - features, dim=-1)
    own = torch.arange(len(names), device=features.device)
    agreement = ((features @ others.mT).argmax(dim=2) == own).float().mean(dim=1)
    least = int(agreement.argmin())
    return TemplateAgreement(template=templates[least], agreement=_figure(agreement[least]))


def _figure(value: Tensor) -> float:
    return round(float(value), 4)


def _mean_embeddings(encoder: DualEncoder, texts: Sequence[Sequence[str]]) -> Float[Tensor, "classes dim"]:
    features = encoder.encode_texts([text for own in texts for text in own])
    groups = torch.split(features, [len(own) for own in texts])
    return normalize(torch.stack([group.mean(dim=0) for group in groups]), dim=-1)


@lru_cache(maxsize=4096)
def _words(template: str) -> frozenset[str]:
    return frozenset(word.lower() for part in template.split("{}") for word in _WORD.findall(part))
