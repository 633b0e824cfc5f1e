"""Options that several verbs have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ImageSizeOption = Annotated[
    int | None,
    typer.Option(min=1, help="Side of the input in pixels, if to be another: resizes positions."),
]
SkipUnreadableOption = Annotated[
    bool, typer.Option("--skip-unreadable", help="Do without images that cannot be read; they are named.")
]
ModelOption = Annotated[
    str | None, typer.Option(help="open_clip architecture or config file, where the checkpoint has none.")
]
TemplateOption = Annotated[
    list[str] | None,
    typer.Option(help="Prompt template, {} is the name; repeatable. Default: 80 ImageNet templates."),
]
SecondLookOption = Annotated[
    bool,
    typer.Option(
        "--second-look",
        help="Look again at suspicious images, under occlusions; bundles, ONNX files and repositories.",
    ),
]
ReferenceOption = Annotated[
    str | None,
    typer.Option(help="Trusted checkpoint with the same preprocessing: what both do is no backdoor."),
]
SeedOption = Annotated[int | None, typer.Option(min=0, help="Seed of every random choice. Default: 0.")]
DeviceOption = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")]
ReportOption = Annotated[Path | None, typer.Option(help="Also write a self-contained HTML page.")]
ForcePageOption = Annotated[bool, typer.Option("--force", help="Replace the page at --report.")]
