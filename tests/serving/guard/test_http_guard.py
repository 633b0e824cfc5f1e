"""The public HTTP ports, before a stand-in for Triton; `test_grpc_guard` has the one of gRPC."""

from __future__ import annotations

import gzip
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cbpt_runtime.errors import ConfigError
from cbpt_runtime.serving.config import Endpoint, ServeConfig, take_ports
from cbpt_runtime.serving.guard import http_guard as module
from cbpt_runtime.serving.guard.http_guard import Guard

INFER = "/v2/models/clip/infer"
BINARY = "Inference-Header-Content-Length"


@dataclass
class FakeTriton:
    """Answers with what it is told to and remembers what it was asked."""

    status: int = 200
    answer: bytes = b'{"outputs": []}'
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    wait_s: float = 0.0
    is_rude: bool = False
    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    port: int = 0

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(
            address="127.77.1.2", http_port=self.port, grpc_port=9, metrics_port=self.port, secret="s3cret"
        )


@pytest.fixture
def triton() -> Iterator[FakeTriton]:
    fake = FakeTriton()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fake.seen.append((self.command, self.path, dict(self.headers), body))
            time.sleep(fake.wait_s)
            if fake.is_rude:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.send_response(fake.status)
            for name, value in {**fake.headers, "Content-Length": str(len(fake.answer))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(fake.answer)

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None: ...

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None: ...

    server = Quiet(("127.77.1.2", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    fake.port = int(server.server_address[1])
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def config() -> ServeConfig:
    return take_ports(ServeConfig(http_port=0, grpc_port=0, metrics_port=0, max_request_bytes=100_000))


@pytest.fixture
def guard(config: ServeConfig, triton: FakeTriton) -> Iterator[Guard]:
    with Guard(config) as running:
        running.lead_to(triton.endpoint)
        yield running


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        return str(json.loads(self.body)["error"])


@pytest.fixture
def ask(guard: Guard, config: ServeConfig) -> Callable[..., Reply]:
    def send(
        method: str, path: str, body: bytes | None = None, *, port: int | None = None, **headers: str
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", port or config.http_port, timeout=10)
        try:
            connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
            response = connection.getresponse()
            return Reply(response.status, dict(response.headers), response.read())
        finally:
            connection.close()

    return send


def test_a_question_comes_whole_and_with_the_secret_and_its_answer_comes_back(
    ask: Callable[..., Reply], triton: FakeTriton
) -> None:
    triton.answer = b"{}\0\1\2"
    triton.headers = {"Content-Type": "application/octet-stream", BINARY: "2", "Set-Cookie": "a=b"}
    body = b'{"inputs": []}' + bytes(range(256)) * 300
    reply = ask(
        "POST", INFER, body, Inference_Header_Content_Length="14", Content_Type="application/octet-stream",
        Authorization="Basic x", Accept_Encoding="gzip",
    )  # fmt: skip
    assert (reply.status, reply.body, reply.headers[BINARY]) == (200, triton.answer, "2")
    assert reply.headers["Content-Type"] == "application/octet-stream"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert "Set-Cookie" not in reply.headers
    (method, path, headers, arrived) = triton.seen[0]
    assert (method, path, arrived) == ("POST", INFER, body)
    assert headers == {
        "Host": f"127.77.1.2:{triton.port}",
        "Content-Type": "application/octet-stream",
        BINARY: "14",
        "cbpt-guard": "s3cret",
        "Content-Length": str(len(body)),
    }


def test_an_error_of_triton_comes_through_and_never_as_a_page(
    ask: Callable[..., Reply], triton: FakeTriton
) -> None:
    triton.status, triton.answer = 400, b'{"error": "no such input"}'
    assert (ask("POST", INFER, b"{}").status, ask("GET", "/v2").error) == (400, "no such input")
    triton.headers = {"Content-Type": "text/html"}
    assert ask("GET", "/v2/models/clip").headers["Content-Type"] == "application/octet-stream"


def test_metrics_have_their_port_and_nothing_else_has(
    ask: Callable[..., Reply], triton: FakeTriton, config: ServeConfig
) -> None:
    triton.answer, triton.headers = b"cbpt_images_total 3\n", {"Content-Type": "text/plain; charset=utf-8"}
    reply = ask("GET", "/metrics", port=config.metrics_port)
    assert (reply.status, reply.body) == (200, triton.answer)
    assert reply.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert ask("GET", "/metrics").status == 404
    assert ask("GET", "/v2", port=config.metrics_port).status == 404
    assert ask("POST", "/metrics", b"", port=config.metrics_port).status == 405
    assert len(triton.seen) == 1


@pytest.mark.parametrize("headers", [{"Host": "example.org"}, {"Origin": "http://example.org"}])
def test_another_page_or_another_name_reaches_nothing(
    headers: dict[str, str], ask: Callable[..., Reply], triton: FakeTriton, config: ServeConfig
) -> None:
    assert ask("GET", "/v2/models/clip/config", **headers).status == 403
    assert ask("POST", INFER, b"{}", **headers).status == 403
    assert ask("GET", "/metrics", port=config.metrics_port, **headers).status == 403
    assert triton.seen == []


def test_two_names_at_once_are_refused(guard: Guard, config: ServeConfig, triton: FakeTriton) -> None:
    with socket.create_connection(("127.0.0.1", config.http_port), timeout=10) as connection:
        connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nHost: example.org\r\n\r\n")
        assert b" 400 " in connection.recv(100)
    assert triton.seen == []


def test_nested_arrays_compressed_bodies_and_forms_reach_nothing(
    ask: Callable[..., Reply], triton: FakeTriton
) -> None:
    nested = b"[" * 50_000
    assert "nested at most 32 levels" in ask("POST", INFER, nested).error
    assert ask("POST", "/v2/repository/index", nested).status == 400
    assert ask("POST", INFER, nested, Inference_Header_Content_Length="50000").status == 400
    assert ask("POST", INFER, b"{}", Content_Type="text/plain").status == 415
    reply = ask("POST", INFER, gzip.compress(bytes(50_000_000)), Content_Encoding="gzip")
    assert (reply.status, triton.seen) == (415, [])


def test_a_large_body_is_refused_before_it_is_read(ask: Callable[..., Reply], triton: FakeTriton) -> None:
    reply = ask("POST", INFER, bytes(300_000))
    assert (reply.status, triton.seen) == (413, [])
    assert reply.error == "expected at most 100,000 bytes; got 300,000. Send a smaller file."


def test_a_client_that_asks_whether_to_send_is_told_yes_or_no(
    guard: Guard, config: ServeConfig, triton: FakeTriton
) -> None:
    for length, first in ((2, b" 100 "), (100_001, b" 413 ")):
        with socket.create_connection(("127.0.0.1", config.http_port), timeout=10) as connection:
            head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
            connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
            assert first in connection.recv(1000).splitlines()[0]
            if length == 2:
                connection.sendall(b"{}")
                assert b" 200 " in connection.recv(1000).splitlines()[0]
    assert len(triton.seen) == 1


def test_without_triton_the_answer_can_be_retried(
    guard: Guard, ask: Callable[..., Reply], triton: FakeTriton
) -> None:
    triton.is_rude = True
    assert ask("POST", INFER, b"{}").status == 503
    guard.lead_to(Endpoint(address="127.77.1.3", http_port=9, grpc_port=9, metrics_port=9))
    assert ask("POST", INFER, b"{}").status == 503
    guard.lead_to(None)
    reply = ask("GET", "/v2/health/ready")
    assert (reply.status, reply.error.partition(":")[0]) == (503, "Triton is not there")
    triton.is_rude = False
    guard.lead_to(triton.endpoint)
    assert ask("GET", "/v2/health/ready").status == 200


def test_slow_and_broken_senders_hold_up_nobody_and_leave_nothing_held(
    guard: Guard, ask: Callable[..., Reply], config: ServeConfig, triton: FakeTriton, monkeypatch: Any
) -> None:
    monkeypatch.setattr(module, "BODY_TIMEOUT_S", 0.5)
    head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90000\r\n\r\n".encode()
    slow = [socket.create_connection(("127.0.0.1", config.http_port), timeout=10) for _ in range(40)]
    for connection in slow:
        connection.sendall(head + b"{" * 5000)
    slow.pop().close()
    assert ask("GET", "/v2").status == 200
    assert ask("POST", INFER, b"{}").status == 200
    for connection in slow:
        assert b" 408 " in connection.recv(1000).splitlines()[0]
        connection.close()
    assert len(triton.seen) == 2
    assert guard._room.held_bytes == 0


def test_a_body_that_trickles_in_has_a_deadline(
    guard: Guard, config: ServeConfig, triton: FakeTriton, monkeypatch: Any
) -> None:
    monkeypatch.setattr(module, "REQUEST_TIMEOUT_S", 0.5)
    head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90000\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", config.http_port), timeout=10) as connection:
        connection.sendall(head)
        for _ in range(14):
            connection.sendall(b"{")
            time.sleep(0.05)
        assert b" 408 " in connection.recv(1000).splitlines()[0]
    assert triton.seen == []


def test_more_than_fits_is_refused_for_now(
    guard: Guard, ask: Callable[..., Reply], config: ServeConfig, monkeypatch: Any
) -> None:
    monkeypatch.setattr(guard._room, "most_bytes", 100_000)
    with socket.create_connection(("127.0.0.1", config.http_port), timeout=10) as other:
        head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90000\r\n\r\n".encode()
        other.sendall(head + b"[" * 80_000)
        end = time.monotonic() + 10
        while guard._room.held_bytes < 80_000 and time.monotonic() < end:
            time.sleep(0.01)
        assert ask("POST", INFER, b"-" * 50_000).status == 503
        assert ask("POST", INFER, b"-" * 5000).status == 200
    end = time.monotonic() + 10
    while guard._room.held_bytes and time.monotonic() < end:
        time.sleep(0.01)
    assert ask("POST", INFER, b"-" * 50_000).status == 200


def test_what_is_not_http_is_refused_and_nothing_is_printed(
    guard: Guard, config: ServeConfig, triton: FakeTriton, capfd: pytest.CaptureFixture[str]
) -> None:
    start = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\n".encode()
    for raw in (
        b"nonsense\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        start + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n",
        start + b"Transfer-Encoding: x\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", config.http_port), timeout=10) as connection:
            connection.sendall(raw)
            assert b" 4" in connection.recv(1000).splitlines()[0], raw[:100]
    assert triton.seen == []
    assert capfd.readouterr() == ("", "")


def test_a_late_triton_is_given_up(
    ask: Callable[..., Reply], triton: FakeTriton, monkeypatch: Any, config: ServeConfig
) -> None:
    monkeypatch.setattr(module, "ANSWER_TIMEOUT_S", 0.2)
    triton.wait_s = 1.0
    fresh = take_ports(ServeConfig(http_port=0, grpc_port=0, metrics_port=0))
    with Guard(fresh) as late:
        late.lead_to(triton.endpoint)
        assert ask("POST", INFER, b"{}", port=fresh.http_port).status == 504


def test_it_stops_at_once_and_frees_its_ports(config: ServeConfig) -> None:
    for _ in range(2):
        with Guard(config):
            idle = socket.create_connection(("127.0.0.1", config.http_port), timeout=10)
            with pytest.raises(ConfigError, match="free ports for --http-port, --grpc-port and"):
                Guard(config).__enter__()
            start = time.monotonic()
        assert time.monotonic() - start < 5
        idle.close()
