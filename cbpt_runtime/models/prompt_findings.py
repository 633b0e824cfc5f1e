"""What was found of the words in the prompts of a class list, as a bundle keeps it. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from cbpt_runtime.artifacts import records_of

LEAST_SHARE = 0.25
"""Share of the prompts from which on a word, or a template, can own the answers of their mean."""

_LOST_AGREEMENT = 0.2
_KEPT_SPREAD = 0.5
_TEMPLATE_AGREEMENT = 0.5
_PULL = 0.1
_PULL_SCORE = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WordEffect:
    """What a word in the prompts does to the classes; 'usual' is the median of ordinary words in its place.

    Attributes:
        word: The word, in small letters.
        share: Share in [0, 1] of the prompts that have it.
        place: 'own' or 'front', put in front of the rest: the first at which it is odd, else its own.
        agreement: Share in [0, 1] of the classes whose prompts lie nearest to their own prompts without the
            word.
        agreement_usual: The same for ordinary words.
        spread: Variance between the classes, as a multiple of that without the word.
        spread_usual: The same for ordinary words.
        pull: How much nearer the other classes' prompts come to those of one class, above what they come
            nearer to all, as a multiple of the mean distance between two classes: 1 where they fall on it.
        pull_score: How far that lies above ordinary words, in standard deviations of theirs.
        pulled_to: That class.
    """

    word: str
    share: float
    place: str
    agreement: float
    agreement_usual: float
    spread: float
    spread_usual: float
    pull: float
    pull_score: float
    pulled_to: str

    @property
    def oddities(self) -> tuple[str, ...]:
        """What of it an ordinary word does not do, for people; empty for a harmless word."""
        found = []
        if self.agreement <= self.agreement_usual - _LOST_AGREEMENT:
            found.append(
                f"only {self.agreement:.0%} of the classes are still nearest to themselves"
                f" (with ordinary words {self.agreement_usual:.0%})"
            )
        if self.spread <= _KEPT_SPREAD * self.spread_usual:
            found.append(f"the classes differ by {self.spread:.2f} of what they do without it")
        if self.pull >= _PULL and self.pull_score >= _PULL_SCORE:
            found.append(
                f"it pulls the classes towards {self.pulled_to}, {self.pull_score:.0f} deviations above usual"
            )
        return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateAgreement:
    """How well a template agrees with the others.

    Attributes:
        template: The text.
        agreement: Share in [0, 1] of the classes that lie nearest to their own mean over the other templates,
            once what the template adds to all of them is taken away.
    """

    template: str
    agreement: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCheck:
    """What the text tower makes of the words in the prompts.

    Attributes:
        words: Those in a quarter of the prompts or more, the most frequent first.
        templates: How many there are; 0 where the classes have templates of their own.
        least_agreeing: The template that agrees least with the others, where there are two.
        suspects: Words that do to the classes what ordinary words do not.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "word",
        "in prompts",
        "classes nearest themselves",
        "spread",
        "pull",
        "score",
        "towards",
        "",
    )

    words: tuple[WordEffect, ...]
    templates: int
    least_agreeing: TemplateAgreement | None
    suspects: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, found: object) -> Self | None:
        """Read what a manifest says; None where it says nothing, without what is not as it should be."""
        if not isinstance(found, Mapping):
            return None
        templates, suspects = found.get("templates"), found.get("suspects")
        return cls(
            words=records_of(WordEffect, found.get("words")),
            templates=templates if type(templates) is int else 0,
            least_agreeing=next(iter(records_of(TemplateAgreement, [found.get("least_agreeing")])), None),
            suspects=tuple(map(str, suspects)) if isinstance(suspects, list | tuple) else (),
        )

    def notes(self) -> tuple[str, ...]:
        """Remarks for the user; empty where nothing is odd."""
        notes = [_word_note(effect) for effect in self.words if effect.oddities]
        least = self.least_agreeing
        has_weight = self.templates * LEAST_SHARE <= 1
        if least is not None and has_weight and least.agreement <= _TEMPLATE_AGREEMENT:
            notes.append(
                f"the template '{least.template}' disagrees with the others: only {least.agreement:.0%} of"
                " the classes lie nearest to themselves. Leave it away"
            )
        return tuple(notes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, ...]]:
        """Return a row for each word, as `columns` says; in brackets what ordinary words do there."""
        return [
            (
                effect.word,
                f"{100 * effect.share:.0f} %",
                f"{100 * effect.agreement:.0f} % ({100 * effect.agreement_usual:.0f} %)",
                f"{effect.spread:.2f} ({effect.spread_usual:.2f})",
                f"{effect.pull:.2f}",
                f"{effect.pull_score:.1f}",
                effect.pulled_to if effect.word in self.suspects else "–",
                "odd" if effect.word in self.suspects else "",
            )
            for effect in self.words
        ]

    @property
    def verdict(self) -> str | None:
        """A line on what was found; None where no word was looked at."""
        if not self.words:
            return None
        if not self.suspects:
            return f"no odd word among the {len(self.words)} that stand in many prompts"
        return "odd words, see the notes: " + ", ".join(self.suspects)


def _word_note(effect: WordEffect) -> str:
    where = " (put in front)" if effect.place == "front" else ""
    return (
        f"the word '{effect.word}', in {effect.share:.0%} of the prompts, moves the classes as ordinary words"
        f" do not{where}: {'; '.join(effect.oddities)}. The text tower may be poisoned, and the class named"
        " need not be the target, or it does not know the word. Use other templates, without it"
    )
