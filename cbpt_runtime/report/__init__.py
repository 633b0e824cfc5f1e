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
from cbpt_runtime.report.figures import png_uri, score_plot_uri, trigger_image


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image of the report: its address and what it shows, for those who cannot see it."""

    uri: str
    caption: str


def render_report(
    bundle: Bundle,
    *,
    examples: UInt8[np.ndarray, "batch height width 3"] | None = None,
    triggered: Mapping[str, UInt8[np.ndarray, "batch height width 3"]] | None = None,
) -> str:
    """The text of ``report.html``.

    Args:
        bundle: What to report on.
        examples: Clean images at the model's size, shown beside the dummy triggers.
        triggered: For each suspected target (by name) the same images with its dummy trigger.

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
        rows=_picture_rows(bundle, examples, triggered or {}),
        triggers=[
            Picture(uri=png_uri(image), caption=name)
            for name, tensor in bundle.triggers().items()
            if (image := trigger_image(tensor)) is not None
        ],
    )


def _score_plot(bundle: Bundle) -> str | None:
    scores = bundle.manifest["evidence"].get("scores")
    if not isinstance(scores, list) or len(scores) != len(bundle.class_names):
        return None
    values = np.array([np.nan if score is None else score for score in scores], float)
    return score_plot_uri(values, bundle.class_names, bundle.suspect_indices)


def _picture_rows(
    bundle: Bundle,
    examples: UInt8[np.ndarray, "batch height width 3"] | None,
    triggered: Mapping[str, UInt8[np.ndarray, "batch height width 3"]],
    count: int = 6,
) -> list[tuple[str, list[Picture]]]:
    """Rows of pictures: clean examples, then for each suspected target the same with its dummy trigger."""
    rows = []
    if examples is not None and len(examples):
        chosen = np.linspace(0, len(examples) - 1, min(count, len(examples))).astype(int)
        rows.append(("clean", [_example(examples[i], "clean held-out image") for i in chosen]))
        for name, images in triggered.items():
            caption = f"the same image with the dummy trigger for {name}"
            rows.append(
                (f"with the dummy trigger for {name}", [_example(images[i], caption) for i in chosen])
            )
    return rows


def _example(image: UInt8[np.ndarray, "height width 3"], caption: str) -> Picture:
    return Picture(uri=png_uri(image), caption=caption)


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
