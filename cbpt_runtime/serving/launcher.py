"""Serve a model repository: verified, hardened, self-tested before it is called ready, stopped whole.

with running_server("model_repository/") as server:
    print(server.config.grpc_url)
"""

from __future__ import annotations

import http.client
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cbpt_runtime.errors import OutputError, ServingError
from cbpt_runtime.export.manifest import Repository, read_repository
from cbpt_runtime.serving.command import Command, check_exposure, make_command, region_bytes
from cbpt_runtime.serving.config import ServeConfig, take_ports
from cbpt_runtime.serving.placement import Placement, lay_out, place
from cbpt_runtime.serving.process import ServerProcess, describe_exit
from cbpt_runtime.serving.selftest import SelfTest, run_selftest
from cbpt_runtime.serving.servers import TritonServer, find_server

LOG_LINES = 20
_POLL_S = 0.1
_SCRATCH = "cbpt-serve-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything decided before a server is started.

    Attributes:
        repository: What is served; its hashes were checked.
        server: The program that serves it.
        config: The operator's settings, with the ports really used.
        placement: Backend, instances and threads on this machine.
        region_bytes: Shared memory of each python-backend process to begin with.
    """

    repository: Repository
    server: TritonServer
    config: ServeConfig
    placement: Placement
    region_bytes: int

    def command(self, *, repository: Path, backends: Path) -> Command:
        """The command line."""
        return make_command(
            self.server,
            self.config,
            self.placement,
            repository=repository,
            backends=backends,
            region_bytes=self.region_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServer:
    """A server that is ready and passed its self-test.

    Attributes:
        plan: What was decided before it was started.
        process: The tritonserver.
        version: As it says itself.
        selftest: The golden answers through the wire.
    """

    plan: Plan
    process: ServerProcess
    version: str
    selftest: SelfTest

    @property
    def config(self) -> ServeConfig:
        """The settings, with the ports really used."""
        return self.plan.config

    def require_running(self) -> None:
        """Raise ServingError, with cause and log, when it has ended."""
        code = self.process.exit_code
        if code is not None:
            raise startup_error(self.process, f"{describe_exit(code)} while serving")


def make_plan(repository: str | Path, config: ServeConfig) -> Plan:
    """Check everything that can be checked before a server is started.

    Raises:
        RepositoryError: A file of the repository is missing, changed or new; the text names it.
        ConfigError: No tritonserver, a taken port, or settings that must not be combined.
        ServingError: The tritonserver does not run, or lacks a backend.
    """
    checked = read_repository(repository)
    server = find_server(config.tritonserver)
    check_exposure(server, config)
    placement = place(checked, server, config)
    return Plan(
        repository=checked,
        server=server,
        config=take_ports(config),
        placement=placement,
        region_bytes=region_bytes(checked, placement),
    )


@contextmanager
def running_server(
    repository: str | Path,
    config: ServeConfig | None = None,
    *,
    tell: Callable[[str], None] | None = None,
) -> Iterator[RunningServer]:
    """Serve a repository while the block runs; the server has passed its self-test when it begins.

    Args:
        repository: What `cbpt-runtime export` wrote.
        config: Settings; loopback and the usual ports when None.
        tell: Called with warnings for people, from any thread.

    Raises:
        InputError: As `make_plan`.
        ServingError: The server did not start or failed its self-test; the text has the cause and the log.
    """
    plan = make_plan(repository, config or ServeConfig())
    _sweep()
    with tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{os.getpid()}-") as scratch, ExitStack() as stack:
        process = _start(plan, Path(scratch), tell or _silent)
        stack.callback(process.stop, plan.config.drain_timeout_s)
        version = _wait_until_ready(plan, process)
        selftest = run_selftest(plan.repository, plan.config)
        process.log.listen()
        yield RunningServer(plan=plan, process=process, version=version, selftest=selftest)


def startup_error(process: ServerProcess, what: str) -> ServingError:
    """An error with the server's own words: cause and tail of the log."""
    process.log.close(1.0)
    cause = process.log.cause()
    lines = "\n".join(f"  | {line:.400}" for line in process.log.tail(LOG_LINES))
    return ServingError(
        expected="a tritonserver that loads the repository and goes on running",
        got=f"{what}: {cause}" if cause else what,
        fix=f"The last lines of its log:\n{lines or '  | (it wrote nothing)'}",
    )


def _sweep() -> None:
    """Remove what launchers that were killed left in the temporary folder: a few links, never a model."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*-*"):
        number = folder.name.removeprefix(_SCRATCH).partition("-")[0]
        is_left = number.isdigit() and not Path("/proc", number).exists()
        if is_left and folder.owner() == Path("/proc/self").owner():
            shutil.rmtree(folder, ignore_errors=True)


def _start(plan: Plan, scratch: Path, tell: Callable[[str], None]) -> ServerProcess:
    command = plan.command(
        repository=lay_out(plan.repository, plan.placement, scratch / "repository"),
        backends=plan.server.link_backends(scratch / "backends"),
    )
    try:
        return ServerProcess(command, plan.server.environment(), log_file=plan.config.log_file, tell=tell)
    except OSError as error:
        raise OutputError(
            expected="a log file that can be written",
            got=f"{plan.config.log_file}: {(error.strerror or str(error)).lower()}",
            fix="Choose another --log-file.",
        ) from error


def _wait_until_ready(plan: Plan, process: ServerProcess) -> str:
    """Wait until every model is loaded and warmed up; the server's version."""
    deadline = time.monotonic() + plan.config.startup_timeout_s
    while _get(plan.config, "/v2/health/ready") is None:
        if process.exit_code is not None:
            raise startup_error(process, describe_exit(process.exit_code))
        if time.monotonic() > deadline:
            raise startup_error(process, f"not ready after {plan.config.startup_timeout_s:g} s")
        time.sleep(_POLL_S)
    body = _get(plan.config, "/v2") or b""
    words = body.decode("utf-8", "replace").split('"version":"')
    return words[1].split('"')[0] if len(words) > 1 else "unknown"


def _get(config: ServeConfig, path: str) -> bytes | None:
    """The body of a successful answer; None for any other."""
    host = config.reachable_host.strip("[]")
    connection = http.client.HTTPConnection(host, config.http_port, timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return body if answer.status == http.HTTPStatus.OK else None


def _silent(text: str) -> None:
    """Warnings nobody wants to see."""
