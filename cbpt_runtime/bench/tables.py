"""What a run found, as rows of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

COLUMNS = ("run", "answers/s", "p50 ms", "p95 ms", "p99 ms", "max ms", "n", "lost", "batch", "client CPU")


def title(target: dict[str, Any]) -> str:
    """The target, and how good it is."""
    facts = target["facts"]
    runs_on = ", ".join(str(facts[key]) for key in ("engine", "provider", "precision") if facts.get(key))
    return f"{target['name']} ({runs_on}): {quality(target)}"


def quality(target: dict[str, Any]) -> str:
    """CA and ASR in words, and who measured them."""
    found, words = target["quality"], []
    for key, short in (("clean_accuracy", "CA"), ("attack_success_rate", "ASR")):
        if found[key] is not None and found[key]["rate"] is not None:
            words.append(f"{short} {100 * found[key]['rate']:.1f} % of {found[key]['total']}")
    stated = found["stated"]
    for key, short in (("clean_accuracy", "CA"), ("attack_success_rate", "ASR")):
        if stated.get(key) is not None and not any(word.startswith(short) for word in words):
            words.append(f"{short} {100 * stated[key]:.1f} % stated")
    return ", ".join(words) or "CA and ASR unknown"


def rows(target: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row per run."""
    return [
        (
            f"{scenario}, {describe(run)}",
            f"{run['throughput_per_s']:.4g}",
            *(_latency(run, key) for key in ("p50", "p95", "p99", "max")),
            str(run.get("latency_ms", {}).get("n", len(run.get("passes_per_s", ())))),
            str(lost(run)),
            _mean_batch(run),
            f"{100 * run['generator']['cpu_share']:.0f} %" if run["generator"]["processes"] else "–",
        )
        for scenario, measured in target["scenarios"].items()
        for run in measured["runs"]
    ]


def describe(run: dict[str, Any]) -> str:
    """What was asked for, in words."""
    if run["loop"] == "open":
        kept = "" if run["kept_up"] else " (fell behind)"
        return f"open loop {run['target_rate_per_s']:.4g}/s{kept}"
    if run["loop"] == "none":
        return f"batch {run['batch_size']}"
    if run["concurrency"] == run["batch_size"] == 1:
        return "one at a time"
    batch = f", batch {run['batch_size']}" if run["batch_size"] > 1 else ""
    return f"closed loop {run['concurrency']} at once{batch}"


def lost(run: dict[str, Any]) -> int:
    """Requests that were not answered, or wrongly."""
    return sum(count for outcome, count in run.get("outcomes", {}).items() if outcome != "answered")


def notes(target: dict[str, Any]) -> Iterator[str]:
    """What a reader must know besides the table."""
    for scenario, measured in target["scenarios"].items():
        search = measured.get("search")
        if search is not None:
            held = search["held_per_s"]
            bound = f"p{search['percentile']:g} within {search['latency_bound_ms']:g} ms"
            yield f"{scenario}: " + (
                f"holds {held:.4g} per second with {bound}"
                + (f"; {search['failed_per_s']:.4g} did not hold" if search["failed_per_s"] else "")
                if held
                else f"no rate held {bound}"
            )
        for run in measured["runs"]:
            if run["generator"]["is_bottleneck"]:
                yield f"{scenario}, {describe(run)}: the client was busy; take more --clients"
            if run["answers"]["wrong"]:
                yield f"{scenario}, {describe(run)}: {run['answers']['wrong']} wrong answers"


def _latency(run: dict[str, Any], key: str) -> str:
    value = run.get("latency_ms", {}).get(key)
    return "–" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _mean_batch(run: dict[str, Any]) -> str:
    size = run.get("stages", {}).get("mean_batch_size")
    for name, entry in run.get("triton", {}).items():
        if name.endswith("_classifier"):
            size = entry["mean_batch_size"]
    return "–" if size is None else f"{size:.2g}"
