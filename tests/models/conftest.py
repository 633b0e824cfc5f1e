from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest


class NetworkUsedError(AssertionError):
    """Not an OSError, so that no code under test can take it for a missing network."""


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails the test when anything so much as looks up a host name, even if that is swallowed."""
    attempts: list[str] = []

    def refuse(*arguments: object, **_: object) -> None:
        attempts.append(repr(arguments[1:] if isinstance(arguments[0], socket.socket) else arguments))
        raise NetworkUsedError(attempts[-1])

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not attempts, f"network use: {attempts}"
