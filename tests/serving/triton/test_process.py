"""The process and its log, with a stand-in for tritonserver."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cbpt_runtime.serving.triton.command import Command
from cbpt_runtime.serving.triton.leftovers import SHARED_MEMORY
from cbpt_runtime.serving.triton.process import (
    ServerLog,
    ServerProcess,
    describe_exit,
    group_members,
    group_usage,
)

ORDERLY = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); "


def start(code: str, *, told: list[str] | None = None, log_file: Path | None = None) -> ServerProcess:
    command = Command(arguments=(sys.executable, "-u", "-c", code), region_prefix=f"cbpt_test_{os.getpid()}_")
    tell = (told if told is not None else []).append
    return ServerProcess(command, dict(os.environ), log_file=log_file, tell=tell)


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_orderly_server_is_asked_to_stop_and_its_shared_memory_removed() -> None:
    process = start(ORDERLY + "print('up'); time.sleep(60)")
    wait_for(lambda: process.log.tail() == ["up"])
    region = SHARED_MEMORY / f"{process.region_prefix}left"
    region.touch()
    process.stop(20)
    assert process.exit_code == 0
    assert not region.exists()


def test_a_server_that_will_not_stop_is_killed_with_all_it_started() -> None:
    child = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('child'); time.sleep(60)"
    )
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"subprocess.Popen([sys.executable, '-u', '-c', {child!r}]); time.sleep(60)"
    )
    process = start(code)
    wait_for(lambda: "child" in process.log.tail())
    assert len(group_members(process.pid)) == 2
    assert group_usage(process.pid).memory_bytes > 2**20
    process.stop(0.2)
    assert process.exit_code == -signal.SIGKILL
    assert group_members(process.pid) == ()


def test_it_does_not_outlive_a_launcher_that_is_killed() -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from cbpt_runtime.serving.triton.command import Command
from cbpt_runtime.serving.triton.process import ServerProcess
arguments = (sys.executable, "-c", "import time; time.sleep(60)")
command = Command(arguments=arguments, region_prefix="cbpt_test_none_")
process = ServerProcess(command, {{}}, log_file=None, tell=print)
print(process.pid, flush=True)
time.sleep(60)
"""
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    group = int(launcher.stdout.readline())
    assert group_members(group)
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    wait_for(lambda: group_members(group) == ())


def test_exit_codes_in_words() -> None:
    assert describe_exit(1) == "exit code 1"
    assert describe_exit(-9) == "killed by SIGKILL"


def log_of(text: str, told: list[str], file: Path | None = None) -> ServerLog:
    log = ServerLog(io.BytesIO(text.encode()), file, told.append)
    log.close()
    return log


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (
            "E1121 1:1:1.1 1 lifecycle.cc:642] \"failed to load 'clip' version 1: Internal: no module\"",
            "Internal: no module",
        ),
        ("x: error while loading shared libraries: libb64.so.0: cannot open", "libb64.so.0"),
        ("/bin/tritonserver: unrecognized option '--http-max-input-size=1'", "--http-max-input-size"),
        (
            'E1121 14:47:15.4 1 main.cc:1] "failed to start HTTP service: Unavailable - Socket"',
            "HTTP service",
        ),
        (
            'E1121 1:1:1.1 1 server.cc:241] "CudaDriverHelper has not been initialized."\n'
            'E1121 1:1:1.1 1 tritonserver.cc:1] "something broke"',
            "something broke",
        ),
    ],
)
def test_the_cause_is_found_in_the_log(text: str, cause: str) -> None:
    found = log_of("I1121 fine\n" + text + "\nI1121 more\n", []).cause()
    assert found is not None
    assert cause in found


def test_harmless_errors_are_no_cause() -> None:
    assert log_of('E1121 1:1:1.1 1 server.cc:241] "CudaDriverHelper has not been"\n', []).cause() is None


def test_a_disk_that_is_full_costs_the_log_file_and_nothing_else() -> None:
    told: list[str] = []
    log = log_of("one\ntwo\nthree\n", told, Path("/dev/full"))
    assert log.tail() == ["one", "two", "three"]
    assert log.lost_lines == 3
    assert len(told) == 1
    assert "No space left" in told[0]


def test_errors_are_passed_on_only_once_the_server_is_ready() -> None:
    told: list[str] = []
    early, late = 'E1121 1:1:1.1 1 a.cc:1] "early"', 'E1121 1:1:1.1 1 a.cc:1] "late"'
    process = start(
        f"print({early!r}); import sys; sys.stdin; import time; time.sleep(1.5); print({late!r})", told=told
    )
    wait_for(lambda: early in process.log.tail())
    process.log.listen()
    wait_for(lambda: process.exit_code is not None)
    process.stop(1)
    assert told == [late]


def test_the_whole_log_goes_to_the_file(tmp_path: Path) -> None:
    process = start("print('hello')", log_file=tmp_path / "server.log")
    wait_for(lambda: process.exit_code is not None)
    process.stop(1)
    assert (tmp_path / "server.log").read_text() == "hello\n"
