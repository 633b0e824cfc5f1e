"""`--report FILE` of several verbs: a page of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cbpt_runtime.cli.output import print_note


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
