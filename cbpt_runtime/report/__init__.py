"""`report.html`: the verdict of a bundle for people, in one file that needs no network.

The template escapes every value; the page forbids scripts and any address but ``data:``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from jinja2 import Environment, PackageLoader, StrictUndefined

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.dummies import Painted
from cbpt_runtime.report.figures import picture_uri, score_plot_uri

_GREY = 128
_MOST_TRIGGERS = 6  # rows of pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image of the report: its address and what it shows, for those who cannot see it."""

    uri: str
    caption: str


def choose_examples(
    images: UInt8[np.ndarray, "batch height width 3"], count: int = 5
) -> UInt8[np.ndarray, "examples height width 3"]:
    """A plain grey image, which shows a trigger bare, then images evenly spread over those given."""
    grey = np.full((1, *images.shape[1:]), _GREY, np.uint8)
    chosen = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)
    return np.concatenate([grey, images[chosen]])


def render_report(
    bundle: Bundle,
    *,
    examples: UInt8[np.ndarray, "examples height width 3"] | None = None,
    painted: Sequence[Painted] = (),
) -> str:
    """The text of ``report.html``.

    Args:
        bundle: What to report on.
        examples: A few clean images at the model's size.
        painted: The same images with each dummy trigger.

    Returns:
        One self-contained HTML page.
    """
    environment = Environment(
        loader=PackageLoader("cbpt_runtime", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "figure": _figure, "pretty": _pretty}
    return environment.get_template("report.html.jinja").render(
        bundle=bundle,
        manifest=bundle.manifest,
        names=_listed([str(suspect["name"]) for suspect in bundle.suspects]),
        success=_worst_success(bundle.suspects),
        score_plot=_score_plot(bundle),
        rows=_picture_rows(bundle, examples, painted),
    )


def _score_plot(bundle: Bundle) -> str | None:
    scores = bundle.manifest["evidence"].get("scores")
    if not isinstance(scores, list) or len(scores) != len(bundle.class_names):
        return None
    values = np.array([np.nan if score is None else score for score in scores], float)
    return score_plot_uri(values, bundle.class_names, bundle.suspect_indices)


def _picture_rows(
    bundle: Bundle,
    examples: UInt8[np.ndarray, "examples height width 3"] | None,
    painted: Sequence[Painted],
) -> list[tuple[str, list[Picture]]]:
    """A row of clean pictures, then for each dummy trigger the same with it; nothing without triggers."""
    if examples is None or not painted:
        return []
    rows = [("clean", "clean image", examples)]
    for dummy in painted[:_MOST_TRIGGERS]:
        title = f"{dummy.family} trigger for {bundle.class_names[dummy.target]}"
        rows.append((title, f"the image above with the {title}", dummy.images))
    return [
        (title, [Picture(uri=picture_uri(image), caption=caption) for image in images])
        for title, caption, images in rows
    ]


def _worst_success(suspects: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Highest dummy-trigger success before and after over the suspected targets."""
    pairs = [(suspect.get("success_before"), suspect.get("success_after")) for suspect in suspects]
    known = [(before, after) for before, after in pairs if before is not None and after is not None]
    return (max(before for before, _ in known), max(after for _, after in known)) if known else None


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _percent(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.1f}\N{NO-BREAK SPACE}%"


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "–"


def _pretty(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
