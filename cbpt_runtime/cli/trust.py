"""`--trust` and `--digest`: what a bundle or a model repository has to show before a verb uses it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cbpt_runtime.trust import Trust

TrustOption = Annotated[
    Path | None,
    typer.Option(
        "--trust",
        metavar="FILE",
        help="Public key or certificate (PEM), or Sigstore identity (JSON), that it must be signed with.",
    ),
]
DigestOption = Annotated[
    list[str] | None,
    typer.Option("--digest", metavar="sha256:HEX", help="Digest it must have; of several, one of them."),
]


def given_trust(trust: Path | None, digests: list[str] | None) -> Trust:
    """What both options ask for.

    Raises:
        ConfigError: A digest is none.
    """
    from cbpt_runtime.trust import make_trust

    return make_trust(trust, digests or ())
