"""Evaluations as Markdown for people and CSV for programs: one row per head."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from cbpt_runtime.evaluation.metrics import Estimate, Rate
from cbpt_runtime.evaluation.results import Evaluation, HeadRates

RATES = {
    "clean_accuracy": "CA",
    "attack_success_rate": "ASR",
    "attack_success_rate_inclusive": "ASR inclusive",
    "poisoned_accuracy": "PA",
    "floor": "floor",
    "target_recall": "target recall",
}
ALARMS = {"alarm_auroc": "detection AUROC", "false_alarm_rate": "false alarms at 95 % detection"}


def heads(evaluation: Evaluation) -> list[tuple[str, HeadRates, bool]]:
    """Return the heads of an evaluation: name, rates, and whether the alarm or detector belongs to it."""
    given = evaluation.heads
    if evaluation.kind == "checkpoint":
        name = "zero-shot" if evaluation.detector is None else f"zero-shot, {evaluation.detector}"
        return [(name, rates, True) for rates in given.values()]
    if evaluation.encoder in ("tuned", "prompted") and evaluation.verdict == "unknown":
        return [("after", given["after"], False)]  # what was before is not in the bundle
    rows = [(name, rates, name == "after") for name, rates in given.items()]
    if evaluation.after_head_alone is not None:
        rows.insert(-1, ("after, head alone", evaluation.after_head_alone, False))
    return rows


def table_rows(evaluations: Sequence[Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Column names and one row of texts per head; columns nothing was measured for are left out."""
    names = short_names(evaluations)
    rows = []
    for evaluation, name in zip(evaluations, names, strict=True):
        for head, rates, has_alarm in heads(evaluation):
            cells = [rate_text(getattr(rates, key)) for key in RATES]
            alarm = evaluation.alarm if has_alarm else None
            cells += ["–", "–"] if alarm is None else alarm_texts(evaluation)
            rows.append([name, head, *cells])
    columns = ["model", "head", *RATES.values(), *ALARMS.values()]
    used = [i for i in range(len(columns)) if i < 2 or any(row[i] != "–" for row in rows)]
    return [columns[i] for i in used], [[row[i] for i in used] for row in rows]


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """Return a Markdown table; every number with its 95 % interval."""
    columns, rows = table_rows(evaluations)
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def comma_separated(evaluations: Sequence[Evaluation]) -> str:
    """CSV: fractions in [0, 1], each with the ends of its 95 % interval, its count and its total."""
    parts = ("", "_low", "_high", "_count", "_total")
    columns = ["model", "kind", "digest", "head", "target"]
    columns += [key + part for key in (*RATES, "false_alarm_rate") for part in parts]
    columns += ["alarm_auroc", "alarm_auroc_low", "alarm_auroc_high", "alarm_threshold"]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for evaluation in evaluations:
        for head, rates, has_alarm in heads(evaluation):
            writer.writerow(_csv_row(evaluation, head, rates, has_alarm=has_alarm))
    return out.getvalue()


def _csv_row(evaluation: Evaluation, head: str, rates: HeadRates, *, has_alarm: bool) -> dict[str, object]:
    row: dict[str, object] = {
        "model": evaluation.source,
        "kind": evaluation.kind,
        "digest": evaluation.digest,
        "head": head,
        "target": evaluation.target,
    }
    known = {key: getattr(rates, key) for key in RATES}
    if has_alarm and evaluation.alarm is not None:
        auroc = evaluation.alarm.auroc
        known["false_alarm_rate"] = evaluation.alarm.false_alarm_rate
        row |= {"alarm_auroc": auroc.value, "alarm_auroc_low": auroc.low, "alarm_auroc_high": auroc.high}
        row["alarm_threshold"] = evaluation.alarm.threshold
    for key, rate in known.items():
        if rate is not None:
            row |= {key: rate.rate, key + "_low": rate.low, key + "_high": rate.high}
            row |= {key + "_count": rate.count, key + "_total": rate.total}
    return row


def short_names(evaluations: Sequence[Evaluation]) -> list[str]:
    """Return the last parts of the paths, as many as tell them apart."""
    paths = [evaluation.source.rstrip("/").split("/") for evaluation in evaluations]
    for parts in range(1, max(len(path) for path in paths) + 1):
        names = ["/".join(path[-parts:]) for path in paths]
        if len(set(names)) == len({evaluation.source for evaluation in evaluations}):
            break
    return names


def rate_text(rate: Rate | None) -> str:
    """Return a rate in percent with its interval."""
    if rate is None or rate.rate is None or rate.low is None or rate.high is None:
        return "–"
    return f"{100 * rate.rate:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def alarm_texts(evaluation: Evaluation) -> list[str]:
    """AUROC and false-alarm rate with their intervals."""
    if evaluation.alarm is None:
        return ["–", "–"]
    return [estimate_text(evaluation.alarm.auroc), rate_text(evaluation.alarm.false_alarm_rate)]


def estimate_text(estimate: Estimate) -> str:
    """Return a number in [0, 1] with its interval."""
    return f"{estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"
