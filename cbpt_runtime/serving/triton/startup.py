"""From a repository to a server that is ready: all that is checked before, the start, the self-test."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cbpt_runtime.errors import CbptError, ExportError, OutputError, ServingError
from cbpt_runtime.export.golden import read_golden
from cbpt_runtime.export.manifest import Repository
from cbpt_runtime.serving.client.blocking import Client
from cbpt_runtime.serving.config import Endpoint, ServeConfig, private_endpoint, take_ports
from cbpt_runtime.serving.guard.http_guard import Guard
from cbpt_runtime.serving.triton.command import Command, check_exposure, make_command, region_bytes
from cbpt_runtime.serving.triton.placement import Placement, lay_out, place
from cbpt_runtime.serving.triton.process import ServerProcess, command_of, describe_exit, group_members
from cbpt_runtime.serving.triton.servers import TritonServer, find_server
from cbpt_runtime.trust import ANYONE, Trust, open_repository

TIMEOUT_S = 60.0
LOG_LINES = 20
STUB = "triton_python_backend_stub"
_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything decided before a server is started.

    Attributes:
        repository: What is served; its hashes were checked.
        server: The program that serves it.
        config: The operator's settings, with the ports really used.
        placement: Backend, instances and threads on this machine.
        region_bytes: Shared memory of each python-backend process to begin with.
        foreign: Files with code, configurations or a graph of somebody else that the operator lets in.
    """

    repository: Repository
    server: TritonServer
    config: ServeConfig
    placement: Placement
    region_bytes: int
    foreign: tuple[str, ...] = ()

    def command(self, *, repository: Path, backends: Path, endpoint: Endpoint | None = None) -> Command:
        """Return the command line; without an endpoint Triton listens on the public ports, unguarded."""
        config = self.config
        return make_command(
            self.server,
            config,
            self.placement,
            endpoint=endpoint
            or Endpoint(
                address=str(config.address),
                http_port=config.http_port,
                grpc_port=config.grpc_port,
                metrics_port=config.metrics_port,
            ),
            repository=repository,
            backends=backends,
            region_bytes=self.region_bytes,
        )


