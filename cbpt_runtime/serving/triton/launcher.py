"""Serve a model repository: verified, hardened, self-tested, kept up while it is wanted, stopped whole."""

from __future__ import annotations

import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cbpt_runtime.errors import ServingError
from cbpt_runtime.export.manifest import require_unchanged
from cbpt_runtime.serving.config import Endpoint, ServeConfig
from cbpt_runtime.serving.guard.http_guard import Guard
from cbpt_runtime.serving.triton.leftovers import scratch_prefix, scratch_root, sweep
from cbpt_runtime.serving.triton.process import ServerProcess, describe_exit
from cbpt_runtime.serving.triton.startup import (
    Plan,
    ReadyServer,
    SelfTest,
    backend_processes,
    make_plan,
    start_server,
    startup_error,
)
from cbpt_runtime.trust import ANYONE, Trust

MAX_FAILED_STARTS = 5
RESTART_WINDOW_S = 600.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
_POLL_S = 0.25
_BACKEND_GRACE_S = 2.0  # in which a server may replace a process of its backend by itself


class RunningServer:
    """A server that is ready and passed its self-test, and is started again when it breaks.

    Triton 2.51 stays up and "ready" when a process of its python backend dies, and refuses every request from
    then on. So the whole server is started again, on the same ports, when it or one of those processes ends;
    clients meet 503 or a refused connection meanwhile, which are safe to retry. However often it breaks it is
    started again, so that one client who can break it does not end the service: at once the first time within
    `RESTART_WINDOW_S`, then after pauses that grow to `LONGEST_PAUSE_S`. Only when it does not start, and
    pass its self-test, `MAX_FAILED_STARTS` times in a row does it stay down. One thread starts, watches
    and stops the server: the kernel ends it with the thread it was started from.

    Attributes:
        plan: What was decided before it was started.
        restarts: How often it was started again.
    """

    def __init__(self, plan: Plan, guard: Guard, scratch: Path, tell: Callable[[str], None]) -> None:
        self.plan = plan
        self.restarts = 0
        self._guard = guard
        self._scratch = scratch
        self._tell = tell
        self._error: BaseException | None = None
        self._started, self._wanted_down = threading.Event(), threading.Event()
        self._ready: ReadyServer | None = None
        self._recent: deque[float] = deque(maxlen=16)
        self._thread = threading.Thread(target=self._keep, name="triton-keeper")

    @property
    def config(self) -> ServeConfig:
        """The settings, with the ports really used."""
        return self.plan.config

    @property
    def process(self) -> ServerProcess:
        """The tritonserver that runs now."""
        return self._now.process

    @property
    def endpoint(self) -> Endpoint:
        """Where the tritonserver that runs now listens itself, for nobody but the guard."""
        return self._now.endpoint

    @property
    def version(self) -> str:
        """Of Triton, as it says itself."""
        return self._now.version

    @property
    def selftest(self) -> SelfTest:
        """The golden answers through the wire, at the latest start."""
        return self._now.selftest

    def require_running(self) -> None:
        """Raise ServingError, with cause and log, when it broke for good."""
        if self._error is not None:
            raise self._error

    def start(self) -> None:
        """Start it and wait until it is ready.

        Raises:
            ServingError: It did not start or failed its self-test.
        """
        self._thread.start()
        try:
            self._started.wait()
        except BaseException:
            self.stop()
            raise
        if self._error is not None:
            self._thread.join()
            raise self._error

    def stop(self) -> None:
        """Let requests finish and stop it; nothing is left."""
        self._wanted_down.set()
        self._thread.join()

    @property
    def _now(self) -> ReadyServer:
        if self._ready is None:
            raise RuntimeError("the server was not started")
        return self._ready

    def _keep(self) -> None:
        """Start, watch, start again, stop: what the thread does."""
        try:
            self._ready = self._start_one("0")
            self._started.set()
            while not self._wanted_down.wait(_POLL_S):
                broken = self._what_broke()
                if broken is not None:
                    self._start_again(broken)
        except BaseException as error:  # handed to whoever asks: see require_running
            self._error = error
        finally:
            if self._ready is not None:
                self._ready.process.stop(self.config.drain_timeout_s)
            self._started.set()

    def _start_one(self, name: str) -> ReadyServer:
        return start_server(
            self.plan,
            self._guard,
            self._scratch / name,
            self._tell,
            lambda: not self._wanted_down.is_set(),
        )

    def _what_broke(self) -> str | None:
        code = self._now.process.exit_code
        if code is not None:
            return f"tritonserver ended ({describe_exit(code)})"
        end = time.monotonic() + _BACKEND_GRACE_S
        while len(backend_processes(self._now.process)) < len(self._now.stubs):
            if time.monotonic() > end:
                return "a process of Triton's python backend ended"
            time.sleep(_POLL_S)
        return None

    def _start_again(self, broken: str) -> None:
        """Start the server again, several times if need be, or until it is no longer wanted.

        Raises:
            ServingError: It did not start too often in a row.
            RepositoryError: Its files are not those any more that were hashed at the first start.
        """
        broken_process = self._now.process
        self._guard.lead_to(None)
        broken_process.kill()
        for _ in range(MAX_FAILED_STARTS):
            pause_s = self._pause_s()
            later = f" in {pause_s:g} s" if pause_s else ""
            self._tell(f"{broken}; starting the server again{later}")
            if self._wanted_down.wait(pause_s):
                return
            self._recent.append(time.monotonic())
            self.restarts += 1
            require_unchanged(self.plan.repository)
            try:
                self._ready = self._start_one(str(self.restarts))
            except ServingError as error:
                if self._wanted_down.is_set():
                    raise
                broken = f"it did not start ({error.got})"
            else:
                self._tell("the server is ready again, its self-test passed")
                return
        raise startup_error(broken_process, f"{broken}, {MAX_FAILED_STARTS} times in a row")

    def _pause_s(self) -> float:
        """How long to wait before the next start: the more of them lately, the longer."""
        now = time.monotonic()
        lately = sum(now - moment < RESTART_WINDOW_S for moment in self._recent)
        return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (lately - 1)) if lately else 0.0


@contextmanager
def running_server(
    repository: str | Path,
    config: ServeConfig | None = None,
    *,
    trust: Trust = ANYONE,
    tell: Callable[[str], None] | None = None,
) -> Iterator[RunningServer]:
    """Serve a repository while the block runs; the server has passed its self-test when it begins.

    Args:
        repository: What `cbpt-runtime export` wrote.
        config: Settings; loopback and the usual ports when None.
        trust: What the repository has to show.
        tell: Called with warnings for people, from any thread.

    Raises:
        InputError: As `make_plan`.
        ServingError: The server did not start or failed its self-test; the text has the cause and the log.
    """
    plan = make_plan(repository, config or ServeConfig(), trust=trust)
    tell = tell or _silent
    if plan.repository.ignored:
        tell(f"note: ignored, as systems leave them everywhere: {', '.join(plan.repository.ignored)}")
    for name in plan.foreign:
        tell(f"note: {name} is not as this version writes it, and is served all the same")
    sweep()
    with (
        tempfile.TemporaryDirectory(prefix=scratch_prefix(), dir=scratch_root()) as scratch,
        Guard(plan.config, inner_models=plan.repository.inner_models) as guard,
    ):
        server = RunningServer(plan, guard, Path(scratch), tell)
        server.start()
        try:
            yield server
        finally:
            server.stop()


def _silent(text: str) -> None:
    """Warnings nobody wants to see."""
