"""The page's server: three files, four paths of one model, and refusals.

Requests that another web page sends, or that arrive under another host name (DNS rebinding), are refused.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from string import Template
from typing import Any, Self
from urllib.parse import urlsplit

from cbpt_runtime.errors import ConfigError, WorkError
from cbpt_runtime.runtime.triton_models import ALARM_THRESHOLD
from cbpt_runtime.serving.guard.admission import HEADER_LENGTH as _HEADER_LENGTH
from cbpt_runtime.serving.guard.admission import Names, is_loopback_name, refuse_caller

MAX_ANSWER_BYTES = 16_000_000
MAX_CONNECTIONS = 32
CLIENT_TIMEOUT_S = 30.0
REQUEST_TIMEOUT_S = 15.0  # for the whole of it, however it trickles in
_DRAIN_S = 2.0
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
MAX_IMAGE_BYTES = 20_000_000
MAX_ENVELOPE_BYTES = 65_536  # the JSON around the image
_TEXT = {"html": "text/html", "js": "text/javascript", "css": "text/css"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the handlers need to know.

    Attributes:
        triton: Host and port of Triton's HTTP endpoint.
        pages: Content type and content by path.
        readable: Paths of Triton that may be read.
        infer: The one path that takes a request with a body.
        max_body_bytes: Of such a request.
        timeout_s: How long Triton may take for an answer.
    """

    triton: tuple[str, int]
    pages: Mapping[str, tuple[str, bytes]]
    readable: frozenset[str]
    infer: str
    max_body_bytes: int
    timeout_s: float


