"""The tritonserver command line: hardened, with the flags this version knows and no others."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cbpt_runtime.errors import ConfigError
from cbpt_runtime.export.manifest import Repository
from cbpt_runtime.serving.config import SECRET_HEADER, Endpoint, ServeConfig
from cbpt_runtime.serving.triton.leftovers import SHARED_MEMORY, is_plain, region_prefix
from cbpt_runtime.serving.triton.placement import Placement
from cbpt_runtime.serving.triton.servers import OLDEST_VERSION, RELEASE, TritonServer

_MIB = 2**20
# Nobody needs these through the network; each is behind a header that nobody can send.
_CLOSED_ENDPOINTS = "shared-memory,trace,logging"
_GUARDED_ENDPOINTS = (
    "health,metadata,inference,model-config,model-repository,statistics"  # all others there are
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A tritonserver command.

    Attributes:
        arguments: The program and its flags.
        region_prefix: How the names of its shared-memory regions begin.
    """

    arguments: tuple[str, ...]
    region_prefix: str


def check_exposure(server: TritonServer, config: ServeConfig) -> None:
    """Refuse to open an outdated server to a network.

    Raises:
        ConfigError: The address is not loopback and the server is too old, or of unknown age.
    """
    if server.is_outdated and not config.is_loopback:
        raise ConfigError(
            expected=f"a loopback address for a Triton older than {OLDEST_VERSION}: it lacks published "
            "security fixes",
            got=f"--host {config.host} with {server.executable} ({server.origin}, version "
            f"{server.version or 'unknown: no TRITON_VERSION beside it'})",
            fix=f"Keep --host 127.0.0.1 for tests and development; to serve others use {RELEASE}.",
        )


def require_plain(path: Path) -> None:
    """Refuse to print a path that Triton's python backend would let a shell read.

    Raises:
        ConfigError: It has other characters than letters, digits and ``._/+-``.
    """
    if not is_plain(path):
        raise ConfigError(
            expected="a path of letters, digits and ._/+- only: Triton lets a shell read it",
            got=repr(str(path)),
            fix="Rename or link the folder, or let `serve` run the server: it serves from a view of its own.",
        )


def make_command(
    server: TritonServer,
    config: ServeConfig,
    placement: Placement,
    *,
    endpoint: Endpoint,
    repository: Path,
    backends: Path,
    region_bytes: int,
) -> Command:
    """Return the command that serves a repository.

    Args:
        server: What runs it.
        config: What the operator decided; its ports are those that are used.
        placement: What the server's backends run.
        endpoint: Where it listens itself.
        repository: Absolute path for `--model-repository`.
        backends: For `--backend-directory`.
        region_bytes: Shared memory of each python-backend process to begin with.
    """
    prefix = region_prefix()
    wanted = [
        ("--model-repository", str(repository)),
        ("--backend-directory", str(backends)),
        ("--model-config-name", placement.config_name),
        ("--model-control-mode", "none"),
        ("--disable-auto-complete-config", ""),
        ("--strict-readiness", "true"),
        ("--exit-on-error", "true"),
        ("--exit-timeout-secs", str(max(1, round(config.drain_timeout_s)))),
        *_listening(endpoint),
        *_limits(config, placement, endpoint),
        ("--backend-config", f"python,shm-region-prefix-name={prefix}"),
        ("--backend-config", f"python,shm-default-byte-size={region_bytes}"),
    ]
    flags = [
        f"{name}={value}" if value else name
        for name, value in wanted
        if value is not None and name in server.flags
    ]
    return Command(arguments=(str(server.executable), *flags), region_prefix=prefix)


def region_bytes(repository: Repository, placement: Placement) -> int:
    """Shared memory each python-backend process starts with: room for two full batches, in whole MiB.

    Raises:
        ConfigError: The machine's shared memory cannot hold all of them.
    """
    height, width = repository.manifest.preprocess.image_size
    image_bytes = height * width * 3 + 8 * repository.manifest.classes + 64
    batch_bytes = repository.manifest.profile.max_batch * image_bytes
    each: int = -(-2 * batch_bytes // _MIB) * _MIB
    try:
        state = os.statvfs(SHARED_MEMORY)
    except OSError:
        return each
    free: int = state.f_bavail * state.f_frsize
    if free < each * placement.processes:
        raise ConfigError(
            expected=f"{each * placement.processes // _MIB} MiB of free shared memory "
            f"({placement.processes} processes of {each // _MIB} MiB)",
            got=f"{free // _MIB} MiB in {SHARED_MEMORY}",
            fix="Give the container more (docker run --shm-size=1g; Kubernetes: an emptyDir of medium Memory "
            f"on {SHARED_MEMORY}), or export with a smaller --max-batch.",
        )
    return each


def shell_text(arguments: Sequence[str]) -> str:
    """Return the command as it can be pasted into a shell, one flag per line."""
    import shlex

    return " \\\n  ".join(map(shlex.quote, arguments))


def _listening(endpoint: Endpoint) -> list[tuple[str, str]]:
    endpoints = [
        (f"--{protocol}-{what}", value)
        for protocol, port in (
            ("http", endpoint.http_port),
            ("grpc", endpoint.grpc_port),
            ("metrics", endpoint.metrics_port),
        )
        for what, value in (("address", endpoint.address), ("port", str(port)))
    ]
    return [*endpoints, ("--allow-sagemaker", "false"), ("--allow-vertex-ai", "false")]


def _closed() -> str:
    """Endpoints that want a header made up here; whoever reads it off the command line cannot send it.

    No line of HTTP/1 and no metadata of gRPC holds a line feed.
    """
    return f"{_CLOSED_ENDPOINTS}:cbpt-closed={secrets.token_hex(16)}\n"


def _limits(config: ServeConfig, placement: Placement, endpoint: Endpoint) -> list[tuple[str, str | None]]:
    guarded = None if endpoint.secret is None else f"{_GUARDED_ENDPOINTS}:{SECRET_HEADER}={endpoint.secret}"
    return [
        ("--allow-gpu-metrics", "false" if placement.provider == "cpu" else None),
        ("--metrics-config", "summary_latencies=true"),  # quantiles of queue and request times
        ("--allow-client-shm", "false"),
        ("--http-max-input-size", str(config.max_request_bytes)),
        ("--grpc-max-response-pool-size", "16"),
        ("--http-restricted-api", _closed()),
        ("--http-restricted-api", guarded),
        ("--grpc-restricted-protocol", _closed()),
        ("--grpc-restricted-protocol", guarded),
    ]
