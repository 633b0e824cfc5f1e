"""From a plan to a server that is ready: started, loaded, warmed up, self-tested; or an error and its log."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cbpt_runtime.errors import OutputError, ServingError
from cbpt_runtime.serving.guard.http_guard import Guard
from cbpt_runtime.serving.triton.endpoint import Endpoint, private_endpoint
from cbpt_runtime.serving.triton.placement import lay_out
from cbpt_runtime.serving.triton.plan import Plan
from cbpt_runtime.serving.triton.process import ServerProcess, describe_exit
from cbpt_runtime.serving.triton.selftest import SelfTest, run_selftest
from cbpt_runtime.serving.triton.usage import command_of, group_members

LOG_LINES = 20
STUB = "triton_python_backend_stub"
_POLL_S = 0.1


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
    """The living processes of a server's python backend."""
    return frozenset(pid for pid in group_members(process.pid) if STUB in command_of(pid))


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
    """The body of a successful answer; None for any other."""
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
