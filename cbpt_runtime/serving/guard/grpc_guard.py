"""Between the network and Triton's gRPC: listens on the public port and passes on what is admitted.

Messages stay bytes: what was looked at is what Triton gets, and nothing else of a call but its deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from cbpt_runtime.serving.config import Endpoint, ServeConfig
from cbpt_runtime.serving.guard.admission import (
    ANSWER_TIMEOUT_S,
    FULL,
    NOT_THERE,
    REQUEST_TIMEOUT_S,
    Refusal,
    Room,
)
from cbpt_runtime.serving.guard.grpc_admission import refuse_message, refuse_method

if TYPE_CHECKING:
    import grpc

PATIENCE_S = 5.0  # for a message while others wait for their turn
TURN_TIMEOUT_S = 30.0
MAX_READERS = 16  # of messages, each of unknown size until it is there
_GRACE_S = 1.0
_LARGEST = 2**31 - 1
_CODES = {
    HTTPStatus.BAD_REQUEST: "INVALID_ARGUMENT",
    HTTPStatus.FORBIDDEN: "PERMISSION_DENIED",
    HTTPStatus.NOT_FOUND: "UNIMPLEMENTED",
    HTTPStatus.REQUEST_TIMEOUT: "DEADLINE_EXCEEDED",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "RESOURCE_EXHAUSTED",
    HTTPStatus.SERVICE_UNAVAILABLE: "UNAVAILABLE",
}


class GrpcGuard:
    """Listens on the public gRPC port; lives in the event loop it is started in.

    Args:
        config: The operator's settings, with the port to listen on.
        inner_models: Models that only an ensemble may ask.
        room: Where messages are held.
    """

    def __init__(self, config: ServeConfig, *, inner_models: Collection[str], room: Room) -> None:
        self._config = config
        self._inner_models = frozenset(inner_models)
        self._room = room
        self._readers = _Readers()
        self._server: grpc.aio.Server | None = None
        self._channel: grpc.aio.Channel | None = None
        self._led_to: Endpoint | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self.endpoint: Endpoint | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: The port is taken.
        """
        import grpc.aio

        self._server = grpc.aio.server(
            options=(
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", self._config.max_request_bytes),
                ("grpc.max_concurrent_streams", 1024),
                # What is compressed comes as it was sent, and is no message then.
                ("grpc.per_message_decompression", 0),
                # No more of a message is taken in than a window before somebody reads it.
                ("grpc.http2.bdp_probe", 0),
            )
        )
        self._server.add_generic_rpc_handlers((_handlers(self),))
        place = f"{self._config.address}:{self._config.grpc_port}"
        try:
            self._server.add_insecure_port(place)
        except RuntimeError as error:
            raise OSError(f"{place} is taken") from error
        await self._server.start()

    async def stop(self) -> None:
        """Stop listening; what has no answer yet is dropped."""
        if self._server is not None:
            await self._server.stop(_GRACE_S)
        if self._channel is not None:
            await self._channel.close()
        await asyncio.gather(*self._closing)

    async def answer(self, method: str, context: grpc.aio.ServicerContext) -> bytes:
        """Answer a call, or end it with a code and a sentence."""
        import grpc

        refusal = refuse_method(method)
        if refusal is None:
            found = await self._readers.read(context)
            if not isinstance(found, Refusal):
                found = await self._ask(method, found, context)
            if not isinstance(found, Refusal):
                return found
            refusal = found
        await context.abort(getattr(grpc.StatusCode, _CODES[refusal.status]), refusal.text)
        raise RuntimeError("an aborted call goes on")

    async def _ask(self, method: str, message: bytes, context: grpc.aio.ServicerContext) -> bytes | Refusal:
        if not self._room.take(len(message)):
            return FULL
        try:
            refusal = refuse_message(method, message, inner_models=self._inner_models)
            return refusal or await self._forward(method, message, context)
        finally:
            self._room.give_back(len(message))

    async def _forward(
        self, method: str, message: bytes, context: grpc.aio.ServicerContext
    ) -> bytes | Refusal:
        import grpc

        endpoint = self.endpoint
        if endpoint is None:
            return NOT_THERE
        left_s = context.time_remaining()
        ask: Any = self._channel_to(endpoint).unary_unary(method)
        try:
            answer: bytes = await ask(
                message,
                timeout=ANSWER_TIMEOUT_S if left_s is None else min(left_s, ANSWER_TIMEOUT_S),
                metadata=endpoint.metadata,
            )
        except grpc.aio.AioRpcError as error:
            text = error.details() or ""
            if endpoint.address in text:  # where it is stays between us
                return NOT_THERE
            await context.abort(error.code(), text)
            raise
        return answer

    def _channel_to(self, endpoint: Endpoint) -> grpc.aio.Channel:
        import grpc.aio

        if self._channel is None or self._led_to is not endpoint:
            if self._channel is not None:
                task = asyncio.create_task(self._channel.close(_GRACE_S))
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
            self._led_to = endpoint
            self._channel = grpc.aio.insecure_channel(
                f"{endpoint.address}:{endpoint.grpc_port}",
                options=(
                    ("grpc.enable_http_proxy", 0),
                    ("grpc.max_send_message_length", _LARGEST),
                    ("grpc.max_receive_message_length", _LARGEST),
                ),
            )
        return self._channel


class _Readers:
    """Takes in a few messages at a time; who is slow gives way when others wait, the oldest first."""

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(MAX_READERS)
        self._waiting = 0
        self._patient: dict[asyncio.Timeout, float] = {}  # whose time was not cut, and when they began

    async def read(self, context: grpc.aio.ServicerContext) -> bytes | Refusal:
        """Return the whole message."""
        if not await self._take_turn():
            return FULL
        start = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(PATIENCE_S if self._waiting else REQUEST_TIMEOUT_S) as limit:
                if not self._waiting:
                    self._patient[limit] = start
                message = await context.read()
        except TimeoutError:
            return Refusal(
                status=HTTPStatus.REQUEST_TIMEOUT, text="expected the rest of the message in time."
            )
        finally:
            self._patient.pop(limit, None)
            self._turns.release()
        if not isinstance(message, bytes):
            return Refusal(status=HTTPStatus.BAD_REQUEST, text="expected a message; got none.")
        return message

    async def _take_turn(self) -> bool:
        if self._turns.locked() and self._patient:
            slow = next(iter(self._patient))
            end = self._patient.pop(slow) + PATIENCE_S
            if not slow.expired():
                slow.reschedule(max(end, asyncio.get_running_loop().time()))
        self._waiting += 1
        try:
            async with asyncio.timeout(TURN_TIMEOUT_S):
                await self._turns.acquire()
        except TimeoutError:
            return False
        finally:
            self._waiting -= 1
        return True


def _handlers(guard: GrpcGuard) -> grpc.GenericRpcHandler:
    """Every method there is, as if a stream of messages came: one that is not wanted is not taken in."""
    import grpc

    class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            async def handle(_: object, context: grpc.aio.ServicerContext) -> bytes:
                return await guard.answer(call.method, context)

            return grpc.stream_unary_rpc_method_handler(handle)

    return Handlers()
