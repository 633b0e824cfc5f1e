"""`cbpt-runtime classify`: labels, probabilities and the alarm for images, here or over the wire."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cbpt_runtime.artifacts.names import is_folder
from cbpt_runtime.cli.options import (
    DigestOption,
    JsonOption,
    SecondLookOption,
    SkipUnreadableOption,
    TrustOption,
    given_trust,
)
from cbpt_runtime.cli.output import percent, print_json, print_note, print_table

if TYPE_CHECKING:
    from cbpt_runtime.classification import Answer

_MANY = 100  # images from which progress is shown


def command(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[SOURCE] IMAGE...",
            help="Bundle, ONNX file, model repository, URL of a server, or checkpoint (not with --url); then"
            " image files or folders of any depth; - reads one image from stdin.",
        ),
    ],
    url: Annotated[
        str | None, typer.Option(help="Ask a server instead: grpc://HOST:PORT or http://HOST:PORT.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Served model, where a server has several; or architecture of a checkpoint."),
    ] = None,
    classes: Annotated[Path | None, typer.Option(help="Class list of a checkpoint.")] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="Prompt of a checkpoint, {} is the class; repeatable.")
    ] = None,
    timeout_s: Annotated[float, typer.Option(help="For one request to a server, retries included.")] = 30.0,
    skip_unreadable: SkipUnreadableOption = False,
    top: Annotated[int, typer.Option(min=1, help="Labels per image.")] = 5,
    second_look: SecondLookOption = False,
    trust: TrustOption = None,
    digest: DigestOption = None,
    as_json: JsonOption = False,
) -> None:
    """Classify images with the purified head and show the alarm."""
    source, images = (arguments[0], arguments[1:]) if url is None else (url, arguments)
    if not images:
        raise typer.BadParameter("what classifies and at least one image, or --url and at least one image")
    from cbpt_runtime.cli.output import shown_progress
    from cbpt_runtime.loading import open_classifier
    from cbpt_runtime.models.class_lists import read_class_list

    with open_classifier(
        source,
        classes=None if classes is None else read_class_list(classes, templates=template),
        model=model,
        timeout_s=timeout_s,
        trust=given_trust(trust, digest),
        second_look=second_look,
    ) as classifier:
        sources = _sources(images, skip_unreadable)
        with shown_progress() if len(sources) >= _MANY else nullcontext() as progress:
            answers = classifier.classify(sources, top=top, progress=progress)
    for note in classifier.notes:
        print_note(f"note: {note}")
    found: dict[str, str] = {classifier.kind: source}
    if classifier.digest is not None:
        found["digest"] = classifier.digest
        print_note(f"digest: {classifier.digest}")
    if as_json:
        print_json({**found, "images": [answer.to_dict() for answer in answers]})
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
                "" if rank else _alarm(answer),
            )
            for answer in answers
            for rank, label in enumerate(answer.labels)
        ],
    )


def _alarm(answer: Answer) -> str:
    if answer.alarm is None:
        return "–"
    if not answer.suspicious:
        return f"{answer.alarm:.3f}"
    if answer.box is not None:
        return "{:.3f} suspicious; {}, {} to {}, {} covered".format(answer.alarm, *answer.box)
    return f"{answer.alarm:.3f} suspicious" + ("; looked twice" if answer.looked_twice else "")


def _sources(images: Sequence[str], skip_unreadable: bool) -> list[tuple[str, bytes | Path]]:
    """List what is asked: files as they are, the images of folders, and the bytes of one from stdin."""
    sources: list[tuple[str, bytes | Path]] = []
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


def _readable(sources: list[tuple[str, bytes | Path]]) -> list[tuple[str, bytes | Path]]:
    from cbpt_runtime.models.image_files import undecodable, unreadable_error, unreadable_notes

    paths = [source for _, source in sources if isinstance(source, Path)]
    reasons = undecodable(paths)
    for note in unreadable_notes(reasons, None):
        print_note(f"note: {note}")
    if len(reasons) == len(sources):
        raise unreadable_error(reasons, len(sources))
    return [entry for entry in sources if entry[1] not in reasons]
