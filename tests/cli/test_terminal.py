"""The live display, on a real pseudo-terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

PROGRAM = """
from cbpt_runtime.cli.output import shown_progress
with shown_progress() as progress:
    for step in range(1, 4):
        progress("tuning [x]", step, 3, {"loss": 0.5})
"""


def on_a_terminal(**environment: str) -> str:
    reader, writer = pty.openpty()
    command = [sys.executable, "-c", PROGRAM]
    child = subprocess.Popen(
        command, stdin=writer, stdout=writer, stderr=writer, env=os.environ | environment
    )
    os.close(writer)
    written = b""
    while True:
        try:
            data = os.read(reader, 4096)
        except OSError:  # Linux says EIO where the other end is closed
            break
        if not data:
            break
        written += data
    os.close(reader)
    assert child.wait() == 0, written.decode()
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
