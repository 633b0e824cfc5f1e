"""The charts and pictures of the reports, as ``data:`` addresses."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

_SHORTEST_SIDE = 96  # pixels; smaller images are enlarged without smoothing, so that each pixel can be seen


def picture_uri(image: UInt8[np.ndarray, "height width channels"]) -> str:
    """Return an image as an address: large ones as WebP, small ones as PNG, enlarged by a whole factor."""
    picture = Image.fromarray(image)
    buffer = io.BytesIO()
    if min(picture.size) >= _SHORTEST_SIDE:
        picture.save(buffer, "WEBP", quality=90)
        return data_uri("image/webp", buffer.getvalue())
    factor = -(-_SHORTEST_SIDE // min(picture.size))
    size = (picture.width * factor, picture.height * factor)
    picture.resize(size, Image.Resampling.NEAREST).save(buffer, "PNG", optimize=True)
    return data_uri("image/png", buffer.getvalue())


def data_uri(kind: str, data: bytes) -> str:
    """Content as an address that needs no network."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


SUSPECT_COLOUR = "#b3261e"
BEFORE_COLOUR = "#5b6770"
AFTER_COLOUR = "#1f5fa8"
_HEAD_COLOURS = {"before": BEFORE_COLOUR, "after": AFTER_COLOUR}
_RC: Any = {"svg.hashsalt": "cbpt", "svg.fonttype": "none", "font.size": 11}


def ranked_uri(
    values: Float[np.ndarray, " values"],
    names: Sequence[str],
    marked: Sequence[int],
    *,
    x_label: str,
    y_label: str,
) -> str:
    """Classes or concepts by a value, highest first, some of them marked and named."""
    order = np.argsort(-values, kind="stable")
    ranks = np.empty(len(values), int)
    ranks[order] = np.arange(1, len(values) + 1)
    others = [index for index in range(len(values)) if index not in marked]
    with _chart(3.0) as (axes, out):
        axes.scatter(ranks[others], values[others], s=18, color=BEFORE_COLOUR, linewidths=0)
        axes.scatter(ranks[list(marked)], values[list(marked)], s=64, color=SUSPECT_COLOUR, linewidths=0)
        for index in marked:
            left = ranks[index] < 0.7 * len(values)  # where there is room for the name
            axes.annotate(
                names[index],
                (ranks[index], values[index]),
                xytext=(9 if left else -9, 0),
                textcoords="offset points",
                va="center",
                ha="left" if left else "right",
                color=SUSPECT_COLOUR,
                weight="bold",
                parse_math=False,
            )
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.margins(x=0.03, y=0.12)
    return out[0]


def destinations_uri(
    names: Sequence[str], counts: Mapping[str, Int[np.ndarray, " rows"]], total: int, *, marked: str
) -> str:
    """Shares of images by the class each head ('before', 'after') gives them, before above after."""
    places = np.arange(len(names), dtype=float)
    with _chart(1.1 + 0.42 * len(names)) as (axes, out):
        height, offsets = (0.38, (-0.19, 0.19)) if len(counts) > 1 else (0.6, (0.0,))
        for (head, own), offset in zip(counts.items(), offsets, strict=True):
            axes.barh(places + offset, 100 * own / total, height, color=_HEAD_COLOURS[head], label=head)
        if len(counts) > 1:
            axes.legend(frameon=False, loc="lower right")
        axes.set_yticks(places, list(names), parse_math=False)
        for label in axes.get_yticklabels():
            if label.get_text() == marked:
                label.set(color=SUSPECT_COLOUR, weight="bold")
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("share of the triggered images, %")
    return out[0]


def class_accuracy_uri(
    shares: Mapping[str, Float[np.ndarray, " classes"]], names: Sequence[str], marked: Sequence[int]
) -> str:
    """Clean accuracy of every class with each head ('before', 'after'), in the order of the first."""
    first, last = next(iter(shares.values())), list(shares.values())[-1]
    order = np.argsort(-first, kind="stable")
    ranks = np.arange(1, len(order) + 1)
    with _chart(3.0) as (axes, out):
        if len(shares) > 1:
            axes.vlines(ranks, 100 * first[order], 100 * last[order], color="#c3cad0", linewidth=1)
        for head, own in shares.items():
            colour = _HEAD_COLOURS[head]
            axes.scatter(ranks, 100 * own[order], s=16, color=colour, linewidths=0, label=head)
        if len(shares) > 1:
            axes.legend(frameon=False, loc="lower left")
        for index in marked:
            rank = int(np.flatnonzero(order == index)[0]) + 1
            left = rank < 0.7 * len(order)
            axes.scatter([rank], [100 * last[index]], s=60, facecolors="none", edgecolors=SUSPECT_COLOUR)
            axes.annotate(
                names[index],
                (rank, 100 * last[index]),
                xytext=(9 if left else -9, 6),
                textcoords="offset points",
                ha="left" if left else "right",
                color=SUSPECT_COLOUR,
                weight="bold",
                parse_math=False,
            )
        axes.set_ylim(-4, 104)
        axes.set_xlabel(f"classes, most accurate {next(iter(shares))} first")
        axes.set_ylabel("clean accuracy, %")
    return out[0]


def alarms_uri(
    clean: Float[np.ndarray, " images"],
    triggered: Float[np.ndarray, " others"],
    threshold: float | None,
) -> str:
    """How the alarm is distributed over clean and over triggered images."""
    edges = [float(edge) for edge in np.linspace(0, 1, 26)]
    with _chart(2.8) as (axes, out):
        for values, colour, label in (
            (clean, AFTER_COLOUR, "clean images"),
            (triggered, SUSPECT_COLOUR, "triggered images"),
        ):
            weights = np.full(len(values), 100 / max(1, len(values)))
            axes.hist(
                values, edges, weights=weights, histtype="step", linewidth=1.8, color=colour, label=label
            )
        if threshold is not None:
            axes.axvline(threshold, color=BEFORE_COLOUR, linestyle="--", label="detects 95 %")
        axes.set_yscale("symlog", linthresh=1)
        axes.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
        axes.set_ylim(0, 130)
        axes.set_xlim(-0.01, 1.01)
        axes.set_xlabel("alarm")
        axes.set_ylabel("share of images, %")
        axes.legend(frameon=False, loc="upper center")
    return out[0]


@contextmanager
def _chart(height: float) -> Iterator[tuple[Axes, list[str]]]:
    """Axes to draw on; once drawn, the list holds the picture's address."""
    out: list[str] = []
    with mpl.rc_context(_RC), warnings.catch_warnings():
        # The browser draws the text; that matplotlib's own font lacks a letter of a class name is no matter.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure = Figure(figsize=(7, height), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        yield axes, out
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    out.append(data_uri("image/svg+xml", buffer.getvalue()))
