"""What Triton's answers, and those of a gateway before it, mean for a caller."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from cbpt_runtime.serving.client.wire import Kind, WireError, _kind, open_wire

DEAD = "in ensemble 'shapes', Stub process 'shapes_classifier_0_0' is not healthy."
STARVED = "in ensemble 'shapes', expected 2 inputs but got 0 inputs for model 'shapes_alarm'. Got input(s) []"


@pytest.mark.parametrize(
    ("kind", "message", "seen_as"),
    [
        ("refused", STARVED, "busy"),
        ("refused", "unexpected shape for input 'images'", "refused"),
        ("broken", STARVED, "broken"),
        ("broken", DEAD, "busy"),
        ("broken", "Received http2 header with status: 413", "refused"),
        ("broken", "Received http2 header with status: 500", "broken"),
        ("broken", "Failed to process the request(s)", "broken"),
    ],
)
def test_errors_that_say_little_are_seen_for_what_they_are(kind: Kind, message: str, seen_as: Kind) -> None:
    assert _kind(kind, message) == seen_as


class Refusing(BaseHTTPRequestHandler):
    """Answers with the status that the path of the model names."""

    def do_GET(self) -> None:
        self.send_response(int(self.path.split("/")[3]))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def refusing_url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "seen_as"),
    [
        (400, "refused"), (401, "refused"), (404, "refused"), (413, "refused"),
        (429, "busy"), (502, "busy"), (503, "busy"), (504, "timeout"), (500, "broken"),
    ],
)  # fmt: skip
def test_a_status_of_http_says_whose_fault_it_is(status: int, seen_as: Kind, refusing_url: str) -> None:
    async def ask() -> None:
        wire = open_wire(refusing_url)
        try:
            await wire.config(str(status), 10)
        finally:
            await wire.close()

    with pytest.raises(WireError) as error:
        asyncio.run(ask())
    assert error.value.kind == seen_as


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """What a proxy that every variable names is asked for; it answers nothing."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def listen() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with listener.accept()[0] as connection:
                        asked.append(connection.recv(1000))

        threading.Thread(target=listen, daemon=True).start()
        for name in ("http_proxy", "https_proxy", "grpc_proxy"):
            monkeypatch.setenv(name, f"http://user:secret@127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("no_grpc_proxy", raising=False)
        yield asked
        listener.shutdown(socket.SHUT_RDWR)


def failure(url: str) -> str:
    async def ask() -> None:
        wire = open_wire(url)
        try:
            await wire.server(2.0)
        finally:
            await wire.close()

    with pytest.raises(WireError) as caught:
        asyncio.run(ask())
    return str(caught.value)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_proxy_is_asked_for_the_loopback(proxy: list[bytes], scheme: str, host: str) -> None:
    assert "proxy" not in failure(f"{scheme}://{host}:1")
    assert proxy == []


def test_a_proxy_in_the_way_is_named_without_its_password(
    proxy: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = failure("grpc://192.0.2.1:8001")  # an address of no machine: RFC 5737
    assert "asked through the proxy of grpc_proxy; no_proxy leaves it out" in text
    assert "secret" not in text
    assert proxy[0].startswith(b"CONNECT 192.0.2.1:8001")
    monkeypatch.setenv("no_proxy", "192.0.2.1")
    assert "proxy" not in failure("grpc://192.0.2.1:8001")


def test_a_redirect_is_not_followed() -> None:
    seen: list[str] = []

    class Redirecting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(307)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    async def ask(url: str) -> None:
        wire = open_wire(url, headers={"Authorization": "secret"})
        try:
            await wire.config("clip", 5.0)
        finally:
            await wire.close()

    with HTTPServer(("127.0.0.1", 0), Redirecting) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        with pytest.raises(WireError, match="a redirect to '/elsewhere', which is not followed") as caught:
            asyncio.run(ask(f"http://127.0.0.1:{server.server_address[1]}"))
        server.shutdown()
        thread.join()
    assert caught.value.kind == "refused"
    assert seen == ["/v2/models/clip/config"]
