"""What the command line prints: results on stdout, everything else on stderr, progress among it.

rich decides about colour and width; it honours NO_COLOR, and plain pipes get no control codes.
"""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cbpt_runtime.artifacts.names import json_text, readable
from cbpt_runtime.errors import CbptError
from cbpt_runtime.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 120  # columns where no terminal says how many it has


def printable(text: object) -> str:
    r"""Text from a file made harmless for a terminal: control characters become '?', odd bytes `\xe9`."""
    return "".join(letter if letter.isprintable() else "?" for letter in readable(str(text)))


def stdout() -> Console:
    """Return the console results are printed on."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, PIPE_WIDTH)
    return console


def print_json(value: object) -> None:
    """Print one JSON object."""
    is_unicode = codecs.lookup(sys.stdout.encoding or "utf-8").name.startswith("utf")
    sys.stdout.write(json_text(value, indent=2, ascii_only=not is_unicode) + "\n")


def print_text(text: str) -> None:
    """Print lines made for programs; control characters of a file become '?'."""
    sys.stdout.write("".join("\n" if letter == "\n" else printable(letter) for letter in text))


def print_note(text: str) -> None:
    """Print a line for people on stderr."""
    sys.stderr.write(printable(text) + "\n")


def print_error(error: CbptError) -> None:
    """Print an error on stderr: what was expected, what came, what to do."""
    print_note(f"error: expected {error.expected}")
    print_note(f"       got {error.got}")
    for line in error.fix.splitlines():  # the tail of a log has many
        print_note(f"       {line}")


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None
) -> None:
    """Print a table; the first column is flush left, the others flush right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    stdout().print(table)


def print_pairs(pairs: Mapping[str, Any]) -> None:
    """Print names and values in two columns; a list of texts gets one line per text."""
    width = max(map(len, pairs))
    for name, value in pairs.items():
        lines = [_plain(item) for item in value] if _is_texts(value) else [_plain(value)]
        for number, line in enumerate(lines or ["none"]):
            heading = "" if number else name.replace("_", " ")
            sys.stdout.write(f"{heading:<{width}}  {printable(line)}\n")


def _is_texts(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _plain(value: object) -> str:
    """One line of text for a JSON-able value."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_plain(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return (" × " if all(isinstance(item, int) for item in value) else ", ").join(map(_plain, value))
    if value is None:
        return "unknown"
    return f"{value:,}" if isinstance(value, int) else str(value)


def percent(rate: float | None) -> str:
    """Return a fraction in [0, 1] for people."""
    return "–" if rate is None else f"{100 * rate:.1f} %"


def number(value: object) -> str:
    """Return a score for people, four digits."""
    return f"{value:.4g}" if isinstance(value, (int, float)) else "–"


PLAIN_INTERVAL_S = 10.0


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Progress that is shown on stderr while the block runs."""
    if not sys.stderr.isatty():
        yield plain_progress()
        return
    from rich import progress
    from rich.console import Console

    display = progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[values]}", markup=False),
        console=Console(stderr=True),
    )
    tasks: dict[str, progress.TaskID] = {}

    def report(stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        if stage not in tasks:
            tasks[stage] = display.add_task(stage, total=total, values="")
        display.update(tasks[stage], completed=step, total=total, values=_text(values))

    with display:
        yield report


def plain_progress(interval_s: float = PLAIN_INTERVAL_S) -> Progress:
    """Progress as plain lines: the first and last step of a stage, and one every ``interval_s`` between."""
    started: dict[str, float] = {}
    last = 0.0

    def report(stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        nonlocal last
        now = time.monotonic()
        if stage in started and step < total and now - last < interval_s:
            return
        last = now
        elapsed_s = now - started.setdefault(stage, now)
        left = f"{elapsed_s * (total - step) / step:.0f} s left" if 0 < step < total and elapsed_s else ""
        parts = (f"{stage} {step}/{total}", _text(values), f"{elapsed_s:.0f} s", left)
        print_note("  ".join(part for part in parts if part))

    return report


def _text(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
