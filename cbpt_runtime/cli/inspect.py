"""`cbpt-runtime inspect` and `convert`: what a checkpoint is, and the same as an open_clip folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cbpt_runtime.artifacts.names import shell_line
from cbpt_runtime.cli.options import (
    DigestOption,
    ImageSizeOption,
    JsonOption,
    ModelOption,
    TemplateOption,
    TrustOption,
    given_trust,
)
from cbpt_runtime.cli.output import print_json, print_pairs, print_table


def command(
    path: Annotated[str, typer.Argument(help="Checkpoint (as for purify --checkpoint) or bundle folder.")],
    model: ModelOption = None,
    image_size: ImageSizeOption = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="Class list: what the words in its prompts do in a checkpoint's text tower."),
    ] = None,
    template: TemplateOption = None,
    trust: TrustOption = None,
    digest: DigestOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show architecture, size, hashes and oddities of a checkpoint; for a bundle also verify its hashes."""
    from cbpt_runtime.loading import inspect_path
    from cbpt_runtime.models.prompt_findings import PromptCheck

    found = inspect_path(
        path,
        model=model,
        image_size=image_size,
        classes=classes,
        templates=template or None,
        trust=given_trust(trust, digest),
    )
    if as_json:
        print_json(found)
        return
    prompts = PromptCheck.from_dict(found.pop("prompts", None))
    if prompts is None or prompts.verdict is None:
        print_pairs(found)
    else:
        print_pairs({**found, "prompts": prompts.verdict})
        print_table(prompts.columns, prompts.rows())


def convert(
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