class Server(ThreadingHTTPServer):
    """One thread for each connection, and a limited number of them."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, host: str, port: int, settings: Settings) -> None:
        self.settings = settings
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__((host, port), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a place, or close the connection at once; a browser tries again by itself."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Give the place back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that went away."""


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server
    server_version = "cbpt-runtime"
    sys_version = ""
    timeout = CLIENT_TIMEOUT_S

    def setup(self) -> None:
        """Start the clock of the request."""
        super().setup()
        self._clock = threading.Timer(REQUEST_TIMEOUT_S, self._cut_off)
        self._clock.daemon = True
        self._clock.start()

    def finish(self) -> None:
        """Stop it, answered or not."""
        self._clock.cancel()
        super().finish()

    def _cut_off(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        """Answer with the page, or with something about the model."""
        settings = self.server.settings
        if not self._is_welcome():
            return
        if self.path in settings.pages:
            kind, content = settings.pages[self.path]
            self._answer(HTTPStatus.OK, content, {"Content-Type": kind})
        elif self.path in settings.readable:
            self._forward("GET", None)
        elif self.path == settings.infer:
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "expected a POST request; got GET.")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"expected the page or its model; got {self.path[:200]}.")

    def do_POST(self) -> None:
        """Pass a question to the model on."""
        limit = self.server.settings.max_body_bytes
        length = self.headers.get("Content-Length", "")
        if not self._is_welcome():
            return
        if self.path != self.server.settings.infer:
            self._refuse(HTTPStatus.NOT_FOUND, f"expected the model of this page; got {self.path[:200]}.")
        elif "Transfer-Encoding" in self.headers or not re.fullmatch(r"[0-9]{1,12}", length):
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length; got none.")
        elif int(length) > limit:
            text = f"expected at most {limit:,} bytes; got {int(length):,}. Send a smaller file."
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
        else:
            body = self.rfile.read(int(length))
            self._clock.cancel()
            if len(body) == int(length):
                self._forward("POST", body)

    def _is_welcome(self) -> bool:
        """Whether the request was sent to this machine by name, and not by somebody else's page."""
        given = {name: self.headers[name] for name in ("Host", "Origin") if name in self.headers}
        refusal = refuse_caller(given, Names())
        if refusal is not None:
            self._refuse(refusal.status, refusal.text)
        return refusal is None

    def _forward(self, method: str, body: bytes | None) -> None:
        settings = self.server.settings
        headers = {}
        header_length = self.headers.get(_HEADER_LENGTH, "")
        if body is not None:
            is_binary = re.fullmatch(r"[0-9]{1,9}", header_length)
            headers["Content-Type"] = "application/octet-stream" if is_binary else "application/json"
            headers |= {_HEADER_LENGTH: header_length} if is_binary else {}
        connection = http.client.HTTPConnection(*settings.triton, timeout=settings.timeout_s)
        try:
            connection.request(method, self.path, body, headers)
            response = connection.getresponse()
            content = response.read(MAX_ANSWER_BYTES + 1)
        except TimeoutError:
            text = f"expected Triton's answer within {settings.timeout_s:g} s; got none. Try again later."
            self._refuse(HTTPStatus.GATEWAY_TIMEOUT, text)
            return
        except (OSError, http.client.HTTPException) as error:
            text = (
                f"expected Triton at {settings.triton[0]}:{settings.triton[1]}; got {error}. Is it running?"
            )
            self._refuse(HTTPStatus.BAD_GATEWAY, text)
            return
        finally:
            connection.close()
        if len(content) > MAX_ANSWER_BYTES:
            self._refuse(HTTPStatus.BAD_GATEWAY, f"expected an answer of at most {MAX_ANSWER_BYTES:,} bytes.")
            return
        # Only these two types, so that nothing Triton repeats from a request is ever read as a page.
        is_json = response.headers.get_content_type() == "application/json"
        kept = {"Content-Type": "application/json" if is_json else "application/octet-stream"}
        if (length := response.headers.get(_HEADER_LENGTH)) is not None:
            kept[_HEADER_LENGTH] = length
        self._answer(response.status, content, kept)

    def _answer(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, **headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        self._answer(status, json.dumps({"error": text}).encode(), {"Content-Type": "application/json"})
        self._drain()

    def _drain(self) -> None:
        """Let go of a body nobody reads: closing on unread bytes would cut the answer off."""
        self.connection.settimeout(_DRAIN_S)
        try:
            self.connection.shutdown(socket.SHUT_WR)
            for _ in range(1024):
                if not self.connection.recv(65_536):
                    break
        except OSError:
            pass  # the client has gone: nothing left to be polite about

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what the standard library refuses by itself, in Triton's form."""
        self.close_connection = True
        content = json.dumps({"error": message or HTTPStatus(code).phrase}).encode()
        self._answer(code, content, {"Content-Type": "application/json"})

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged: what people look at is theirs."""


class UiServer:
    """The page and its way to Triton.

    Args:
        triton_url: Triton's HTTP endpoint, such as ``http://127.0.0.1:8000``.
        model: Name of the model that takes image files; no other can be reached.
        host: A loopback address.
        port: 0 takes a free one.
        max_image_bytes: Larger images are refused before they are read.
        timeout_s: How long Triton may take for an answer.
        alarm_threshold: Above which alarm the page warns; the counters' own where the repository names none.

    Raises:
        ConfigError: An address or a name that cannot be used.
    """

    def __init__(
        self,
        triton_url: str,
        model: str,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        max_image_bytes: int = MAX_IMAGE_BYTES,
        timeout_s: float = 60.0,
        alarm_threshold: float | None = None,
    ) -> None:
        address = _parse_endpoint(triton_url)
        _check_loopback(host)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", model):
            raise ConfigError(
                expected="the name of a model",
                got=repr(model),
                fix="Give the name the repository was made with.",
            )
        self._settings = Settings(
            triton=address,
            pages=_render(
                {
                    "model": model,
                    "max_image_bytes": str(max_image_bytes),
                    "alarm_threshold": str(ALARM_THRESHOLD if alarm_threshold is None else alarm_threshold),
                }
            ),
            readable=frozenset({"/v2/health/live", "/v2/health/ready", f"/v2/models/{model}"}),
            infer=f"/v2/models/{model}/infer",
            max_body_bytes=max_image_bytes + MAX_ENVELOPE_BYTES,
            timeout_s=timeout_s,
        )
        self._host, self._port = host, port
        self._server: Server | None = None

    @property
    def url(self) -> str:
        """Where the page is, once started."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        port = self._port if self._server is None else self._server.server_address[1]
        return f"http://{host}:{port}/"

    def start(self) -> Self:
        """Serve in a thread of its own.

        Raises:
            WorkError: The port is taken or cannot be used.
        """
        try:
            self._server = Server(self._host, self._port, self._settings)
        except (OSError, OverflowError) as error:
            raise WorkError(
                expected=f"a free port for the page on {self._host}",
                got=f"{self._port} ({error})",
                fix="Choose another --ui-port.",
            ) from error
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="ui", daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop listening; answers under way are dropped."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _render(values: Mapping[str, str]) -> dict[str, tuple[str, bytes]]:
    folder = files("cbpt_runtime.serving.page")
    pages = {}
    for name in ("index.html", "ui.js", "ui.css"):
        text = (folder / name).read_text(encoding="utf-8")
        if name == "index.html":
            text = Template(text).substitute(values)
        kind = f"{_TEXT[name.rsplit('.', 1)[1]]}; charset=utf-8"
        pages["/" if name == "index.html" else f"/{name}"] = (kind, text.encode())
    return pages


def _parse_endpoint(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme != "http" or not host or parts.path not in ("", "/") or parts.query or parts.username:
        raise ConfigError(
            expected="Triton's HTTP endpoint, such as http://127.0.0.1:8000",
            got=repr(url),
            fix="Correct the URL.",
        )
    return host, 80 if port is None else port


def _check_loopback(host: str) -> None:
    if not is_loopback_name(host):
        raise ConfigError(
            expected="a loopback address for the page, which authenticates nobody",
            got=repr(host),
            fix="Leave it at 127.0.0.1; for others put a gateway with TLS and authentication in front.",
        )
