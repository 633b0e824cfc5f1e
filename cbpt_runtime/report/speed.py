"""The folder of a bench run: its numbers, its plots, and a page of how fast, how sure and how good.

Plots: latencies, throughput against latency, scaling over batch and classes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cbpt_runtime.artifacts import Kind, marked, new_folder
from cbpt_runtime.artifacts.names import json_text, readable
from cbpt_runtime.bench.records import COLUMNS, BenchResult, Run, SystemResult
from cbpt_runtime.bench.results import RESULT
from cbpt_runtime.report.charts import data_uri
from cbpt_runtime.report.pages import render_page

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


RESULTS: Final[Kind] = marked("folder of bench results")
_STAGES = ("decode", "queue", "transfer", "compute")


def write_results(result: BenchResult, output: Path, *, force: bool) -> None:
    """Write ``bench.json``, every plot as SVG and PNG, and ``report.html``: whole or not at all.

    Raises:
        OutputError: The folder cannot be written.
    """
    with new_folder(output, RESULTS, force=force) as staging:
        text = json_text(result.to_dict(), indent=1)
        (staging / RESULT).write_text(text + "\n", encoding="utf-8")
        plots = draw_plots(result)
        for plot in plots:
            (staging / f"{plot.name}.svg").write_bytes(plot.svg)
            (staging / f"{plot.name}.png").write_bytes(plot.png)
        (staging / "report.html").write_text(readable(render_bench(result, plots)), encoding="utf-8")


def render_bench(result: BenchResult, plots: Sequence[Plot] | None = None) -> str:
    """Return the text of a run's ``report.html``: one self-contained page, with these plots or its own."""
    drawn = draw_plots(result) if plots is None else plots
    return render_page(
        "speed.html.jinja",
        result=result,
        headline=_headline(result.systems[0]),
        cards=_cards(result.systems[0]),
        columns=COLUMNS,
        systems=[
            {
                "name": system.name,
                "facts": {key: value for key, value in system.facts.items() if value is not None},
                "quality": str(system.quality),
                "where": system.quality.stated.where,
                "rows": [run.row(scenario) for scenario, run in system.runs()],
                "notes": list(system.notes()),
                "stages": stage_rows(system),
                "peer": system.perf_analyzer,
            }
            for system in result.systems
        ],
        stage_columns=("run", *(f"{stage} ms" for stage in _STAGES), "mean batch"),
        plots=[(plot, data_uri("image/svg+xml", plot.svg)) for plot in drawn],
    )


def draw_plots(result: BenchResult) -> list[Plot]:
    """Every plot the run has numbers for."""
    many = len(result.systems) > 1

    def label(system: SystemResult, words: str) -> str:
        return f"{system.name}, {words}" if many else words

    distributions: list[Series] = []
    against: dict[str, tuple[list[float], list[float]]] = {}
    batches: list[Series] = []
    classes: list[Series] = []
    for system in result.systems:
        for scenario, measured in system.scenarios.items():
            runs = measured.runs
            for run in _shown(scenario, runs):
                distributions.append((label(system, f"{scenario}, {run}"), run.latencies_ms or (), ()))
            if scenario in ("server", "sweep"):
                loop = "open loop" if scenario == "server" else "closed loop"
                for run in runs:
                    middle = run.ms("p50")
                    if middle is not None:
                        xs, ys = against.setdefault(label(system, loop), ([], []))
                        xs.append(run.throughput_per_s)
                        ys.append(middle)
            if scenario == "offline":
                sizes = [run.batch_size for run in runs]
                batches.append((label(system, "throughput"), sizes, [run.throughput_per_s for run in runs]))
                heads = measured.classes or ()
                latencies = [head.latency_ms for head in heads]
                classes.append((label(system, "latency"), [head.classes for head in heads], latencies))
    drawn = (
        latency_distribution(distributions),
        throughput_against_latency(
            [(name, xs, ys) for name, (xs, ys) in against.items()],
            bound_ms=result.config["latency_bound_ms"],
        ),
        batch_scaling(batches),
        class_scaling(classes),
    )
    return [plot for plot in drawn if plot is not None]


def stage_rows(system: SystemResult) -> list[tuple[str, ...]]:
    """Where the time of a request went, means in milliseconds, for every run that knows."""
    found = []
    for scenario, run in system.runs():
        stages = stages_ms(run)
        if stages:
            texts = ["–" if stages.get(stage) is None else f"{stages[stage]:.3g}" for stage in _STAGES]
            size = run.mean_batch_size
            found.append((f"{scenario}, {run}", *texts, "–" if size is None else f"{size:.2g}"))
    return found


def stages_ms(run: Run) -> dict[str, float]:
    """Decode, queue, transfer and compute of a run: Triton's account, or this process's."""
    if run.stages is not None:
        return {"decode": run.stages.decode_ms_per_batch, "compute": run.stages.compute_ms_per_batch}
    served = run.triton or {}
    steps = {name.rpartition("_")[2]: entry for name, entry in served.items() if "total_ms" in entry}
    if not {"preprocess", "classifier"} <= set(steps):
        return {}
    decoder, classifier = steps["preprocess"], steps["classifier"]
    return {
        "decode": decoder["compute_infer_ms"],
        "queue": decoder["queue_ms"] + classifier["queue_ms"],
        "transfer": sum(
            entry[f"compute_{part}_ms"] for entry in (decoder, classifier) for part in ("input", "output")
        ),
        "compute": classifier["compute_infer_ms"],
    }


def _shown(scenario: str, runs: Sequence[Run]) -> Sequence[Run]:
    """Choose runs whose distribution is drawn: all of single-stream; of a search, the best rate that held."""
    if scenario == "single-stream":
        return runs
    if scenario != "server":
        return []
    held = [run for run in runs if run.held]
    return [max(held, key=lambda run: run.target_rate_per_s or 0.0)] if held else runs[:3]


def _headline(system: SystemResult) -> str:
    server = system.scenarios.get("server")
    search = None if server is None else server.search
    if search is not None and search.held_per_s is not None:
        return (
            f"{search.held_per_s:.3g} answers per second, p{search.percentile:g} within "
            f"{search.latency_bound_ms:g} ms"
        )
    runs = [run for _, run in system.runs()]
    for run in runs:
        if (middle := run.ms("p50")) is not None:
            return f"Half of the answers within {middle:.3g} ms"
    best = max((run.throughput_per_s for run in runs), default=None)
    return "Nothing was measured" if best is None else f"{best:.3g} answers per second"


def _cards(system: SystemResult) -> list[tuple[str, str]]:
    cards = [("measured", system.name), ("how good its answers are", str(system.quality))]
    for scenario, measured in system.scenarios.items():
        if scenario == "single-stream" and (middle := measured.runs[0].ms("p50")) is not None:
            cards.append(("one at a time, median", f"{middle:.3g} ms"))
        if scenario == "offline":
            best = max(measured.runs, key=lambda run: run.throughput_per_s)
            cards.append((f"offline, batches of {best.batch_size}", f"{best.throughput_per_s:.3g} images/s"))
    return cards
