"""The log of a running server: drained always, its tail kept, its cause of failure found."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO

TAIL_LINES = 200
# What Triton writes when something is really wrong, most telling first; the group is the cause.
_CAUSES = tuple(
    re.compile(pattern)
    for pattern in (
        r"(error while loading shared libraries: .*)",
        r"(?:failed to load '[^']*' version \d+: )(.*?)\"?$",
        r"((?:unrecognized|unknown) option.*)",
        r"(.*[Nn]o space left on device.*)",
        r"(.*[Aa]ddress already in use.*)",
        r"(failed to (?:start|load|initialize|create)\b.*)",
        r"^E\d+ [\d:.]+ \d+ \S+\] \"?(.*?)\"?$",
        r"^error: (.*)",
    )
)
_IDLE = re.compile(r"I\d{4} |\+-|\|")  # information, and the tables Triton draws
# Written with the letter E on every machine without a GPU; nothing is wrong.
_HARMLESS = ("CudaDriverHelper", "unable to create stream", "NVML", "DCGM", "pinned system memory")


class ServerLog:
    """Reads what a server writes until it ends, in a thread of its own, so that the server never waits.

    A log file that cannot be written (a full disk) is given up; the server and the tail go on.

    Args:
        stream: The server's output.
        file: Where all of it goes too.
        tell: Called with each error or warning the server writes once `listen` was called.
    """

    def __init__(self, stream: IO[bytes], file: Path | None, tell: Callable[[str], None]) -> None:
        self.lost_lines = 0
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._tell = tell
        self._listening = False
        self._file = file.open("ab", buffering=0) if file is not None else None
        self._thread = threading.Thread(target=self._drain, args=(stream,), name="triton-log", daemon=True)
        self._thread.start()

    def listen(self) -> None:
        """From now on pass errors and warnings on."""
        self._listening = True

    def tail(self, lines: int = 20) -> list[str]:
        """The last lines that are more than information and decoration; of all where there are none."""
        told = [line for line in self._tail if line.strip() and not _IDLE.match(line)]
        return (told or list(self._tail))[-lines:]

    def cause(self) -> str | None:
        """The line that says why the server failed, if one does."""
        lines = [line for line in self._tail if not any(word in line for word in _HARMLESS)]
        for pattern in _CAUSES:
            for line in reversed(lines):
                found = pattern.search(line)
                if found:
                    return " ".join(found[1].split())
        return None

    def close(self, timeout_s: float = 5.0) -> None:
        """Wait for the last lines; the server has ended."""
        self._thread.join(timeout_s)
        if self._file is not None:
            self._file.close()
            self._file = None

    def _drain(self, stream: IO[bytes]) -> None:
        with stream:
            for raw in stream:
                line = raw.decode("utf-8", "replace").rstrip()
                self._tail.append(line)
                self._write(raw)
                if self._listening and re.match(r"[EW]\d{4} ", line):
                    self._tell(line)

    def _write(self, raw: bytes) -> None:
        if self._file is None:
            return
        try:
            self._file.write(raw)
        except (OSError, ValueError) as error:
            if not self.lost_lines:
                self._tell(f"the log file cannot be written ({error}); serving goes on without it")
            self.lost_lines += 1
