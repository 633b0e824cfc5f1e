"""The page's server: three files, four paths of one model, and refusals.

Requests that another web page sends, or that arrive under another host name (DNS rebinding), are refused.
Every connection carries one request, and there is a limited number of them, for a limited time.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Coroutine, Mapping
from http import HTTPStatus
from importlib.resources import files
from string import Template
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

from cbpt_runtime.errors import ConfigError, WorkError
from cbpt_runtime.runtime.triton_models import ALARM_THRESHOLD
from cbpt_runtime.serving.guard.admission import (
    HEADER_LENGTH,
    Names,
    Refusal,
    is_loopback_name,
    refuse_caller,
)
from cbpt_runtime.serving.loop_thread import LoopThread, UntilStopped

MAX_ANSWER_BYTES = 16_000_000
MAX_CONNECTIONS = 32
REQUEST_TIMEOUT_S = 15.0  # for the whole of it, however it trickles in
MAX_IMAGE_BYTES = 20_000_000
MAX_ENVELOPE_BYTES = 65_536  # the JSON around the image
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
    "Server": "cbpt-runtime",
}
_JSON = "application/json"
_BYTES = "application/octet-stream"
_TEXT = {"html": "text/html", "js": "text/javascript", "css": "text/css"}


class UiServer:
    """The page and its way to Triton, in a thread of its own.

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
        self._triton = _parse_endpoint(triton_url)
        _check_loopback(host)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", model):
            raise ConfigError(
                expected="the name of a model",
                got=repr(model),
                fix="Give the name the repository was made with.",
            )
        self._pages = _render(
            {
                "model": model,
                "max_image_bytes": str(max_image_bytes),
                "alarm_threshold": str(ALARM_THRESHOLD if alarm_threshold is None else alarm_threshold),
            }
        )
        self._readable = {"/v2/health/live", "/v2/health/ready", f"/v2/models/{model}"}
        self._infer = f"/v2/models/{model}/infer"
        self._max_body_bytes = max_image_bytes + MAX_ENVELOPE_BYTES
        self._timeout_s = timeout_s
        self._host, self._port = host, port
        self._thread: LoopThread | None = None

    @property
    def url(self) -> str:
        """Where the page is, once started."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}/"

    def start(self) -> Self:
        """Serve in a thread of its own.

        Raises:
            WorkError: The port is taken or cannot be used.
        """
        thread = LoopThread(self._serve, "ui")
        try:
            thread.start()
        except (OSError, OverflowError) as error:
            raise WorkError(
                expected=f"a free port for the page on {self._host}",
                got=f"{self._port} ({error})",
                fix="Choose another --ui-port.",
            ) from error
        self._thread = thread
        return self

    def stop(self) -> None:
        """Stop listening; answers under way are dropped."""
        if self._thread is not None:
            self._thread.stop()
            self._thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def _serve(self, until_stopped: UntilStopped) -> None:
        async with aiohttp.ClientSession(
            f"http://{self._triton}",
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
        ) as session:
            self._places = _Places(self._handler(session))
            runner = web.ServerRunner(self._places, shutdown_timeout=0.1)
            await runner.setup()
            try:
                site = web.TCPSite(runner, self._host, self._port, backlog=MAX_CONNECTIONS)
                await site.start()
                self._port = runner.addresses[0][1]
                await until_stopped()
            finally:
                await runner.cleanup()

    def _handler(
        self, session: aiohttp.ClientSession
    ) -> Callable[[web.BaseRequest], Coroutine[Any, Any, web.StreamResponse]]:
        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            answer = await self._answer(session, request)
            if isinstance(answer, Refusal):
                answer = web.Response(status=answer.status, body=answer.content, content_type=_JSON)
            answer.headers.update(_HEADERS)
            answer.force_close()
            return answer

        return handle

    async def _answer(
        self, session: aiohttp.ClientSession, request: web.BaseRequest
    ) -> web.Response | Refusal:
        path = request.raw_path
        refusal = refuse_caller(request.headers, Names())
        if refusal is not None:
            return refusal
        match request.method:
            case "GET" if path in self._pages:
                kind, content = self._pages[path]
                return web.Response(body=content, headers={"Content-Type": kind})
            case "GET" if path in self._readable:
                return await self._forward(session, "GET", path)
            case "GET" if path == self._infer:
                return Refusal(status=HTTPStatus.METHOD_NOT_ALLOWED, text="expected a POST request; got GET.")
            case "GET":
                text = f"expected the page or its model; got {path[:200]}."
                return Refusal(status=HTTPStatus.NOT_FOUND, text=text)
            case "POST" if path == self._infer:
                return await self._ask(session, request)
            case "POST":
                text = f"expected the model of this page; got {path[:200]}."
                return Refusal(status=HTTPStatus.NOT_FOUND, text=text)
            case method:
                return Refusal(
                    status=HTTPStatus.NOT_IMPLEMENTED, text=f"expected GET or POST; got {method[:20]}."
                )

    async def _ask(self, session: aiohttp.ClientSession, request: web.BaseRequest) -> web.Response | Refusal:
        """Pass a question to the model on, once it has come whole."""
        length = request.content_length
        if length is None:
            return Refusal(status=HTTPStatus.LENGTH_REQUIRED, text="expected a Content-Length; got none.")
        if length > self._max_body_bytes:
            text = f"expected at most {self._max_body_bytes:,} bytes; got {length:,}. Send a smaller file."
            return Refusal(status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text=text)
        body = await request.content.read()
        self._places.give(request.protocol, self._timeout_s + REQUEST_TIMEOUT_S)
        header_length = request.headers.get(HEADER_LENGTH, "")
        is_binary = re.fullmatch(r"[0-9]{1,9}", header_length)
        headers = {"Content-Type": _BYTES if is_binary else _JSON}
        headers |= {HEADER_LENGTH: header_length} if is_binary else {}
        return await self._forward(session, "POST", request.raw_path, body, headers)

    async def _forward(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> web.Response | Refusal:
        try:
            async with session.request(
                method, path, data=body, headers=headers, allow_redirects=False
            ) as response:
                content = bytearray()
                async for piece in response.content.iter_chunked(MAX_ANSWER_BYTES):
                    content += piece
                    if len(content) > MAX_ANSWER_BYTES:
                        text = f"expected an answer of at most {MAX_ANSWER_BYTES:,} bytes."
                        return Refusal(status=HTTPStatus.BAD_GATEWAY, text=text)
        except TimeoutError:
            text = f"expected Triton's answer within {self._timeout_s:g} s; got none. Try again later."
            return Refusal(status=HTTPStatus.GATEWAY_TIMEOUT, text=text)
        except (aiohttp.ClientError, OSError) as error:
            text = f"expected Triton at {self._triton}; got {error}. Is it running?"
            return Refusal(status=HTTPStatus.BAD_GATEWAY, text=text)
        # Only these two types, so that nothing Triton repeats from a request is ever read as a page.
        kept = {"Content-Type": _JSON if response.content_type == _JSON else _BYTES}
        if (length := response.headers.get(HEADER_LENGTH)) is not None:
            kept[HEADER_LENGTH] = length
        return web.Response(status=response.status, body=bytes(content), headers=kept)


class _Places(web.Server):
    """A limited number of connections, each for a limited time.

    A browser that finds no place tries again by itself.
    """

    def __init__(self, handler: Callable[[web.BaseRequest], Any]) -> None:
        quiet = logging.Logger("page")
        quiet.addHandler(logging.NullHandler())  # what people look at is theirs
        super().__init__(handler, access_log=None, logger=quiet)
        self._clocks: dict[Any, asyncio.TimerHandle] = {}

    def connection_made(self, handler: Any, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        if len(self._clocks) >= MAX_CONNECTIONS:
            transport.abort()
        else:
            self._clocks[handler] = _cut_off_after(REQUEST_TIMEOUT_S, handler)

    def give(self, protocol: Any, seconds: float) -> None:
        """Let a connection that is still there go on for so long from now."""
        if protocol in self._clocks:
            self._clocks[protocol].cancel()
            self._clocks[protocol] = _cut_off_after(seconds, protocol)

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        if handler in self._clocks:
            self._clocks.pop(handler).cancel()
        super().connection_lost(handler, exc)


def _cut_off_after(seconds: float, protocol: Any) -> asyncio.TimerHandle:
    def cut_off() -> None:
        if protocol.transport is not None:
            protocol.transport.abort()

    return asyncio.get_running_loop().call_later(seconds, cut_off)


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


def _parse_endpoint(url: str) -> str:
    """Return host and port of Triton."""
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
    return f"{f'[{host}]' if ':' in host else host}:{80 if port is None else port}"


def _check_loopback(host: str) -> None:
    if not is_loopback_name(host):
        raise ConfigError(
            expected="a loopback address for the page, which authenticates nobody",
            got=repr(host),
            fix="Leave it at 127.0.0.1; for others put a gateway with TLS and authentication in front.",
        )
