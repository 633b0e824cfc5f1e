"""What was found of the words in the prompts, as a table for terminals and pages.

It comes out of a bundle's manifest as well, which may have been made by anybody: what is not as it should be
is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real

PROMPT_COLUMNS = (
    "word",
    "in prompts",
    "classes nearest themselves",
    "spread",
    "pull",
    "score",
    "towards",
    "",
)

_NUMBERS = ("share", "agreement", "agreement_usual", "spread", "spread_usual", "pull", "pull_score")


def prompt_rows(found: object) -> list[tuple[str, ...]]:
    """A row for each word, as `PROMPT_COLUMNS` says; in brackets what ordinary words do in its place."""
    words = found.get("words") if isinstance(found, Mapping) else None
    odd = odd_words(found)
    return [
        _row(word, odd) for word in (words if isinstance(words, list | tuple) else ()) if _is_effect(word)
    ]


def odd_words(found: object) -> tuple[str, ...]:
    """The words that do what ordinary words do not."""
    suspects = found.get("suspects") if isinstance(found, Mapping) else None
    return tuple(str(word) for word in suspects) if isinstance(suspects, list | tuple) else ()


def prompt_verdict(found: object) -> str | None:
    """A line on what was found; None where nothing was looked at."""
    rows, odd = prompt_rows(found), odd_words(found)
    if not rows:
        return None
    if not odd:
        return f"no odd word among the {len(rows)} that stand in many prompts"
    return "odd words, see the notes: " + ", ".join(odd)


def _is_effect(word: object) -> bool:
    return (
        isinstance(word, Mapping)
        and all(isinstance(word.get(name), str) for name in ("word", "pulled_to"))
        and all(isinstance(word.get(name), Real) for name in _NUMBERS)
    )


def _row(effect: Mapping[str, object], odd: tuple[str, ...]) -> tuple[str, ...]:
    numbers = {name: float(str(effect[name])) for name in _NUMBERS}
    return (
        str(effect["word"]),
        f"{100 * numbers['share']:.0f} %",
        f"{100 * numbers['agreement']:.0f} % ({100 * numbers['agreement_usual']:.0f} %)",
        f"{numbers['spread']:.2f} ({numbers['spread_usual']:.2f})",
        f"{numbers['pull']:.2f}",
        f"{numbers['pull_score']:.1f}",
        str(effect["pulled_to"]) if effect["word"] in odd else "–",
        "odd" if effect["word"] in odd else "",
    )
