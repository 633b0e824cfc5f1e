"""Progress on stderr: a live display on a terminal, a plain line now and then otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from cbpt_runtime.cli.output import print_note
from cbpt_runtime.progress import Progress

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
