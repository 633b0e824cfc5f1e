"""`cbpt-runtime serve` as an operator runs it: ready lines, signals, exit codes, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cbpt_runtime.serving import Client
from cbpt_runtime.serving.triton.leftovers import SHARED_MEMORY, scratch_root
from cbpt_runtime.serving.triton.process import group_members

PORTS = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.1)
    return condition()


@contextmanager
def started(repository: Path, folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """The command and what it printed when it was ready."""
    output, errors = folder / "out.json", folder / "errors.txt"
    with output.open("w") as out, errors.open("w") as err:
        command = [sys.executable, "-m", "cbpt_runtime", "serve", str(repository), *PORTS, "--json", *options]
        process = subprocess.Popen(command, stdout=out, stderr=err, text=True)
    try:
        is_ready = wait_for(lambda: output.read_text().endswith("}\n") or process.poll() is not None, 200)
        assert is_ready, errors.read_text()
        assert process.poll() is None, errors.read_text()
        yield process, json.loads(output.read_text())
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_ready_serves_and_stops_whole_on_a_signal(
    number: signal.Signals, repository: Path, tmp_path: Path, drawn: Any
) -> None:
    with started(repository, tmp_path) as (process, ready):
        assert ready["ready"] is True
        assert ready["selftest"]["images"] == 4
        assert ready["selftest"]["largest_difference"] <= 1e-3
        for protocol in ("http", "grpc"):
            with Client(ready[protocol]) as client:
                assert client.classify(drawn.files[0]).labels
        group = ready["pid"]
        assert group_members(group)
        process.send_signal(number)
        assert process.wait(60) == 0
        assert group_members(group) == ()
        assert not list(SHARED_MEMORY.glob(f"cbpt_{process.pid}_*"))
    assert "stopping" in (tmp_path / "errors.txt").read_text()


def test_nothing_outlives_a_launcher_that_is_killed(repository: Path, tmp_path: Path) -> None:
    with started(repository, tmp_path) as (process, ready):
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert wait_for(lambda: group_members(ready["pid"]) == (), 60)
        assert not list(SHARED_MEMORY.glob(f"cbpt_{process.pid}_*"))


def test_a_path_that_a_shell_would_read_is_only_a_path(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's python backend puts the paths it is given into `bash -c`; and no proxy leads to it."""
    inside = tmp_path / "inside"
    odd = tmp_path / f"x$(touch pwned)y `touch pwned` 'a\" b;touch pwned\n\té{os.fsdecode(bytes([0xE9]))}"
    (odd / "tmp").mkdir(parents=True)
    inside.mkdir()
    copy = Path(shutil.copytree(repository, odd / "repository"))
    (copy / "lost+found").mkdir()
    monkeypatch.chdir(inside)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("TMPDIR", str(odd / "tmp"))
    with started(copy, tmp_path, "--log-file", str(odd / "log.txt")) as (process, ready):
        assert ready["selftest"]["images"] == 4
        scratch = list(scratch_root().glob(f"cbpt-serve-{process.pid}-*"))
        assert [stat.S_IMODE(folder.stat().st_mode) for folder in scratch] == [0o700]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert not any(folder.exists() for folder in scratch)
    assert list(inside.iterdir()) == []
    assert not list(tmp_path.rglob("pwned"))
    assert (odd / "log.txt").stat().st_size > 0


def test_a_tampered_repository_exits_2_and_names_the_file(repository: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(repository, tmp_path / "repository"))
    with (copy / "shapes" / "labels.txt").open("a") as file:
        file.write("another\n")
    command = [sys.executable, "-m", "cbpt_runtime", "serve", str(copy), *PORTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2
    assert "shapes/labels.txt was changed" in done.stderr
    assert done.stdout == ""


def test_a_server_that_cannot_load_prints_the_cause_and_its_log_and_exits_1(
    changed_copy: Any, tmp_path: Path
) -> None:
    broken = {"shapes_alarm/1/model.py": lambda _: "raise ImportError('no runtime today')\n"}
    copy = changed_copy(tmp_path / "repository", broken)
    command = [sys.executable, "-m", "cbpt_runtime", "serve", str(copy), *PORTS, "--allow-foreign-code"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 1, done.stderr
    assert "note: shapes_alarm/1/model.py is not as this version writes it" in done.stderr
    first, *_ = (line for line in done.stderr.splitlines() if line.startswith("       got"))
    assert "no runtime today" in first
    shown = [line for line in done.stderr.splitlines() if line.startswith("         | ")]
    assert any("no runtime today" in line for line in shown)
    assert done.stdout == ""


@pytest.fixture
def taken_port() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield str(listener.getsockname()[1])


def test_the_command_can_be_printed_instead_while_another_server_has_the_ports(
    repository: Path, tritonserver: Any, taken_port: str
) -> None:
    command = [sys.executable, "-m", "cbpt_runtime", "serve", str(repository), "--print-command", "--json"]
    command += ["--http-port", taken_port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    arguments = json.loads(done.stdout)["command"]
    assert f"--http-port={taken_port}" in arguments
    assert arguments[0] == str(tritonserver.executable)
    assert "--model-control-mode=none" in arguments


def test_a_command_with_a_path_that_a_shell_would_read_is_not_printed(
    repository: Path, tritonserver: Any, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(repository, tmp_path / "x$(touch pwned)y"))
    command = [sys.executable, "-m", "cbpt_runtime", "serve", str(copy), "--print-command"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Triton lets a shell read it" in done.stderr


@pytest.mark.parametrize("flag", ["--http-port", "--ui-port"])
def test_a_taken_port_exits_2_before_anything_is_started(
    flag: str, repository: Path, tritonserver: Any, taken_port: str
) -> None:
    ports = dict(zip(PORTS[::2], PORTS[1::2], strict=True)) | {flag: taken_port}
    options = [word for pair in ports.items() for word in pair]
    command = [sys.executable, "-m", "cbpt_runtime", "serve", str(repository), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2
    assert f"a free port for {flag}" in done.stderr
    assert done.stdout == ""
