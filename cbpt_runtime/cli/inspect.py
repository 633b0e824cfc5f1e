"""`cbpt-runtime inspect`: what a checkpoint or a bundle is, without running anything from it."""

from __future__ import annotations

from typing import Annotated

import typer

from cbpt_runtime.cli.options import ImageSizeOption, JsonOption, ModelOption
from cbpt_runtime.cli.output import print_json, print_pairs
from cbpt_runtime.cli.trust import DigestOption, TrustOption, given_trust


def command(
    path: Annotated[str, typer.Argument(help="Checkpoint (as for purify --checkpoint) or bundle folder.")],
    model: ModelOption = None,
    image_size: ImageSizeOption = None,
    trust: TrustOption = None,
    digest: DigestOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show architecture, size, hashes and oddities of a checkpoint; for a bundle also verify its hashes."""
    from cbpt_runtime.inspection import inspect_path

    found = inspect_path(path, model=model, image_size=image_size, trust=given_trust(trust, digest))
    if as_json:
        print_json(found)
    else:
        print_pairs(found)
