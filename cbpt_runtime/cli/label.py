"""`cbpt-runtime label`: a batch of images into Parquet, on one machine or a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cbpt_runtime.cli.options import (
    ClusterOption,
    DeviceOption,
    DigestOption,
    JsonOption,
    TrustOption,
    given_trust,
)
from cbpt_runtime.cli.output import print_json, print_note, print_pairs, print_table, shown_progress

if TYPE_CHECKING:
    from cbpt_runtime.batch.labelling import Labelled

_CLASSES = 20  # shown; all are in the summary


def command(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder, pattern such as 'photos/**/*.jpg', table (Parquet, CSV, JSONL) or tar shards; here"
            " or at s3://, gs://, hf://."
        ),
    ],
    classifier: Annotated[
        str, typer.Option(help="Bundle, ONNX file, model repository, or URL of a server (grpc://HOST:PORT).")
    ],
    output: Annotated[Path, typer.Option(help="Folder to make, with labels/part-*.parquet.")],
    column: Annotated[
        str | None, typer.Option(help="Of a table: its paths, or its images. Default: the usual names.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Of a table: what the rows are called by.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Labels per image.")] = 5,
    cluster: ClusterOption = None,
    partition: Annotated[int, typer.Option(min=1, help="Images per file of the output.")] = 4096,
    provider: Annotated[
        Literal["cpu", "cuda", "tensorrt"], typer.Option(help="Of ONNX files and repositories.")
    ] = "cpu",
    device: DeviceOption = "auto",
    model: Annotated[str | None, typer.Option(help="Served model, where a server has several.")] = None,
    timeout_s: Annotated[float, typer.Option(help="For one request to a server, retries included.")] = 30.0,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with a run that did not finish: same source and classifier."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier folder of labels.")] = False,
    trust: TrustOption = None,
    digest: DigestOption = None,
    as_json: JsonOption = False,
) -> None:
    """Label images, as many as there are: a row for each, with its error where it cannot be read."""
    from cbpt_runtime.batch.engine import load_daft

    load_daft()  # says what to install before anything else fails
    from cbpt_runtime.batch.labelling import label_images
    from cbpt_runtime.batch.sources import Source
    from cbpt_runtime.batch.workers import Work

    with shown_progress() as progress:
        done = label_images(
            Source(name=source, column=column, key=key),
            output,
            Work(
                classifier=classifier,
                top=top,
                model=model,
                provider=provider,
                device=device,
                timeout_s=timeout_s,
                trust=given_trust(trust, digest),
            ),
            cluster=cluster,
            partition=partition,
            resume=resume,
            force=force,
            progress=progress,
        )
    for note in done.notes:
        print_note(f"note: {note}")
    if as_json:
        print_json(done.to_dict())
    else:
        print_labelled(done)


def print_labelled(done: Labelled) -> None:
    """Print the images of each class, the alarms and the failures."""
    found = done.to_dict()
    rows = list(done.counts.classes.items())
    print_table(("class", "images"), [(name, f"{count:,}") for name, count in rows[:_CLASSES]])
    facts: dict[str, object] = {}
    if len(rows) > _CLASSES:
        facts["more classes"] = len(rows) - _CLASSES
    facts |= {
        "images": done.counts.images,
        f"alarms, at least {found['alarm_threshold']}": done.counts.alarms,
        "suspicious": done.counts.suspicious,
        "could not be read": done.counts.failures,
    }
    if done.images_now < done.counts.images:
        facts["of them labelled now"] = done.images_now
    if found["images_per_second"] is not None:
        facts["images a second"] = f"{found['images_per_second']:.4g}"
    facts["labels"] = str(done.path / "labels")
    facts["page"] = str(done.path / "report.html")
    print_pairs(facts)
