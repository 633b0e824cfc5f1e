"""When things break: nothing is lost, nothing is wrong, nothing stays behind. Sent = answered + refused."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from cbpt_runtime.errors import ConfigError, RepositoryError, ServingError
from cbpt_runtime.serving import Client, RunningServer, ServeConfig, running_server
from cbpt_runtime.serving.triton.leftovers import SHARED_MEMORY
from cbpt_runtime.serving.triton.process import ServerProcess, command_of, group_members
from cbpt_runtime.serving.triton.servers import TritonServer
from cbpt_runtime.serving.triton.startup import make_plan

Serve = Callable[..., AbstractContextManager[RunningServer]]
Load = Callable[..., Coroutine[Any, Any, Counter[str]]]
STUB = "triton_python_backend_stub"


def stubs(server: RunningServer, model: str = "") -> list[int]:
    commands = {pid: command_of(pid) for pid in group_members(server.process.pid)}
    return [pid for pid, command in commands.items() if STUB in command and model in command]


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return condition()


@pytest.mark.parametrize("model", ["shapes_preprocess", "shapes_classifier", "shapes_alarm"])
def test_a_killed_backend_process_loses_no_request_and_comes_back(
    model: str, serve: Serve, drawn: Any, load: Load
) -> None:
    with serve() as server:
        first = server.process

        async def under_load() -> Counter[str]:
            work = asyncio.create_task(load(server.config.grpc_url, drawn, 300, timeout_s=60, retries=100))
            await asyncio.sleep(0.3)
            os.kill(stubs(server, model)[0], signal.SIGKILL)
            return await work

        outcomes = asyncio.run(under_load())
        print(model, dict(outcomes))
        assert outcomes["sent"] == 300 == outcomes["answered"] + outcomes["refused"]
        assert wait_for(lambda: server.process is not first, 120)
        later = asyncio.run(load(server.config.http_url, drawn, 50, timeout_s=60))
        assert later == {"sent": 50, "answered": 50}


def test_clients_outlive_a_server_that_is_killed_and_starts_again(
    serve: Serve, drawn: Any, load: Load
) -> None:
    with serve() as server:
        first = server.process

        async def under_load() -> Counter[str]:
            work = asyncio.create_task(load(server.config.grpc_url, drawn, 300, timeout_s=60, retries=100))
            await asyncio.sleep(0.3)
            os.kill(first.pid, signal.SIGKILL)
            return await work

        outcomes = asyncio.run(under_load())
        print("tritonserver killed", dict(outcomes))
        assert outcomes["sent"] == 300 == outcomes["answered"] + outcomes["refused"]
        assert wait_for(lambda: server.process is not first, 120)
        later = asyncio.run(load(server.config.http_url, drawn, 50, timeout_s=60))
        assert later == {"sent": 50, "answered": 50}
        assert left_behind(first) == []
        assert server.restarts >= 1  # again where a busy machine failed the self-test


def test_no_answer_is_an_error_with_a_reason_within_the_time_out() -> None:
    with socket.socket() as listener:  # takes connections and never answers
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        for scheme in ("http", "grpc"):
            start = time.monotonic()
            with (
                Client(f"{scheme}://127.0.0.1:{port}", timeout_s=1) as client,
                pytest.raises(ServingError, match=r"no answer|UNAVAILABLE|DEADLINE"),
            ):
                client.info()
            assert time.monotonic() - start < 10
    for scheme in ("http", "grpc"):
        with Client(f"{scheme}://127.0.0.1:{port}", timeout_s=5) as client, pytest.raises(ServingError):
            client.info()


def test_slow_clients_do_not_hold_up_the_others(serve: Serve, drawn: Any, load: Load) -> None:
    with serve() as server:
        slow = []
        for _ in range(50):
            connection = socket.create_connection(("127.0.0.1", server.config.http_port), timeout=5)
            connection.sendall(
                b"POST /v2/models/shapes/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n{"
            )
            slow.append(connection)
        outcomes = asyncio.run(load(server.config.http_url, drawn, 100, timeout_s=60))
        for connection in slow:
            connection.close()
        assert outcomes == {"sent": 100, "answered": 100}


def test_a_full_disk_for_the_log_does_not_stop_the_server(repository: Path, drawn: Any, load: Load) -> None:
    told: list[str] = []
    config = ServeConfig(http_port=0, grpc_port=0, metrics_port=0, log_file=Path("/dev/full"))
    with running_server(repository, config, tell=told.append) as server:
        assert asyncio.run(load(server.config.http_url, drawn, 20)) == {"sent": 20, "answered": 20}
        assert server.process.log.lost_lines > 0
    assert any("the log file cannot be written" in text for text in told)


def test_nothing_is_left_behind_by_a_server_that_was_stopped(serve: Serve) -> None:
    with serve() as server:
        assert len(group_members(server.process.pid)) >= 4
        process = server.process
        assert left_behind(process) != []
    assert left_behind(process) == []


def left_behind(process: ServerProcess) -> list[object]:
    """Processes and shared memory of a server."""
    return [*group_members(process.pid), *SHARED_MEMORY.glob(f"{process.region_prefix}*")]


@pytest.mark.parametrize("where", ["graph", "code", "configuration", "golden", "new"])
def test_a_changed_byte_anywhere_is_refused_and_the_file_named(
    where: str, repository: Path, tmp_path: Path, tritonserver: TritonServer
) -> None:
    copy = Path(shutil.copytree(repository, tmp_path / "repository"))
    file = {
        "graph": "shapes_classifier/1/model.onnx",
        "code": "shapes_preprocess/1/runtime/triton_models.py",
        "configuration": "shapes/config.pbtxt",
        "golden": "shapes/1/golden/answers.json",
        "new": "shapes_alarm/1/extra.py",
    }[where]
    content = bytearray((copy / file).read_bytes()) if where != "new" else bytearray(b"0")
    content[len(content) // 2] ^= 1
    (copy / file).write_bytes(content)
    with pytest.raises(RepositoryError, match=file), running_server(copy, ServeConfig()):
        pytest.fail("it was served")


def test_a_repository_for_another_backend_is_served_or_the_reason_is_given(
    repository: Path, tritonserver: TritonServer
) -> None:
    """The repository's own configuration wants the onnxruntime backend, which the wheel's server lacks."""
    ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
    if "onnxruntime" in tritonserver.backends:
        assert make_plan(repository, ServeConfig(**ports)).placement.backend == "onnxruntime"
        return
    plan = make_plan(repository, ServeConfig(**ports))
    assert (plan.placement.config_name, plan.placement.backend) == ("python", "python")
    with pytest.raises(ConfigError, match="onnxruntime backend, which profile 'cuda' needs"):
        make_plan(repository, ServeConfig(profile="cuda", **ports))


def test_instances_share_the_cpus_and_answer_the_same(serve: Serve, drawn: Any, load: Load) -> None:
    with serve(instances=2) as server:
        assert len(stubs(server, "shapes_classifier")) == 2
        assert asyncio.run(load(server.config.grpc_url, drawn, 40)) == {"sent": 40, "answered": 40}


def test_an_outdated_server_is_not_opened_to_a_network(repository: Path, tritonserver: TritonServer) -> None:
    if not tritonserver.is_outdated:
        pytest.skip("this one may be")
    with pytest.raises(ConfigError, match="lacks published security fixes"):
        make_plan(repository, ServeConfig(host="0.0.0.0"))
