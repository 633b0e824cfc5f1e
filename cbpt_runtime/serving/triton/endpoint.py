"""Where Triton itself listens: behind the guard, at an address nobody is told and with a secret."""

from __future__ import annotations

import secrets
import socket
from contextlib import ExitStack
from dataclasses import dataclass, field

SECRET_HEADER = "cbpt-guard"  # noqa: S105
_GRPC_PREFIX = "triton-grpc-protocol-"  # Triton's, before the names of keys that open gRPC
_TRIES = 20


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
    """A new endpoint on a loopback address drawn from 16 million, with free ports and a secret.

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
