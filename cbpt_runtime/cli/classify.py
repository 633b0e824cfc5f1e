"""`cbpt-runtime classify`: labels, probabilities and the alarm for a few images, here or over the wire."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cbpt_runtime.artifacts.names import is_folder
from cbpt_runtime.cli.options import JsonOption, SkipUnreadableOption
from cbpt_runtime.cli.output import percent, print_json, print_note, print_table
from cbpt_runtime.cli.trust import DigestOption, TrustOption, given_trust

if TYPE_CHECKING:
    from cbpt_runtime.answers import Answer
    from cbpt_runtime.classification import Source
    from cbpt_runtime.trust import Trust


def command(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[BUNDLE] IMAGE...",
            help="Bundle folder (not with --url), then image files or folders of any depth; - reads one"
            " image from stdin.",
        ),
    ],
    url: Annotated[
        str | None, typer.Option(help="Ask a server instead: grpc://HOST:PORT or http://HOST:PORT.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Served model, where a server has several.")] = None,
    timeout_s: Annotated[float, typer.Option(help="For one request to a server, retries included.")] = 30.0,
    skip_unreadable: SkipUnreadableOption = False,
    top: Annotated[int, typer.Option(min=1, help="Labels per image.")] = 5,
    trust: TrustOption = None,
    digest: DigestOption = None,
    as_json: JsonOption = False,
) -> None:
    """Classify images with the purified head and show the alarm."""
    asked = given_trust(trust, digest)
    if url is not None:
        answers = _ask_server(
            url, arguments, asked, skip_unreadable, model=model, timeout_s=timeout_s, top=top
        )
        source = {"url": url}
    else:
        path, *images = arguments
        found, answers = _ask_bundle(path, images, asked, skip_unreadable, top=top)
        source = {"bundle": path, "digest": found}
        print_note(f"digest: {found}")
    if as_json:
        print_json({**source, "images": [answer.to_dict() for answer in answers]})
        return
    print_answers(answers)


def print_answers(answers: Sequence[Answer]) -> None:
    """Print labels, probabilities and alarms as a table."""
    print_table(
        ("image", "label", "probability", "alarm"),
        [
            (
                "" if rank else answer.image,
                label.name,
                percent(label.probability),
                "" if rank else f"{answer.alarm:.3f}",
            )
            for answer in answers
            for rank, label in enumerate(answer.labels)
        ],
    )


def _ask_bundle(
    path: str, images: Sequence[str], trust: Trust, skip_unreadable: bool, *, top: int
) -> tuple[str, list[Answer]]:
    """The digest of a bundle and its answers."""
    if not images:
        raise typer.BadParameter("a bundle and at least one image, or --url and at least one image")
    from cbpt_runtime.classification import classify_images
    from cbpt_runtime.trust import open_bundle

    bundle = open_bundle(path, trust, verify=False)  # the files used are checked as they are read
    return bundle.digest, classify_images(bundle, _sources(images, skip_unreadable), top=top)


def _ask_server(
    url: str,
    images: Sequence[str],
    trust: Trust,
    skip_unreadable: bool,
    *,
    model: str | None,
    timeout_s: float,
    top: int,
) -> list[Answer]:
    from cbpt_runtime.cli.progress import shown_progress
    from cbpt_runtime.serving import Client
    from cbpt_runtime.trust import refuse_untrusted

    refuse_untrusted(url, trust)
    sources = _sources(images, skip_unreadable)
    with Client(url, model=model, timeout_s=timeout_s) as client:
        if len(sources) < 100:
            return client.classify_files(sources, top=top)
        with shown_progress() as progress:
            return client.classify_files(sources, top=top, progress=progress)


def _sources(images: Sequence[str], skip_unreadable: bool) -> list[Source]:
    """What is asked: files as they are, the images of folders, and the bytes of one from stdin."""
    sources: list[Source] = []
    for image in images:
        if image == "-":
            sources.append((image, sys.stdin.buffer.read()))
        elif is_folder(Path(image)):
            sources += [(str(path), path) for path in _images_below(Path(image))]
        else:
            sources.append((image, Path(image)))
    return _readable(sources) if skip_unreadable else sources


def _images_below(folder: Path) -> Sequence[Path]:
    from cbpt_runtime.errors import ImageDataError
    from cbpt_runtime.models.image_files import left_out_notes, sort_files

    found = sort_files(folder, recursive=True)
    notes = left_out_notes(found.left_out, folder)
    if not found.images:
        raise ImageDataError(
            expected=f"one or more images in {folder} or in the folders below it",
            got="; ".join(("none", *notes)),
            fix="Check the path.",
        )
    for note in notes:
        print_note(f"note: {note}")
    return found.images


def _readable(sources: list[Source]) -> list[Source]:
    from cbpt_runtime.models.image_files import undecodable, unreadable_error, unreadable_notes

    paths = [source for _, source in sources if isinstance(source, Path)]
    reasons = undecodable(paths)
    for note in unreadable_notes(reasons, None):
        print_note(f"note: {note}")
    if len(reasons) == len(sources):
        raise unreadable_error(reasons, len(sources))
    return [entry for entry in sources if entry[1] not in reasons]
