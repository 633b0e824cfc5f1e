"""`cbpt-runtime demo`: the whole story on a tiny CLIP, from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cbpt_runtime.cli.output import print_json
from cbpt_runtime.cli.progress import shown_progress


def command(
    output: Annotated[Path, typer.Option(help="Folder to make.")] = Path("demo-output"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random choice.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Draw images, train a backdoored CLIP, prove the backdoor, purify it, show before and after."""
    from cbpt_runtime.demo import run_demo

    with shown_progress() as progress:
        result = run_demo(output, seed=seed, progress=progress)
    if as_json:
        print_json(result.to_dict())
    else:
        raise NotImplementedError
