"""`cbpt-runtime classify`: labels, probabilities and the alarm for a few images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cbpt_runtime.cli.output import percent, print_json, print_table


def command(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    images: Annotated[list[str], typer.Argument(help="Image files; - reads one image from stdin.")],
    top: Annotated[int, typer.Option(min=1, help="Labels per image.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Classify images with the purified head and show the alarm."""
    from cbpt_runtime.classification import classify_images

    sources = [(image, sys.stdin.buffer.read() if image == "-" else Path(image)) for image in images]
    answers = classify_images(bundle, sources, top=top)
    if as_json:
        print_json({"bundle": str(bundle), "images": [answer.to_dict() for answer in answers]})
        return
    print_table(
        ("image", "label", "probability", "alarm"),
        [
            (
                "" if rank else answer.image,
                label.name,
                percent(label.probability),
                "" if rank else f"{answer.alarm:.3f}",
            )
            for answer in answers
            for rank, label in enumerate(answer.labels)
        ],
    )
