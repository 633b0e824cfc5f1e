"""The plots of a bench run: latencies, throughput against latency, scaling over batch and classes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

_COLOURS = ("#1f5fa8", "#b3261e", "#14683c", "#7a4aa0", "#8a5a00", "#5b6770")
_STYLES = ("-", "--", ":", "-.")
_MARKERS = "os^Dvx"
_RC: Any = {"svg.hashsalt": "cbpt", "svg.fonttype": "none", "font.size": 11}
Series = tuple[str, Sequence[float], Sequence[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A drawn plot.

    Attributes:
        name: Of its files, without ending.
        title: Its heading.
        text: What it shows, in a sentence or two.
        alt: The same for those who cannot see it, with its numbers.
        svg: Its content ...
        png: ... as both.
    """

    name: str
    title: str
    text: str
    alt: str
    svg: bytes
    png: bytes


def latency_distribution(series: Sequence[Series]) -> Plot | None:
    """Share of requests answered within a time, one line per run that has latencies."""
    kept = [(name, np.sort(np.asarray(values, float))) for name, values, _ in series if len(values) > 1]
    if not kept:
        return None

    def draw(axes: Axes) -> None:
        for number, (name, values) in enumerate(kept):
            shares = 100 * np.arange(1, len(values) + 1) / len(values)
            axes.step(values, shares, where="post", label=name, **_style(number))
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
        axes.set_xlabel("latency, ms (logarithmic)")
        axes.set_ylabel("requests answered within, %")
        axes.set_ylim(0, 102)

    medians = "; ".join(f"{name}: half within {np.median(values):.3g} ms" for name, values in kept)
    return _drawn(
        draw,
        name="latency-distribution",
        title="How long answers take",
        text="Each line: the share of requests answered within a time. In an open loop the time counts from "
        "when a request was due.",
        alt=f"Cumulative distribution of latency. {medians}.",
    )


def throughput_against_latency(series: Sequence[Series], *, bound_ms: float) -> Plot | None:
    """Median latency at the throughput achieved, one line per target and kind of loop."""
    return _lines(
        series,
        name="throughput-latency",
        title="Throughput against latency",
        text="Median latency at the throughput that was achieved. A closed loop cannot queue more than its "
        "senders, so its latencies flatter; the open loop's do not.",
        x_label="answers per second",
        y_label="median latency, ms (logarithmic)",
        log="y",
        line=bound_ms,
    )


def batch_scaling(series: Sequence[Series]) -> Plot | None:
    """Offline throughput over batch sizes."""
    return _lines(
        series,
        name="scaling-batch",
        title="Scaling over the batch",
        text="Images per second when whole batches are there from the start, decoding included.",
        x_label="images per batch (logarithmic)",
        y_label="images per second",
        log="x",
    )


def class_scaling(series: Sequence[Series]) -> Plot | None:
    """Latency over the number of classes."""
    return _lines(
        series,
        name="scaling-classes",
        title="Scaling over the classes",
        text="The graph with random heads of other sizes, batch 1, pixels in.",
        x_label="classes (logarithmic)",
        y_label="latency, ms",
        log="x",
        from_zero=True,
    )


def _lines(
    series: Sequence[Series],
    *,
    name: str,
    title: str,
    text: str,
    x_label: str,
    y_label: str,
    log: str,
    line: float | None = None,
    from_zero: bool = False,
) -> Plot | None:
    kept = [each for each in series if len(each[1])]
    if not kept:
        return None

    def draw(axes: Axes) -> None:
        for number, (label, xs, ys) in enumerate(kept):
            order = np.argsort(xs)
            marker = _MARKERS[number % len(_MARKERS)]
            axes.plot(np.array(xs)[order], np.array(ys)[order], marker=marker, label=label, **_style(number))
        if line is not None:
            axes.axhline(line, color="#5b6770", linewidth=1, linestyle=":", label=f"bound, {line:g} ms")
        (axes.set_xscale if log == "x" else axes.set_yscale)("log")
        _plain_numbers(axes.xaxis if log == "x" else axes.yaxis)
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    numbers = "; ".join(
        f"{label}: " + ", ".join(f"{y:.3g} at {x:.3g}" for x, y in sorted(zip(xs, ys, strict=True)))
        for label, xs, ys in kept
    )
    return _drawn(draw, name=name, title=title, text=text, alt=f"{y_label} over {x_label}. {numbers}.")


def _style(number: int) -> dict[str, Any]:
    """Colour and line style: runs can be told apart without colour, too."""
    return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _STYLES[number % len(_STYLES)]}


def _plain_numbers(axis: Axis) -> None:
    """20 and 200 rather than powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _drawn(draw: Callable[[Axes], None], *, name: str, title: str, text: str, alt: str) -> Plot:
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=2)
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
    return Plot(name=name, title=title, text=text, alt=alt, svg=svg.getvalue(), png=png.getvalue())
