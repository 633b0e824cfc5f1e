"""Options that several verbs have, and what they mean: `--trust`, `--digest`, `--set`, `--report`, ..."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cbpt_runtime.cli.output import print_note

if TYPE_CHECKING:
    from cbpt_runtime.redteam.triggers import Trigger
    from cbpt_runtime.trust import Trust

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
        help="Look again at suspicious images, under occlusions; a server must be exported with it.",
    ),
]
ReferenceOption = Annotated[
    str | None,
    typer.Option(help="Trusted model that the suspect was fine-tuned from: natural triggers work on both."),
]
SeedOption = Annotated[int | None, typer.Option(min=0, help="Seed of every random choice. Default: 0.")]
DeviceOption = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")]
ClusterOption = Annotated[
    str | None,
    typer.Option(
        envvar="RAY_ADDRESS",
        help="Ray cluster to work on, for example ray://head:10001; this machine without.",
    ),
]
ReportOption = Annotated[Path | None, typer.Option(help="Also write a self-contained HTML page.")]
ForcePageOption = Annotated[bool, typer.Option("--force", help="Replace the page at --report.")]


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
    """Return what both options ask for.

    Raises:
        ConfigError: A digest is none.
    """
    from cbpt_runtime.trust import make_trust

    return make_trust(trust, digests or ())


def named_trigger(attack: str, settings: list[str] | None) -> Trigger:
    """Return a trigger by the name of its attack, or from a file."""
    from cbpt_runtime.errors import ConfigError
    from cbpt_runtime.redteam.attacks import fixed_trigger
    from cbpt_runtime.redteam.triggers import load_trigger

    path = Path(attack)
    if path.suffix != ".safetensors":
        return fixed_trigger(attack, parsed_settings(settings))
    if settings:
        raise ConfigError(
            expected="a trigger file as it is",
            got="--set with a file",
            fix="Leave --set away, or name an attack.",
        )
    return load_trigger(path)


def parsed_settings(settings: list[str] | None) -> dict[str, object]:
    """Parse KEY=VALUE; values are numbers, true, false, none, or text."""
    import json

    from cbpt_runtime.errors import ConfigError

    parsed: dict[str, object] = {}
    for setting in settings or []:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ConfigError(expected="--set KEY=VALUE", got=setting, fix="For example --set size=8.")
        try:
            value: object = json.loads({"none": "null"}.get(text.lower(), text.lower()))
        except ValueError:
            value = text
        parsed[key] = value if isinstance(value, (bool, int, float, type(None))) else text
    return parsed


@contextmanager
def reserved_page(path: Path | None, *, force: bool) -> Iterator[None]:
    """Keep the place of a page while the work for it is done; nothing where no page is asked for.

    Raises:
        OutputError: It is taken, or cannot be written.
    """
    if path is None:
        yield
        return
    from cbpt_runtime.artifacts import reserved
    from cbpt_runtime.report import REPORT_PAGE

    with reserved(path, REPORT_PAGE, force=force):
        yield


def save_page(path: Path, text: str, *, force: bool) -> None:
    """Write a page whole or not at all, and say where on stderr.

    Raises:
        OutputError: It cannot be written.
    """
    from cbpt_runtime.report import write_page

    write_page(path, text, force=force)
    print_note(f"report: {path}")
