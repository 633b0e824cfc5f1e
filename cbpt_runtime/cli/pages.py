"""`--report FILE` of several verbs: a page of its own."""

from __future__ import annotations

from pathlib import Path

from cbpt_runtime.cli.output import print_note
from cbpt_runtime.names import exists, is_folder


def check_page(path: Path, *, force: bool) -> None:
    """Refuse a place that is taken, before any work.

    Raises:
        OutputError: A folder, or a file that may not be replaced.
    """
    from cbpt_runtime.errors import OutputError

    if is_folder(path) or (exists(path) and not force):
        raise OutputError(
            expected="a new file for the report", got=f"{path} exists", fix="Choose another or use --force."
        )


def save_page(path: Path, text: str) -> None:
    """Write a page whole or not at all, and say where on stderr.

    Raises:
        OutputError: It cannot be written.
    """
    from cbpt_runtime.report import write_page

    write_page(path, text)
    print_note(f"report: {path}")
