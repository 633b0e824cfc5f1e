"""`cbpt-runtime convert`: a checkpoint of any layout in, an open_clip folder out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cbpt_runtime.artifacts.names import shell_line
from cbpt_runtime.cli.options import ImageSizeOption, JsonOption, ModelOption
from cbpt_runtime.cli.output import print_json, print_pairs


def command(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint, as for purify --checkpoint.")],
    output: Annotated[Path, typer.Option(help="open_clip folder to make.")],
    model: ModelOption = None,
    image_size: ImageSizeOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a converted folder at --output.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint of any layout as an open_clip folder, and say what was found and left out."""
    from cbpt_runtime.models.inspection import convert_checkpoint

    found = convert_checkpoint(checkpoint, output, model=model, image_size=image_size, force=force)
    if as_json:
        print_json(found)
    else:
        print_pairs(found | {"next": shell_line("cbpt-runtime", "inspect", output)})
