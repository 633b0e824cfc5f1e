"""The live display, on a real pseudo-terminal."""

from __future__ import annotations

import os
import pty
import sys

PROGRAM = """
from cbpt_runtime.cli.progress import shown_progress
with shown_progress() as progress:
    for step in range(1, 4):
        progress("tuning [x]", step, 3, {"loss": 0.5})
"""


def on_a_terminal(**environment: str) -> str:
    child, descriptor = pty.fork()
    if child == 0:
        os.environ.update(environment)
        os.execv(sys.executable, [sys.executable, "-c", PROGRAM])
    written = b""
    while True:
        try:
            data = os.read(descriptor, 4096)
        except OSError:
            break
        if not data:
            break
        written += data
    os.close(descriptor)
    _, status = os.waitpid(child, 0)
    assert status == 0, written.decode()
    return written.decode()


def test_the_display_shows_stage_steps_and_values() -> None:
    shown = on_a_terminal(TERM="xterm", COLUMNS="120")
    assert "tuning [x]" in shown
    assert "3/3" in shown
    assert "loss 0.5" in shown


def test_no_color_is_honoured() -> None:
    shown = on_a_terminal(TERM="xterm", COLUMNS="120", NO_COLOR="1")
    assert "\x1b[3" not in shown.replace("\x1b[?", "")
    assert "\x1b[9" not in shown
