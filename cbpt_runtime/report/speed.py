"""The page of a bench run: how fast, how sure, and how good the answers are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cbpt_runtime.bench import tables
from cbpt_runtime.report import speed_charts
from cbpt_runtime.report.figures import data_uri
from cbpt_runtime.report.pages import _page
from cbpt_runtime.report.speed_charts import Plot, Series

_STAGES = ("decode", "queue", "transfer", "compute")


def render_bench(result: dict[str, Any]) -> str:
    """The text of a run's ``report.html``: one self-contained page.

    Args:
        result: What `cbpt_runtime.bench.run.bench` found.
    """
    plots = [(plot, data_uri("image/svg+xml", plot.svg)) for plot in draw_plots(result)]
    return _page(
        "speed.html.jinja",
        result=result,
        headline=_headline(result["targets"][0]),
        cards=_cards(result["targets"][0]),
        columns=tables.COLUMNS,
        targets=[
            {
                "name": target["name"],
                "facts": {key: value for key, value in target["facts"].items() if value is not None},
                "quality": tables.quality(target),
                "where": target["quality"]["stated"].get("where"),
                "rows": tables.rows(target),
                "notes": list(tables.notes(target)),
                "stages": stage_rows(target),
                "peer": target.get("perf_analyzer", []),
            }
            for target in result["targets"]
        ],
        stage_columns=("run", *(f"{stage} ms" for stage in _STAGES), "mean batch"),
        plots=plots,
    )


def draw_plots(result: dict[str, Any]) -> list[Plot]:
    """Every plot the run has numbers for."""
    targets = result["targets"]
    many = len(targets) > 1

    def label(target: dict[str, Any], words: str) -> str:
        return f"{target['name']}, {words}" if many else words

    distributions: list[Series] = []
    against: dict[str, tuple[list[float], list[float]]] = {}
    batches: list[Series] = []
    classes: list[Series] = []
    for target in targets:
        for scenario, measured in target["scenarios"].items():
            runs = measured["runs"]
            for run in _shown(scenario, runs):
                words = f"{scenario}, {tables.describe(run)}"
                distributions.append((label(target, words), run["latencies_ms"], ()))
            if scenario in ("server", "sweep"):
                loop = "open loop" if scenario == "server" else "closed loop"
                for run in runs:
                    middle = run["latency_ms"].get("p50")
                    if middle is not None:
                        xs, ys = against.setdefault(label(target, loop), ([], []))
                        xs.append(run["throughput_per_s"])
                        ys.append(middle)
            if scenario == "offline":
                sizes = [run["batch_size"] for run in runs]
                batches.append(
                    (label(target, "throughput"), sizes, [run["throughput_per_s"] for run in runs])
                )
                counted = measured.get("classes", [])
                latencies = [entry["latency_ms"] for entry in counted]
                classes.append((label(target, "latency"), [entry["classes"] for entry in counted], latencies))
    drawn = (
        speed_charts.latency_distribution(distributions),
        speed_charts.throughput_against_latency(
            [(name, xs, ys) for name, (xs, ys) in against.items()],
            bound_ms=result["config"]["latency_bound_ms"],
        ),
        speed_charts.batch_scaling(batches),
        speed_charts.class_scaling(classes),
    )
    return [plot for plot in drawn if plot is not None]


def stage_rows(target: dict[str, Any]) -> list[tuple[str, ...]]:
    """Where the time of a request went, means in milliseconds, for every run that knows."""
    found = []
    for scenario, measured in target["scenarios"].items():
        for run in measured["runs"]:
            stages = stages_ms(run)
            if stages:
                texts = ["–" if stages.get(stage) is None else f"{stages[stage]:.3g}" for stage in _STAGES]
                size = stages.get("mean_batch_size")
                found.append(
                    (f"{scenario}, {tables.describe(run)}", *texts, "–" if size is None else f"{size:.2g}")
                )
    return found


def stages_ms(run: dict[str, Any]) -> dict[str, float | None]:
    """Decode, queue, transfer and compute of a run: Triton's account, or our engine's."""
    here = run.get("stages")
    if here:
        return {
            "decode": here["decode_ms_per_batch"],
            "compute": here["compute_ms_per_batch"],
            "mean_batch_size": here["mean_batch_size"],
        }
    served = run.get("triton", {})
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
        "mean_batch_size": classifier["mean_batch_size"],
    }


def _shown(scenario: str, runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs whose distribution is drawn: all of single-stream; of a search, the best rate that held."""
    if scenario == "single-stream":
        return list(runs)
    if scenario != "server":
        return []
    held = [run for run in runs if run.get("held")]
    return [max(held, key=lambda run: float(run["target_rate_per_s"]))] if held else list(runs[:3])


def _headline(target: dict[str, Any]) -> str:
    search = target["scenarios"].get("server", {}).get("search") or {}
    if search.get("held_per_s"):
        return (
            f"{search['held_per_s']:.3g} answers per second, p{search['percentile']:g} within "
            f"{search['latency_bound_ms']:g} ms"
        )
    for measured in target["scenarios"].values():
        for run in measured["runs"]:
            if "p50" in run.get("latency_ms", {}):
                return f"Half of the answers within {run['latency_ms']['p50']:.3g} ms"
    best = [run["throughput_per_s"] for measured in target["scenarios"].values() for run in measured["runs"]]
    return f"{max(best):.3g} answers per second" if best else "Nothing was measured"


def _cards(target: dict[str, Any]) -> list[tuple[str, str]]:
    cards = [("measured", target["name"]), ("how good its answers are", tables.quality(target))]
    for scenario, measured in target["scenarios"].items():
        runs = measured["runs"]
        if scenario == "single-stream" and "p50" in runs[0]["latency_ms"]:
            cards.append(("one at a time, median", f"{runs[0]['latency_ms']['p50']:.3g} ms"))
        if scenario == "offline":
            best = max(runs, key=lambda run: float(run["throughput_per_s"]))
            cards.append(
                (f"offline, batches of {best['batch_size']}", f"{best['throughput_per_s']:.3g} images/s")
            )
    return cards
