"""Between the network and Triton's HTTP: listens on the public ports and passes on what is admitted.

A request reaches the Triton that runs now when it has come whole. `grpc_guard` does the same for gRPC, in
the same thread.
"""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Self

from cbpt_runtime.errors import ConfigError
from cbpt_runtime.serving.config import Endpoint, ServeConfig
from cbpt_runtime.serving.guard.admission import (
    ANSWER_TIMEOUT_S,
    FULL,
    HEADER_LENGTH,
    NOT_THERE,
    REQUEST_TIMEOUT_S,
    Names,
    Refusal,
    Room,
    refuse_body,
    refuse_caller,
)
from cbpt_runtime.serving.guard.admission import refuse_request as refuse_head
from cbpt_runtime.serving.guard.grpc_guard import GrpcGuard
from cbpt_runtime.serving.loop_thread import LoopThread, UntilStopped

if TYPE_CHECKING:
    import aiohttp
    from aiohttp import web

BODY_TIMEOUT_S = 30.0  # between two pieces of a body
MAX_HELD_BODIES = 8  # of the largest size, of both protocols together
_CONNECT_TIMEOUT_S = 10.0
_IDLE_TIMEOUT_S = 1.0  # of a connection to Triton, which when told to stop waits for their end
_BACKLOG = 1024
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_KINDS = ("application/json", "application/octet-stream", "text/plain")
Answer = tuple[int, bytes, dict[str, str]]


