"""What breaks is started again, however often; what does not start is given up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cbpt_runtime.errors import RepositoryError, ServingError
from cbpt_runtime.serving.config import ServeConfig
from cbpt_runtime.serving.triton import launcher
from cbpt_runtime.serving.triton.launcher import RunningServer


@dataclass
class Server:
    """A stand-in for a tritonserver that lives for a while."""

    lives_s: float
    pid: int = -1
    started: float = field(default_factory=time.monotonic)
    log: Any = field(
        default_factory=lambda: SimpleNamespace(close=print, cause=lambda: None, tail=lambda n: [])
    )

    @property
    def exit_code(self) -> int | None:
        return -11 if time.monotonic() - self.started > self.lives_s else None

    def kill(self) -> None: ...

    def stop(self, drain_timeout_s: float) -> None: ...


def unchanged() -> None:
    """What a repository is that was hashed again."""


Start = Callable[..., tuple[RunningServer, list[str], list[Any]]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Start:
    """`start(lives)`: servers that live for so many seconds each; None does not start."""

    def make(lives: list[float | None]) -> tuple[RunningServer, list[str], list[Any]]:
        remaining, told, led = list(lives), [], []

        def start_server(*_: Any) -> Any:
            lives_s = remaining.pop(0) if remaining else 1000.0
            if lives_s is None:
                raise ServingError(expected="a start", got="no memory", fix="None.")
            return SimpleNamespace(process=Server(lives_s), stubs=frozenset())

        monkeypatch.setattr(launcher, "start_server", start_server)
        monkeypatch.setattr(launcher, "_POLL_S", 0.01)
        monkeypatch.setattr(launcher, "FIRST_PAUSE_S", 0.001)
        monkeypatch.setattr(launcher, "require_unchanged", lambda repository: repository())
        plan: Any = SimpleNamespace(config=ServeConfig(), repository=unchanged)
        guard: Any = SimpleNamespace(lead_to=led.append)
        server = RunningServer(plan, guard, tmp_path, told.append)
        server.start()
        return server, told, led

    return make


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_server_that_breaks_ten_times_is_started_ten_times_with_growing_pauses(start: Start) -> None:
    server, told, led = start([0.0] * 10)
    wait_for(lambda: server.restarts == 10)
    server.require_running()
    server.stop()
    assert led == [None] * 10
    begun = [text for text in told if "starting the server again" in text]
    assert begun[0] == "tritonserver ended (killed by SIGSEGV); starting the server again"
    assert begun[1].endswith("again in 0.001 s")
    assert begun[5].endswith("again in 0.016 s")


def test_a_server_that_does_not_start_five_times_in_a_row_is_given_up(start: Start) -> None:
    server, _, _ = start([0.0, None, None, None, 0.0, None, None, None, None, None])
    wait_for(lambda: server._error is not None)
    with pytest.raises(ServingError, match=r"it did not start \(no memory\), 5 times in a row"):
        server.require_running()
    server.stop()
    assert server.restarts == 9


def test_files_that_changed_since_the_first_start_are_never_served(start: Start) -> None:
    server, _, led = start([0.2])

    def changed() -> None:
        raise RepositoryError(expected="the files", got="model.py was changed", fix="Look.")

    server.plan.repository = changed  # type: ignore[misc, assignment]
    wait_for(lambda: server._error is not None)
    with pytest.raises(RepositoryError, match=r"model\.py was changed"):
        server.require_running()
    server.stop()
    assert led == [None]


def test_pauses_end_somewhere_and_old_breaks_are_forgotten(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _, _ = start([])
    monkeypatch.setattr(launcher, "FIRST_PAUSE_S", 0.5)
    now = time.monotonic()
    for number, expected in ((0, 0.0), (1, 0.5), (2, 1.0), (6, 16.0), (7, 30.0), (16, 30.0)):
        server._recent.clear()
        server._recent.extend([now] * number)
        assert server._pause_s() == expected
    monkeypatch.setattr(launcher, "RESTART_WINDOW_S", -1.0)
    assert server._pause_s() == 0.0
    server.stop()


def test_a_pause_ends_when_the_server_is_no_longer_wanted(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, told, _ = start([0.3, 0.3])
    monkeypatch.setattr(launcher, "FIRST_PAUSE_S", 30.0)
    wait_for(lambda: any("in 30 s" in text for text in told))
    begin = time.monotonic()
    server.stop()
    assert time.monotonic() - begin < 5
    server.require_running()
