"""One tritonserver process and everything it starts: no child outlives it, and it does not outlive us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from cbpt_runtime.serving.triton.command import Command
from cbpt_runtime.serving.triton.leftovers import SHARED_MEMORY
from cbpt_runtime.serving.triton.log import ServerLog

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
    """An exit code in words."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _signal_group(group: int, number: int) -> bool:
    """Signal a process group; whether there was one."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
