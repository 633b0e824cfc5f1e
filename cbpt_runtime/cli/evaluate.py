"""`cbpt-runtime evaluate`: clean accuracy and attack success of a bundle, before and after."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cbpt_runtime.cli.output import percent, print_json, print_pairs, print_table
from cbpt_runtime.cli.progress import shown_progress

if TYPE_CHECKING:
    from cbpt_runtime.evaluation import Evaluation
    from cbpt_runtime.metrics import Rate

_LABELS = {
    "clean_accuracy": "CA  clean accuracy",
    "attack_success_rate": "ASR attack success, true class is not the target",
    "attack_success_rate_inclusive": "ASR inclusive, over all triggered images",
    "floor": "    floor: clean non-target images called the target",
    "poisoned_accuracy": "PA  triggered images given their true class",
    "target_recall": "    recall of the target class on clean images",
}


def command(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    images: Annotated[Path, typer.Option(help="Clean labelled images, one folder per class.")],
    triggered: Annotated[
        Path | None, typer.Option(help="Triggered images, same layout: folder = true class; needs --target.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Target class of the attack.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure both heads of a bundle on a labelled folder, and on a folder of triggered images."""
    from cbpt_runtime.evaluation import evaluate

    with shown_progress() as progress:
        evaluation = evaluate(bundle, images, triggered, target, progress=progress)
    if as_json:
        print_json(evaluation.to_dict())
    else:
        print_evaluation(evaluation)


def print_evaluation(evaluation: Evaluation) -> None:
    """Print both heads side by side."""
    rows = []
    for name, label in _LABELS.items():
        before, after = getattr(evaluation.before, name), getattr(evaluation.after, name)
        if before is not None and after is not None:
            rows.append((label, _text(before), _text(after), after.total))
    print_table(("rate, with 95 % confidence interval", "before", "after", "images"), rows)
    facts: dict[str, object] = {"verdict": evaluation.verdict, "suspects": evaluation.suspects}
    if evaluation.target is not None:
        facts["target"] = evaluation.target
    if evaluation.alarm_auroc is not None:
        facts["alarm AUROC, triggered against clean"] = f"{evaluation.alarm_auroc:.4f}"
    print_pairs(facts)


def _text(rate: Rate) -> str:
    if rate.rate is None or rate.low is None or rate.high is None:
        return "–"
    return f"{percent(rate.rate)} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
