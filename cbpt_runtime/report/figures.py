"""Pictures of the report as ``data:`` addresses."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from PIL import Image

SUSPECT_COLOUR = "#b3261e"
OTHER_COLOUR = "#5b6770"
_SHORTEST_SIDE = 96  # pixels; smaller images are enlarged without smoothing, so that each pixel can be seen


def picture_uri(image: UInt8[np.ndarray, "height width channels"]) -> str:
    """An image as an address: large ones as WebP, small ones as PNG, enlarged by a whole factor."""
    picture = Image.fromarray(image)
    buffer = io.BytesIO()
    if min(picture.size) >= _SHORTEST_SIDE:
        picture.save(buffer, "WEBP", quality=90)
        return _uri("image/webp", buffer.getvalue())
    factor = -(-_SHORTEST_SIDE // min(picture.size))
    size = (picture.width * factor, picture.height * factor)
    picture.resize(size, Image.Resampling.NEAREST).save(buffer, "PNG", optimize=True)
    return _uri("image/png", buffer.getvalue())


def score_plot_uri(
    scores: Float[np.ndarray, " classes"], names: Sequence[str], suspects: Sequence[int]
) -> str:
    """All classes by suspicion score, highest first, the suspected targets marked and named."""
    order = np.argsort(-scores, kind="stable")
    ranks = np.empty(len(scores), int)
    ranks[order] = np.arange(1, len(scores) + 1)
    others = [index for index in range(len(scores)) if index not in suspects]
    with (
        mpl.rc_context({"svg.hashsalt": "cbpt", "svg.fonttype": "none", "font.size": 11}),
        warnings.catch_warnings(),
    ):
        # The browser draws the text; that matplotlib's own font lacks a letter of a class name is no matter.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure = Figure(figsize=(7, 3), layout="constrained")
        axes = figure.add_subplot()
        axes.scatter(ranks[others], scores[others], s=18, color=OTHER_COLOUR, linewidths=0)
        axes.scatter(ranks[list(suspects)], scores[list(suspects)], s=64, color=SUSPECT_COLOUR, linewidths=0)
        for index in suspects:
            axes.annotate(
                names[index],
                (ranks[index], scores[index]),
                xytext=(9, 0),
                textcoords="offset points",
                va="center",
                color=SUSPECT_COLOUR,
                weight="bold",
                parse_math=False,
            )
        axes.set_xlabel("classes, most suspicious first")
        axes.set_ylabel("suspicion score")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.03, y=0.12)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _uri("image/svg+xml", buffer.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
