"""`cbpt-runtime sign`: a bundle or a model repository signed, so that others can tell whose it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cbpt_runtime.cli.options import JsonOption
from cbpt_runtime.cli.output import print_json, print_pairs


def command(
    path: Annotated[Path, typer.Argument(help="Bundle or model repository.")],
    key: Annotated[Path, typer.Option(help="Private key: PEM, P-256, P-384 or P-521, not encrypted.")],
    certificate: Annotated[
        Path | None, typer.Option(help="The key's certificate, and any above it after it (PEM).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a signature that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Sign a bundle or a model repository by the OpenSSF Model Signing specification, offline."""
    from cbpt_runtime.trust import sign_artefact

    signed = sign_artefact(path, key=key, certificate=certificate, force=force)
    pairs = {signed.kind: str(signed.path), "digest": signed.digest, "signature": str(signed.signature)}
    if as_json:
        print_json(pairs)
    else:
        print_pairs(pairs)