class Guard:
    """Listens on the public ports, in a thread of its own.

    Args:
        config: The operator's settings, with the ports to listen on.
        inner_models: Models that only an ensemble may ask.
    """

    def __init__(self, config: ServeConfig, *, inner_models: Collection[str] = ()) -> None:
        self._config = config
        self._inner_models = frozenset(inner_models)
        self._names = Names(is_open=not config.is_loopback, others=config.host_names)
        self._endpoint: Endpoint | None = None
        self._room = Room(MAX_HELD_BODIES * config.max_request_bytes)
        self._grpc = GrpcGuard(config, inner_models=inner_models, room=self._room)
        self._readers = ThreadPoolExecutor(1, "guard-reader")  # the memory of one body's check at a time
        self._thread = LoopThread(self._serve, "guard")

    def __enter__(self) -> Self:
        """Listen.

        Raises:
            ConfigError: A port is taken.
        """
        try:
            self._thread.start()
        except OSError as error:
            raise ConfigError(
                expected="free ports for --http-port, --grpc-port and --metrics-port on "
                f"{self._config.address}",
                got=str(error),
                fix="Stop what listens there, or choose other ports (0 takes a free one).",
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening; what has no answer yet is dropped."""
        self._thread.stop()

    def lead_to(self, endpoint: Endpoint | None) -> None:
        """From now on let requests through to this Triton; to none, and answer 503, when None."""
        self._endpoint = self._grpc.endpoint = endpoint

    async def _serve(self, until_stopped: UntilStopped) -> None:
        import aiohttp
        from aiohttp import web

        quiet = logging.Logger("guard")
        quiet.addHandler(logging.NullHandler())
        timeout = aiohttp.ClientTimeout(total=None, connect=_CONNECT_TIMEOUT_S, sock_read=ANSWER_TIMEOUT_S)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=timeout,
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
        ) as session:
            runners = []
            try:
                for port, answer in (
                    (self._config.http_port, self._answer_http),
                    (self._config.metrics_port, self._answer_metrics),
                ):
                    handler = self._handler(session, answer)
                    server = web.Server(handler, access_log=None, logger=quiet, auto_decompress=False)
                    runners.append(web.ServerRunner(server, shutdown_timeout=1.0))
                    await runners[-1].setup()
                    site = web.TCPSite(runners[-1], str(self._config.address), port, backlog=_BACKLOG)
                    await site.start()
                await self._grpc.start()
                await until_stopped()
            finally:
                await self._grpc.stop()
                for runner in runners:
                    await runner.cleanup()
                self._readers.shutdown(wait=False)

    def _handler(
        self,
        session: aiohttp.ClientSession,
        answer: Callable[[aiohttp.ClientSession, web.BaseRequest], Coroutine[Any, Any, Answer]],
    ) -> Callable[[web.BaseRequest], Coroutine[Any, Any, web.StreamResponse]]:
        from aiohttp import web

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            refusal = refuse_caller(request.headers, self._names)
            if len(request.headers.getall("Host", ())) > 1:
                refusal = Refusal(status=HTTPStatus.BAD_REQUEST, text="expected one Host; got several.")
            status, content, headers = _refused(refusal) if refusal else await answer(session, request)
            return web.Response(status=status, body=content, headers={**_HEADERS, **headers})

        return handle

    async def _answer_http(self, session: aiohttp.ClientSession, request: web.BaseRequest) -> Answer:
        refusal = refuse_head(
            request.method,
            request.raw_path,
            request.headers,
            max_body_bytes=self._config.max_request_bytes,
            inner_models=self._inner_models,
        )
        if refusal is not None:
            return _refused(refusal)
        if request.method == "GET":
            return await self._forward(session, "GET", request.raw_path)
        body = bytearray()
        try:
            refusal = await self._read(request, body)
            header_length = request.headers.get(HEADER_LENGTH)
            if refusal is None:
                loop = asyncio.get_running_loop()
                refusal = await loop.run_in_executor(self._readers, refuse_body, body, header_length)
            if refusal is not None:
                return _refused(refusal)
            kind = _KINDS[0] if header_length is None else _KINDS[1]
            headers = {"Content-Type": kind}
            if header_length is not None:
                headers[HEADER_LENGTH] = header_length
            return await self._forward(session, "POST", request.raw_path, body, headers)
        finally:
            self._room.give_back(len(body))

    async def _answer_metrics(self, session: aiohttp.ClientSession, request: web.BaseRequest) -> Answer:
        if request.method != "GET":
            return _refused(Refusal(status=HTTPStatus.METHOD_NOT_ALLOWED, text="expected GET."))
        if request.raw_path != "/metrics":
            return _refused(Refusal(status=HTTPStatus.NOT_FOUND, text="expected the path /metrics."))
        return await self._forward(session, "GET", "/metrics", is_metrics=True)

    async def _read(self, request: web.BaseRequest, body: bytearray) -> Refusal | None:
        """Read a body whose length was checked; all that is held at once is limited."""
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                while not request.content.at_eof():
                    async with asyncio.timeout(BODY_TIMEOUT_S):
                        piece = await request.content.readany()
                    if not self._room.take(len(piece)):
                        return FULL
                    body += piece
        except TimeoutError:
            return Refusal(status=HTTPStatus.REQUEST_TIMEOUT, text="expected the rest of the body in time.")
        return None

    async def _forward(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        body: bytes | bytearray = b"",
        headers: Mapping[str, str] | None = None,
        *,
        is_metrics: bool = False,
    ) -> Answer:
        import aiohttp

        endpoint = self._endpoint
        if endpoint is None:
            return _refused(NOT_THERE)
        port = endpoint.metrics_port if is_metrics else endpoint.http_port
        try:
            async with session.request(
                method,
                f"http://{endpoint.address}:{port}{path}",
                data=io.BytesIO(body) if method == "POST" else None,
                headers={**(headers or {}), **endpoint.headers},
                allow_redirects=False,
            ) as response:
                content = await response.read()
        except TimeoutError:
            return _refused(Refusal(status=HTTPStatus.GATEWAY_TIMEOUT, text="Triton did not answer in time."))
        except (aiohttp.ClientError, OSError):
            return _refused(NOT_THERE)
        # Only these types, so that nothing Triton repeats from a request is ever read as a page.
        kind = response.headers.get("Content-Type", "")
        kept = {"Content-Type": kind if kind.partition(";")[0] in _KINDS else _KINDS[1]}
        if (length := response.headers.get(HEADER_LENGTH)) is not None:
            kept[HEADER_LENGTH] = length
        return response.status, content, kept


def _refused(refusal: Refusal) -> Answer:
    """Return a refusal in Triton's own form."""
    return refusal.status, refusal.content, {"Content-Type": "application/json"}
