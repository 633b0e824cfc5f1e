"""What an operator decides about a server; and where Triton itself listens, behind the guard."""

from __future__ import annotations

import ipaddress
import math
import re
import secrets
import socket
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from cbpt_runtime.errors import ConfigError

PROFILES = ("cpu", "cuda", "tensorrt", "python")
MAX_INSTANCES = 64
SECRET_HEADER = "cbpt-guard"  # noqa: S105
_GRPC_PREFIX = "triton-grpc-protocol-"  # Triton's, before the names of keys that open gRPC
_TRIES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What an operator decides about a server.

    Attributes:
        host: IPv4 address to listen on; Triton's three front ends do not agree on how IPv6 is written.
        http_port: Port of Triton's HTTP protocol; 0 takes a free one.
        grpc_port: Port of gRPC; 0 takes a free one.
        metrics_port: Port of its Prometheus metrics; 0 takes a free one.
        profile: Configuration of the repository to use; what the server can run when None.
        instances: Copies of the classifier; the repository's number when None.
        tritonserver: The program, or the folder it is installed in; looked for when None.
        log_file: Where the whole log goes, besides the tail that is kept for errors.
        startup_timeout_s: How long loading and warming up may take.
        drain_timeout_s: How long requests may take to finish when the server is stopped.
        max_request_bytes: Larger requests are refused before they are read.
        host_names: Names by which the HTTP ports may be asked, besides those of the loopback and, where they
            are open to a network, any address and names that only exist inside one.
        allow_foreign_code: Serve code, configurations and graphs that this version would not have written.

    Raises:
        ConfigError: A value is out of range.
    """

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    profile: str | None = None
    instances: int | None = None
    tritonserver: Path | None = None
    log_file: Path | None = None
    startup_timeout_s: float = 300.0
    drain_timeout_s: float = 30.0
    max_request_bytes: int = 2**26
    host_names: frozenset[str] = frozenset()
    allow_foreign_code: bool = False

    def __post_init__(self) -> None:
        ports = {"http_port": self.http_port, "grpc_port": self.grpc_port, "metrics_port": self.metrics_port}
        problems = [f"{name} = {port}" for name, port in ports.items() if not 0 <= port <= 65535]
        chosen = [port for port in ports.values() if port]
        if len(set(chosen)) < len(chosen):
            problems.append(f"one port twice: {', '.join(map(str, ports.values()))}")
        if self.profile is not None and self.profile not in PROFILES:
            problems.append(f"profile = {self.profile!r} (one of {', '.join(PROFILES)})")
        if self.instances is not None and not 1 <= self.instances <= MAX_INSTANCES:
            problems.append(f"instances = {self.instances} (1 to {MAX_INSTANCES})")
        for name in ("startup_timeout_s", "drain_timeout_s", "max_request_bytes"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                problems.append(f"{name} = {value} (above 0)")
        problems += [
            f"allowed host = {name!r} (a host name in lower case, without a port)"
            for name in sorted(self.host_names)
            if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", name)
        ]
        try:
            self.address  # noqa: B018
        except ValueError:
            problems.append(f"host = {self.host!r} (an IPv4 address, or localhost)")
        if problems:
            raise ConfigError(
                expected="settings of a server in range",
                got="; ".join(problems),
                fix="Correct the flag.",
            )

    @property
    def address(self) -> ipaddress.IPv4Address:
        """The host as an address."""
        return ipaddress.IPv4Address("127.0.0.1" if self.host == "localhost" else self.host)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.address.is_loopback

    @property
    def reachable_host(self) -> str:
        """The host as this machine's own clients write it in a URL."""
        return "127.0.0.1" if self.address.is_unspecified else str(self.address)

    @property
    def http_url(self) -> str:
        """Where Triton's HTTP protocol is spoken."""
        return f"http://{self.reachable_host}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """Where Triton's gRPC protocol is spoken."""
        return f"grpc://{self.reachable_host}:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        """Where Prometheus finds the metrics."""
        return f"http://{self.reachable_host}:{self.metrics_port}/metrics"


def take_ports(config: ServeConfig, *, must_be_free: bool = True) -> ServeConfig:
    """Return settings with free ports in place of zeros; every other port is free if it must be.

    Raises:
        ConfigError: A port is taken, or the address is not this machine's.
    """
    ports: dict[str, int] = {}
    with ExitStack() as held:
        for name in ("http_port", "grpc_port", "metrics_port"):
            port = getattr(config, name)
            if port == 0 or must_be_free:
                listener = _bind(str(config.address), port, f"--{name.replace('_', '-')}")
                port = held.enter_context(listener).getsockname()[1]
            ports[name] = port
    return replace(config, **ports)  # type: ignore[arg-type]


def require_free_page_port(port: int) -> None:
    """See that the page's port is free, before anything is started.

    Raises:
        ConfigError: It is taken.
    """
    _bind("127.0.0.1", port, "--ui-port").close()


def _bind(host: str, port: int, flag: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else None
        raise ConfigError(
            expected=f"a free port for {flag} on {host}",
            got=f"{port}: {(reason or str(error)).lower()}",
            fix="Stop what listens there, or choose another port (0 takes a free one).",
        ) from error
    return listener


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where Triton's own HTTP, gRPC and metrics listen.

    Attributes:
        address: To bind.
        http_port: Of its HTTP protocol.
        grpc_port: Of its gRPC protocol.
        metrics_port: Of its metrics.
        secret: What each request must carry in `SECRET_HEADER`; nothing when None.
    """

    address: str
    http_port: int
    grpc_port: int
    metrics_port: int
    secret: str | None = field(default=None, repr=False)

    @property
    def headers(self) -> dict[str, str]:
        """What an HTTP request to it must carry."""
        return {} if self.secret is None else {SECRET_HEADER: self.secret}

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a call of gRPC to it must carry."""
        return () if self.secret is None else ((_GRPC_PREFIX + SECRET_HEADER, self.secret),)


def private_endpoint() -> Endpoint:
    """Return a new endpoint on a loopback address drawn from 16 million, with free ports and a secret.

    Web pages cannot guess the address in any reasonable time, and could not send the secret's header.
    """
    for _ in range(_TRIES):
        address = ".".join(("127", *(str(1 + secrets.randbelow(254)) for _ in range(3))))
        try:
            ports = _free_ports(address)
        except OSError:  # a system with one loopback address only, or no port left on this one
            continue
        break
    else:
        address = "127.0.0.1"
        ports = _free_ports(address)
    return Endpoint(
        address=address,
        http_port=ports[0],
        grpc_port=ports[1],
        metrics_port=ports[2],
        secret=secrets.token_hex(16),
    )


def _free_ports(address: str) -> list[int]:
    with ExitStack() as held:
        listeners = [held.enter_context(socket.create_server((address, 0))) for _ in range(3)]
        return [listener.getsockname()[1] for listener in listeners]
