"""`cbpt-runtime verify`: hashes, graph, configurations and golden answers of a model repository."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from cbpt_runtime.cli.export import print_parity
from cbpt_runtime.cli.options import DigestOption, JsonOption, TrustOption, given_trust
from cbpt_runtime.cli.output import print_json, print_note, print_pairs


def command(
    repository: Annotated[Path, typer.Argument(help="Model repository.")],
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle it was exported from: runs the parity gate again.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Labelled images for the gate instead of the bundle's own.")
    ] = None,
    provider: Annotated[
        Literal["cpu", "cuda", "tensorrt"] | None,
        typer.Option(help="Where to run. Default: where the repository is meant to be served."),
    ] = None,
    trust: TrustOption = None,
    digest: DigestOption = None,
    allow_foreign_code: Annotated[
        bool,
        typer.Option(
            "--allow-foreign-code", help="Accept code or a graph that this version would not have written."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check a model repository: every hash, the graph, its configurations, the golden answers, parity."""
    from cbpt_runtime.export.verify import verify_repository

    found = verify_repository(
        repository,
        bundle,
        provider=provider,
        images=images,
        trust=given_trust(trust, digest),
        allow_foreign_code=allow_foreign_code,
    )
    for name in found.foreign:
        print_note(f"note: {name} is not as this version writes it")
    if found.golden_note is not None:
        print_note(f"note: {found.golden_note}")
    if found.graph_note is not None:
        print_note(f"note: {found.graph_note}")
    if found.ignored:
        print_note(f"note: ignored, as systems leave them everywhere: {', '.join(found.ignored)}")
    if as_json:
        print_json(asdict(found))
        return
    if found.parity is not None:
        print_parity(found.parity)
    print_pairs(
        {
            "repository": found.repository,
            "digest": found.digest,
            "files": f"{found.files} with the right hash, no others",
            "golden answers": f"{found.golden_images} images on {found.provider}, "
            f"largest difference {found.golden_difference:.2g}",
            "verdict": "intact",
        }
    )
