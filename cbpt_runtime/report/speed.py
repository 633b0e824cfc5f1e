"""The folder of a bench run: its numbers, its plots, and a page of how fast, how sure and how good."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cbpt_runtime.artifacts import Kind, marked, new_folder
from cbpt_runtime.artifacts.names import json_text, readable
from cbpt_runtime.bench.records import COLUMNS, BenchResult, Run, SystemResult
from cbpt_runtime.bench.results import RESULT
from cbpt_runtime.report import speed_charts
from cbpt_runtime.report.figures import data_uri
from cbpt_runtime.report.pages import render_page
from cbpt_runtime.report.speed_charts import Plot, Series

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
        for plot in draw_plots(result):
            (staging / f"{plot.name}.svg").write_bytes(plot.svg)
            (staging / f"{plot.name}.png").write_bytes(plot.png)
        (staging / "report.html").write_text(readable(render_bench(result)), encoding="utf-8")


def render_bench(result: BenchResult) -> str:
    """The text of a run's ``report.html``: one self-contained page."""
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
        plots=[(plot, data_uri("image/svg+xml", plot.svg)) for plot in draw_plots(result)],
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
        speed_charts.latency_distribution(distributions),
        speed_charts.throughput_against_latency(
            [(name, xs, ys) for name, (xs, ys) in against.items()],
            bound_ms=result.config["latency_bound_ms"],
        ),
        speed_charts.batch_scaling(batches),
        speed_charts.class_scaling(classes),
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
    """Runs whose distribution is drawn: all of single-stream; of a search, the best rate that held."""
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
