"""One tritonserver process and everything it starts: its output, what it uses, and that none outlives us."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cbpt_runtime.serving.triton.command import Command
from cbpt_runtime.serving.triton.leftovers import SHARED_MEMORY

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
_PROC = Path("/proc")
_GROUP_FIELD = 2  # of /proc/<pid>/stat after the name, which may hold spaces
_STATE_FIELD = 0
# Becomes the server, after asking the kernel for SIGTERM when the thread that started it ends. A program of
# its own and not a preexec_fn, which would run between fork and exec in a process full of other threads.
_EXECUTE = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the launcher ended before its server began")
os.execv(sys.argv[2], sys.argv[2:])
"""
_GROUP_TIMEOUT_S = 10.0
_POLL_S = 0.05


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
        """Return the last lines that are more than information and decoration; of all where none are."""
        told = [line for line in self._tail if line.strip() and not _IDLE.match(line)]
        return (told or list(self._tail))[-lines:]

    def cause(self) -> str | None:
        """Return the line that says why the server failed, if one does."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a process group uses.

    Attributes:
        pids: Its processes that live.
        memory_bytes: Their heaps, stacks and shared-memory regions, the latter counted once. Pages of program
            files are left out: what they cost depends on who else on the machine runs the same libraries.
        descriptors: Their open file descriptors.
    """

    pids: tuple[int, ...]
    memory_bytes: int
    descriptors: int


def group_usage(group: int) -> Usage:
    """Return what the process group of a number uses now; a process that ends meanwhile counts as zero."""
    pids = group_members(group)
    return Usage(
        pids=pids,
        memory_bytes=sum(map(_memory_bytes, pids)),
        descriptors=sum(map(_descriptors, pids)),
    )


def group_members(group: int) -> tuple[int, ...]:
    """Living processes of a process group, zombies left out."""
    found = []
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if fields and int(fields[_GROUP_FIELD]) == group and fields[_STATE_FIELD] not in "ZX":
            found.append(int(entry.name))
    return tuple(sorted(found))


def command_of(pid: int) -> str:
    """Return the command line of a process; empty when it has ended."""
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return ""


def _memory_bytes(pid: int) -> int:
    try:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def _descriptors(pid: int) -> int:
    try:
        return sum(1 for _ in (_PROC / str(pid) / "fd").iterdir())
    except OSError:
        return 0


class ServerProcess:
    """A running tritonserver in a session of its own.

    It gets SIGTERM from the kernel when the thread that started it ends, so start it from one that lasts.
    Its output goes through a pipe: the end of this process cannot block it, and neither can a full disk.

    Args:
        command: What to run.
        environment: Of the process.
        log_file: Where its whole output goes.
        tell: Called with warnings for people.
    """

    def __init__(
        self,
        command: Command,
        environment: Mapping[str, str],
        *,
        log_file: Path | None,
        tell: Callable[[str], None],
    ) -> None:
        self.region_prefix = command.region_prefix
        self._is_buried = False
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-I", "-S", "-c", _EXECUTE, str(os.getpid()), *command.arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            restore_signals=False,  # SIGPIPE stays ignored: it can still stop in order when we are gone
        )
        if self._process.stdout is None:  # asked for above
            raise RuntimeError("no pipe")
        self.log = ServerLog(self._process.stdout, log_file, tell)

    @property
    def pid(self) -> int:
        """Of tritonserver; its process group has the same number."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative when a signal ended it."""
        return self._process.poll()

    def make_private(self) -> None:
        """Close its shared memory, where pictures lie, to other users: Triton makes it readable for all."""
        for region in SHARED_MEMORY.glob(f"{self.region_prefix}*"):
            region.chmod(0o600)

    def stop(self, drain_timeout_s: float) -> None:
        """Let requests finish, stop, and leave no process and no shared memory behind.

        Args:
            drain_timeout_s: After this, and a second of grace, whatever is left is killed.
        """
        try:
            if self.exit_code is None:
                self._process.send_signal(signal.SIGTERM)
                try:
                    self._process.wait(drain_timeout_s + 1)
                except subprocess.TimeoutExpired:
                    self.log.listen()
        finally:
            self.kill()

    def kill(self) -> None:
        """End what is left of the process group at once and remove its shared memory; safe to call again."""
        if self._is_buried:
            return
        deadline = time.monotonic() + _GROUP_TIMEOUT_S
        while _signal_group(self.pid, signal.SIGKILL) and time.monotonic() < deadline:
            self._process.poll()
            time.sleep(_POLL_S)
        self._process.wait(_GROUP_TIMEOUT_S)
        self.log.close()
        for region in SHARED_MEMORY.glob(f"{self.region_prefix}*"):
            region.unlink(missing_ok=True)
        self._is_buried = True  # its number may be another's from now on


def describe_exit(code: int) -> str:
    """Return an exit code in words."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _signal_group(group: int, number: int) -> bool:
    """Signal a process group; whether there was one."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