def make_plan(
    repository: str | Path, config: ServeConfig, *, trust: Trust = ANYONE, must_be_free: bool = True
) -> Plan:
    """Check everything that can be checked before a server is started.

    Args:
        repository: What `cbpt-runtime export` wrote.
        config: Settings.
        trust: What the repository has to show.
        must_be_free: Whether the ports must be free now; not where the command is only shown.

    Raises:
        RepositoryError: A file of the repository is missing, changed, new, or not what this version writes;
            the text names it.
        TrustError: It is not the trusted one.
        ConfigError: No tritonserver, a taken port, or settings that must not be combined.
        ServingError: The tritonserver does not run, or lacks a backend.
    """
    from cbpt_runtime.export.written import require_own_files  # takes onnx along; a client needs none

    checked = open_repository(repository, trust)
    foreign = require_own_files(checked, allow_foreign_code=config.allow_foreign_code)
    server = find_server(config.tritonserver)
    check_exposure(server, config)
    placement = place(checked, server, config)
    return Plan(
        repository=checked,
        server=server,
        config=take_ports(config, must_be_free=must_be_free),
        placement=placement,
        region_bytes=region_bytes(checked, placement),
        foreign=tuple(foreign),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """What the self-test saw, all of it right or, for int8 on another processor, near enough.

    Attributes:
        images: Golden images; each was sent as a file and as pixels, over HTTP and over gRPC.
        largest_difference: From the expected probabilities and alarms.
        note: What differs, when int8 was exported on another kind of processor and something does.
    """

    images: int
    largest_difference: float
    note: str | None


def run_selftest(repository: Repository, config: ServeConfig) -> SelfTest:
    """Ask a server for the golden answers: files and pixels, HTTP and gRPC.

    Where the repository was exported to look twice, files are looked at twice and pixels are not.

    Raises:
        ServingError: One is missing or wrong; the text says through which way.
    """
    golden = read_golden(repository.golden)
    pixels = golden.pixels(repository.manifest.preprocess)
    largest, note = 0.0, None
    for url in (config.http_url, config.grpc_url):
        with Client(url, model=repository.name, timeout_s=TIMEOUT_S) as client:
            for kind in ("files", "pixels"):
                where = f"{url} ({kind})"
                try:
                    found = (
                        client.predict_files(golden.files)
                        if kind == "files"
                        else client.predict_pixels(np.ascontiguousarray(pixels))
                    )
                    checked = golden.check(found, where=where, made_on=repository.manifest.processor)
                    largest, note = max(largest, checked.largest_difference), note or checked.note
                except ExportError as error:
                    raise ServingError(expected=error.expected, got=error.got, fix=error.fix) from error
                except CbptError as error:
                    raise ServingError(
                        expected=f"golden answers from {where}",
                        got=error.got,
                        fix="The server runs but does not answer as it should; it was stopped. "
                        "Check the repository with `cbpt-runtime verify`.",
                    ) from error
    return SelfTest(images=len(golden.files), largest_difference=largest, note=note)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyServer:
    """A server that is ready and passed its self-test.

    Attributes:
        process: The tritonserver.
        endpoint: Where it listens itself.
        version: As it says itself.
        selftest: The golden answers through the wire.
        stubs: Processes of its python backend.
    """

    process: ServerProcess
    endpoint: Endpoint
    version: str
    selftest: SelfTest
    stubs: frozenset[int]


def start_server(
    plan: Plan, guard: Guard, scratch: Path, tell: Callable[[str], None], is_wanted: Callable[[], bool]
) -> ReadyServer:
    """Start a server and wait until it passed its self-test; on any failure nothing of it is left.

    Its ports are new to everybody each time: the guard leads to them, from the self-test on.

    Args:
        plan: What to start.
        guard: Listens on the ports of the plan.
        scratch: An empty or missing folder that outlives the server.
        tell: Called with warnings for people.
        is_wanted: Asked while it loads; when it says no the start is given up.

    Raises:
        OutputError: The log file cannot be opened.
        ServingError: It did not start, or answered wrongly; the text has the cause and the log.
    """
    endpoint = private_endpoint()
    process = _launch(plan, endpoint, scratch, tell)
    try:
        version = _wait_until_ready(plan, endpoint, process, is_wanted)
        process.make_private()
        guard.lead_to(endpoint)
        selftest = run_selftest(plan.repository, plan.config)
        if selftest.note is not None:
            tell(f"note: {selftest.note}")
        stubs = backend_processes(process)
    except BaseException:
        guard.lead_to(None)
        process.kill()
        raise
    process.log.listen()
    return ReadyServer(process=process, endpoint=endpoint, version=version, selftest=selftest, stubs=stubs)


def backend_processes(process: ServerProcess) -> frozenset[int]:
    """Return the living processes of a server's python backend."""
    return frozenset(pid for pid in group_members(process.pid) if STUB in command_of(pid))


def startup_error(process: ServerProcess, what: str) -> ServingError:
    """Return an error with the server's own words: cause and tail of the log."""
    process.log.close(1.0)
    cause = process.log.cause()
    lines = "\n".join(f"  | {line:.400}" for line in process.log.tail(LOG_LINES))
    return ServingError(
        expected="a tritonserver that loads the repository and goes on running",
        got=f"{what}: {cause}" if cause else what,
        fix=f"The last lines of its log:\n{lines or '  | (it wrote nothing)'}",
    )


def _launch(plan: Plan, endpoint: Endpoint, scratch: Path, tell: Callable[[str], None]) -> ServerProcess:
    command = plan.command(
        repository=lay_out(plan.repository, plan.placement, scratch / "repository"),
        backends=plan.server.link_backends(scratch / "backends"),
        endpoint=endpoint,
    )
    try:
        return ServerProcess(command, plan.server.environment(), log_file=plan.config.log_file, tell=tell)
    except OSError as error:
        raise OutputError(
            expected="a log file that can be written",
            got=f"{plan.config.log_file}: {(error.strerror or str(error)).lower()}",
            fix="Choose another --log-file.",
        ) from error


def _wait_until_ready(
    plan: Plan, endpoint: Endpoint, process: ServerProcess, is_wanted: Callable[[], bool]
) -> str:
    """Wait until every model is loaded and warmed up; the server's version."""
    deadline = time.monotonic() + plan.config.startup_timeout_s
    while _get(endpoint, "/v2/health/ready") is None:
        if process.exit_code is not None:
            raise startup_error(process, describe_exit(process.exit_code))
        if not is_wanted():
            raise startup_error(process, "stopped while it was loading")
        if time.monotonic() > deadline:
            raise startup_error(process, f"not ready after {plan.config.startup_timeout_s:g} s")
        time.sleep(_POLL_S)
    body = _get(endpoint, "/v2") or b""
    words = body.decode("utf-8", "replace").split('"version":"')
    return words[1].split('"')[0] if len(words) > 1 else "unknown"


def _get(endpoint: Endpoint, path: str) -> bytes | None:
    """Return the body of a successful answer; None for any other."""
    connection = http.client.HTTPConnection(endpoint.address, endpoint.http_port, timeout=5)
    try:
        connection.request("GET", path, headers=endpoint.headers)
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return body if answer.status == http.HTTPStatus.OK else None
