"""`cbpt-runtime scan`: whether a checkpoint has a backdoor, with any images and no labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cbpt_runtime.cli.options import (
    ClusterOption,
    DeviceOption,
    ForcePageOption,
    ImageSizeOption,
    JsonOption,
    ModelOption,
    ReferenceOption,
    ReportOption,
    SeedOption,
    reserved_page,
    save_page,
)
from cbpt_runtime.cli.output import (
    number,
    percent,
    print_json,
    print_note,
    print_pairs,
    print_table,
    shown_progress,
)

if TYPE_CHECKING:
    from cbpt_runtime.purification.scan import Scan

BACKDOORED = 3
"""Exit code of a scan that found a backdoor."""

_WORDS = 5


def command(
    checkpoint: Annotated[str, typer.Argument(help="Suspect checkpoint, as for purify --checkpoint.")],
    images: Annotated[Path, typer.Option(help="Any images, in folders or not; 64 or more are better.")],
    model: ModelOption = None,
    image_size: ImageSizeOption = None,
    classes: Annotated[
        Path | None, typer.Option(help="Class names to look among first, as for purify; none are needed.")
    ] = None,
    reference: ReferenceOption = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    cluster: ClusterOption = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON file with settings, as for purify; flags given here win.")
    ] = None,
    report: ReportOption = None,
    force: ForcePageOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say whether a CLIP has a backdoor, and for which word: exit code 0 clean, 3 backdoored."""
    from cbpt_runtime.config import read_settings
    from cbpt_runtime.purification.config import PurifyConfig
    from cbpt_runtime.purification.scan import scan

    settings = PurifyConfig.from_dict(read_settings(config, seed=seed))
    with reserved_page(report, force=force):
        with shown_progress() as progress:
            found = scan(
                checkpoint,
                images,
                model=model,
                image_size=image_size,
                classes=classes,
                reference=reference,
                config=settings,
                device=device,
                cluster=cluster,
                progress=progress,
            )
        for note in found.notes:
            print_note(f"note: {note}")
        if as_json:
            print_json(found.to_dict())
        else:
            print_scan(found)
        if report is not None:
            from cbpt_runtime.report import render_scan

            save_page(report, render_scan(found), force=force)
    if found.verdict == "backdoored":
        raise typer.Exit(BACKDOORED)


def print_scan(found: Scan) -> None:
    """Print the suspects, and the verdict."""
    if found.suspects:
        success = ("success", "on the reference")
        print_table(
            ("suspected target", "on the list", "p-value", "score", "trigger family", *success),
            [
                (
                    suspect.name,
                    {True: "yes", False: "no", None: "–"}[suspect.on_list],
                    number(suspect.p_value),
                    number(suspect.score),
                    suspect.family,
                    percent(suspect.success),
                    percent(suspect.reference_success),
                )
                for suspect in found.suspects
            ],
        )
    facts = {"verdict": found.verdict, "p-value": number(found.p_value), "images": found.images}
    if not found.suspects:
        facts["most suspicious words"] = ", ".join(
            f"{concept.word} ({number(concept.p_value)})" for concept in found.evidence.concepts[:_WORDS]
        )
    print_pairs(facts)
