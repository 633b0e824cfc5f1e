"""`cbpt-runtime evaluate`: clean accuracy, attack success and alarm of whatever classifies."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cbpt_runtime.cli.options import (
    DigestOption,
    ForcePageOption,
    ImageSizeOption,
    ReportOption,
    SecondLookOption,
    SkipUnreadableOption,
    TrustOption,
    given_trust,
    reserved_page,
    save_page,
)
from cbpt_runtime.cli.output import (
    print_json,
    print_note,
    print_pairs,
    print_table,
    print_text,
    shown_progress,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cbpt_runtime.evaluation import Decision, Evaluation
    from cbpt_runtime.redteam.triggers import Trigger

_ALONE = "not measured: what was exported has the purified head alone"
_LABELS = {
    "clean_accuracy": "CA  clean accuracy",
    "attack_success_rate": "ASR attack success, true class is not the target",
    "attack_success_rate_inclusive": "ASR inclusive, over all triggered images",
    "floor": "    floor: clean non-target images called the target",
    "poisoned_accuracy": "PA  triggered images given their true class",
    "target_recall": "    recall of the target class on clean images",
}


class Format(enum.StrEnum):
    """How results are printed."""

    TEXT = "text"
    JSON = "json"
    MARKDOWN = "markdown"
    CSV = "csv"


def command(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE…",
            help="Bundles, ONNX files, model repositories, URLs of servers, and checkpoints to compare with.",
        ),
    ],
    images: Annotated[Path, typer.Option(help="Clean labelled images, one folder per class.")],
    triggered: Annotated[
        Path | None, typer.Option(help="Triggered images, same layout: folder = true class; needs --target.")
    ] = None,
    attack: Annotated[
        str | None,
        typer.Option(
            help="Attack to put on --images (see `attack list`), or its trigger file; with --target."
        ),
    ] = None,
    target: Annotated[str | None, typer.Option(help="Target class of the attack.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Parameter of the attack.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what a trigger draws for each image.")] = 0,
    classes: Annotated[
        Path | None, typer.Option(help="Class list of checkpoints; that of the first bundle otherwise.")
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="Prompt of checkpoints, {} is the class; repeatable.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Architecture of checkpoints that do not say; or served model, of several."),
    ] = None,
    image_size: ImageSizeOption = None,
    device: Annotated[str, typer.Option(help="Of bundles and checkpoints: auto, cpu or cuda.")] = "auto",
    provider: Annotated[
        Literal["cpu", "cuda", "tensorrt"], typer.Option(help="Of ONNX files and repositories.")
    ] = "cpu",
    detector: Annotated[
        Literal["bdetclip"] | None,
        typer.Option(help="A test-time detector for the checkpoints, to compare the alarm of bundles with."),
    ] = None,
    skip_unreadable: SkipUnreadableOption = False,
    second_look: SecondLookOption = False,
    trust: TrustOption = None,
    digest: DigestOption = None,
    report: ReportOption = None,
    force: ForcePageOption = False,
    output_format: Annotated[
        Format, typer.Option("--format", help="How to print the results.", show_default=True)
    ] = Format.TEXT,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Measure classifiers on a labelled folder, and on triggered images: as purified, exported or served."""
    from cbpt_runtime.evaluation import evaluate_all
    from cbpt_runtime.models.class_lists import read_class_list

    with reserved_page(report, force=force):
        with shown_progress() as progress:
            evaluations = evaluate_all(
                sources,
                images,
                triggered,
                target,
                attack=_trigger(attack, settings),
                seed=seed,
                classes=None if classes is None else read_class_list(classes, templates=template),
                model=model,
                image_size=image_size,
                device=device,
                provider=provider,
                detector=detector,
                skip_unreadable=skip_unreadable,
                trust=given_trust(trust, digest),
                second_look=second_look,
                progress=progress,
            )
        for note in dict.fromkeys(note for evaluation in evaluations for note in evaluation.notes):
            print_note(f"note: {note}")
        _print(evaluations, Format.JSON if as_json else output_format)
        for evaluation in evaluations:
            if evaluation.digest is not None:
                print_note(f"digest of {evaluation.source}: {evaluation.digest}")
        if report is not None:
            from cbpt_runtime.report import render_evaluation

            save_page(report, render_evaluation(evaluations), force=force)


def print_evaluation(evaluation: Evaluation) -> None:
    """Print the heads of one evaluation side by side."""
    from cbpt_runtime.evaluation.tables import alarm_texts, heads, rate_text

    sides = heads(evaluation)
    rows = []
    for name, label in _LABELS.items():
        rates = [getattr(rates, name) for _, rates, _ in sides]
        if all(rate is not None for rate in rates):
            rows.append((label, *map(rate_text, rates), rates[-1].total))
    columns = ("rate, with 95 % confidence interval", *(head for head, _, _ in sides), "images")
    print_table(columns, rows)
    facts: dict[str, object] = {}
    if evaluation.before is None:
        facts |= {"before": _ALONE}
    if evaluation.kind != "checkpoint":
        facts |= {"verdict": evaluation.verdict, "suspects": evaluation.suspects}
    if evaluation.target is not None:
        facts["target"] = evaluation.target
    if evaluation.alarm is not None:
        auroc, false_alarms = alarm_texts(evaluation)
        detector = "the alarm" if evaluation.detector == "alarm" else evaluation.detector
        facts |= {f"AUROC of {detector}, triggered against clean": auroc}
        facts |= {f"false alarms where {detector} detects 95 %": false_alarms}
    if evaluation.decision is not None:
        facts |= _decided(evaluation.decision)
    if facts:
        print_pairs(facts)


def _decided(decision: Decision) -> dict[str, object]:
    from cbpt_runtime.evaluation.tables import rate_text

    facts: dict[str, object] = {"suspicious: alarm above": f"{decision.threshold:.4g}"}
    facts["    clean images called suspicious"] = rate_text(decision.false_alarm_rate)
    if decision.detection_rate is not None:
        facts["    triggered images called suspicious"] = rate_text(decision.detection_rate)
    return facts


def _print(evaluations: Sequence[Evaluation], output_format: Format) -> None:
    from cbpt_runtime.evaluation import tables

    match output_format:
        case Format.JSON:
            found = [evaluation.to_dict() for evaluation in evaluations]
            print_json(found[0] if len(found) == 1 else {"evaluations": found})
        case Format.MARKDOWN:
            print_text(tables.markdown(evaluations))
        case Format.CSV:
            print_text(tables.comma_separated(evaluations))
        case Format.TEXT if len(evaluations) == 1:
            print_evaluation(evaluations[0])
        case Format.TEXT:
            columns, rows = tables.table_rows(evaluations)
            print_table(columns, rows)
            for name, evaluation in zip(tables.short_names(evaluations), evaluations, strict=True):
                if evaluation.before is None:
                    print_note(f"before, {name}: {_ALONE}")
            print_note(
                "CA clean accuracy; ASR triggered images of other classes called the target; PA given their"
            )
            print_note(
                "PA: triggered images given their true class. Floor: clean images of other classes called it."
            )


def _trigger(attack: str | None, settings: list[str] | None) -> Trigger | None:
    from cbpt_runtime.cli.options import named_trigger
    from cbpt_runtime.errors import ConfigError

    if attack is not None:
        return named_trigger(attack, settings)
    if settings:
        raise ConfigError(expected="--set with --attack", got="--set alone", fix="Name the attack.")
    return None
