"""`cbpt-runtime inspect`: what a checkpoint or a bundle is, without running anything from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
