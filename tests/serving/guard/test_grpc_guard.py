"""The public gRPC port, before a stand-in for Triton."""

from __future__ import annotations

import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from cbpt_runtime.errors import ConfigError
from cbpt_runtime.serving.config import Endpoint, ServeConfig, take_ports
from cbpt_runtime.serving.guard import grpc_guard as module
from cbpt_runtime.serving.guard.http_guard import Guard

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # grpc's own
    import grpc
    from tritonclient.grpc import service_pb2

SERVICE = "/inference.GRPCInferenceService"
INFER = f"{SERVICE}/ModelInfer"
MOST_BYTES = 200_000


@dataclass
class FakeTriton:
    """Answers with what it is told to and remembers what it was asked."""

    answer: bytes = b"an answer"
    error: tuple[grpc.StatusCode, str] | None = None
    seen: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    deadlines_s: list[float] = field(default_factory=list)
    wait: threading.Event | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(
            address="127.77.1.2", http_port=9, grpc_port=self.port, metrics_port=9, secret="s3cret"
        )

    def service(self, call: Any) -> Any:
        def handle(message: bytes, context: grpc.ServicerContext) -> bytes:
            self.seen.append((call.method, dict(call.invocation_metadata), message))
            self.deadlines_s.append(context.time_remaining())
            context.add_callback(self.cancelled.set)
            if self.wait is not None:
                self.wait.wait(10)
            if self.error is not None:
                context.abort(*self.error)
            return self.answer

        return grpc.unary_unary_rpc_method_handler(handle)


class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, fake: FakeTriton) -> None:
        self._fake = fake

    def service(self, call: Any) -> Any:
        return self._fake.service(call)


@pytest.fixture
def triton() -> Iterator[FakeTriton]:
    fake = FakeTriton()
    server = grpc.server(ThreadPoolExecutor(8), handlers=[Handlers(fake)])
    fake.port = server.add_insecure_port("127.77.1.2:0")
    server.start()
    yield fake
    server.stop(0).wait()


@pytest.fixture
def config() -> ServeConfig:
    return take_ports(ServeConfig(http_port=0, grpc_port=0, metrics_port=0, max_request_bytes=MOST_BYTES))


@pytest.fixture
def guard(config: ServeConfig, triton: FakeTriton) -> Iterator[Guard]:
    with Guard(config, inner_models=("clip_alarm",)) as running:
        running.lead_to(triton.endpoint)
        yield running


@pytest.fixture
def channel(guard: Guard, config: ServeConfig) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{config.grpc_port}") as opened:
        yield opened


@dataclass(frozen=True)
class Reply:
    code: str
    content: bytes
    text: str = ""


@pytest.fixture
def ask(channel: grpc.Channel) -> Callable[..., Reply]:
    def send(method: str, message: bytes, **options: Any) -> Reply:
        try:
            return Reply("OK", channel.unary_unary(method)(message, **({"timeout": 10} | options)))
        except grpc.RpcError as error:
            return Reply(error.code().name, b"", error.details())

    return send


def request(size_bytes: int = 10, **fields: Any) -> bytes:
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, size_bytes]}
    right = {"model_name": "clip", "inputs": [tensor], "raw_input_contents": [bytes(size_bytes)]}
    return bytes(service_pb2.ModelInferRequest(**(right | fields)).SerializeToString())


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not is_so() and time.monotonic() < end:
        time.sleep(0.01)
    assert is_so()


class Trickle:
    """A call whose message does not come."""

    def __init__(self, config: ServeConfig) -> None:
        self._end = threading.Event()
        self.channel = grpc.insecure_channel(
            f"127.0.0.1:{config.grpc_port}", options=[("grpc.use_local_subchannel_pool", 1)]
        )

        def nothing_yet() -> Iterator[bytes]:
            self._end.wait(20)
            yield from ()

        self.call = self.channel.stream_unary(INFER).future(nothing_yet(), timeout=20)

    def close(self) -> None:
        self._end.set()
        self.channel.close()


def test_a_question_comes_as_it_was_sent_with_the_secret_and_nothing_else_of_the_call(
    ask: Callable[..., Reply], triton: FakeTriton, guard: Guard
) -> None:
    message = request(100_000)
    reply = ask(INFER, message, metadata=[("authorization", "Basic x"), ("triton-grpc-protocol-x", "y")])
    assert (reply.code, reply.content) == ("OK", triton.answer)
    (method, metadata, arrived) = triton.seen[0]
    assert (method, arrived) == (INFER, message)
    assert metadata.pop("user-agent").startswith("grpc-python")
    assert metadata == {"triton-grpc-protocol-cbpt-guard": "s3cret"}
    assert ask("/grpc.health.v1.Health/Check", b"").content == triton.answer
    assert guard._room.held_bytes == 0


def test_a_deadline_and_a_cancellation_reach_triton(
    ask: Callable[..., Reply], triton: FakeTriton, channel: grpc.Channel
) -> None:
    ask(INFER, request(), timeout=7)
    ask(INFER, request(), timeout=None)
    assert 1 < triton.deadlines_s[0] <= 7.1  # each of the two hops rounds it up to hundredths
    assert 500 < triton.deadlines_s[1] < module.ANSWER_TIMEOUT_S + 2  # gRPC rounds it up
    triton.cancelled.clear()
    triton.wait = threading.Event()
    call = channel.unary_unary(INFER).future(request(), timeout=20)
    wait_until(lambda: len(triton.seen) == 3)
    call.cancel()
    assert triton.cancelled.wait(10)
    triton.wait.set()
    triton.wait = threading.Event()
    assert ask(INFER, request(), timeout=0.3).code == "DEADLINE_EXCEEDED"
    triton.wait.set()


def test_an_error_of_triton_comes_through(ask: Callable[..., Reply], triton: FakeTriton) -> None:
    for code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL):
        triton.error = (code, "Exceeds maximum queue size")
        assert ask(INFER, request()) == Reply(code.name, b"", "Exceeds maximum queue size")


def test_what_nobody_needs_is_not_there(
    ask: Callable[..., Reply], channel: grpc.Channel, triton: FakeTriton
) -> None:
    for name in ("RepositoryModelLoad", "SystemSharedMemoryRegister", "TraceSetting", "LogSettings", "x"):
        reply = ask(f"{SERVICE}/{name}", b"")
        assert (reply.code, reply.text[:22]) == ("UNIMPLEMENTED", "expected a method for ")
    with pytest.raises(grpc.RpcError, match="not the streamed one"):
        list(channel.stream_stream(f"{SERVICE}/ModelStreamInfer")(iter([request()]), timeout=10))
    assert triton.seen == []


def test_what_is_refused_reaches_nothing_and_is_told_why(
    ask: Callable[..., Reply], triton: FakeTriton
) -> None:
    shape = {"name": "images", "datatype": "UINT8", "shape": [2**62]}
    assert ask(INFER, request(inputs=[shape])).code == "INVALID_ARGUMENT"
    assert ask(INFER, request(model_name="clip_alarm")).code == "PERMISSION_DENIED"
    assert ask(INFER, b"\x2a\x00" * 5000).code == "RESOURCE_EXHAUSTED"
    assert ask(f"{SERVICE}/ModelConfig", bytes(5000)).code == "RESOURCE_EXHAUSTED"
    reply = ask(INFER, request(MOST_BYTES))
    assert (reply.code, "larger than max" in reply.text) == ("RESOURCE_EXHAUSTED", True)
    assert triton.seen == []


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_what_is_compressed_is_refused_as_it_is(
    compression: Any, ask: Callable[..., Reply], triton: FakeTriton
) -> None:
    reply = ask(INFER, request(50_000_000), compression=compression)
    assert (reply.code, "not compressed" in reply.text) == ("INVALID_ARGUMENT", True)
    assert triton.seen == []


def test_a_call_without_a_message_is_refused_and_of_several_the_first_counts(
    channel: grpc.Channel, triton: FakeTriton
) -> None:
    stream = channel.stream_unary(INFER)
    with pytest.raises(grpc.RpcError, match="got none"):
        stream(iter(()), timeout=10)
    assert stream(iter([request(), b"nonsense"]), timeout=10) == triton.answer
    assert [message for *_, message in triton.seen] == [request()]


def test_without_triton_the_answer_can_be_retried_and_its_place_is_not_told(
    guard: Guard, ask: Callable[..., Reply], triton: FakeTriton
) -> None:
    there = triton.endpoint
    for endpoint in (
        None, Endpoint(address="127.77.1.3", http_port=9, grpc_port=9, metrics_port=9),
    ):  # fmt: skip
        guard.lead_to(endpoint)
        reply = ask(INFER, request())
        assert (reply.code, reply.text.partition(":")[0]) == ("UNAVAILABLE", "Triton is not there")
        assert "127." not in reply.text
        guard.lead_to(there)
        assert ask(INFER, request()).code == "OK"


def test_slow_senders_give_way_to_others_one_by_one(
    guard: Guard, ask: Callable[..., Reply], config: ServeConfig, triton: FakeTriton, monkeypatch: Any
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.2)
    slow = [Trickle(config) for _ in range(module.MAX_READERS)]
    wait_until(lambda: len(guard._grpc._readers._patient) == module.MAX_READERS)
    assert ask(INFER, request()).code == "OK"
    ended = [one for one in slow if one.call.done()]
    assert [one.call.code().name for one in ended] == ["DEADLINE_EXCEEDED"]
    assert ask(INFER, request()).code == "OK"
    for one in slow:
        one.close()
    assert len(triton.seen) == 2


def test_a_message_that_does_not_come_has_a_deadline_and_so_has_a_turn(
    guard: Guard, ask: Callable[..., Reply], config: ServeConfig, triton: FakeTriton, monkeypatch: Any
) -> None:
    monkeypatch.setattr(module, "REQUEST_TIMEOUT_S", 0.2)
    slow = Trickle(config)
    assert slow.call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "rest of the message" in slow.call.details()
    slow.close()
    monkeypatch.setattr(module, "REQUEST_TIMEOUT_S", 20)
    monkeypatch.setattr(module, "TURN_TIMEOUT_S", 0.2)
    many = [Trickle(config) for _ in range(module.MAX_READERS)]
    wait_until(lambda: len(guard._grpc._readers._patient) == module.MAX_READERS)
    reply = ask(INFER, request())
    assert (reply.code, reply.text) == ("UNAVAILABLE", "too many large requests. Try again.")
    for one in many:
        one.close()
    assert triton.seen == []


def test_more_than_fits_is_refused_for_now_whichever_protocol_holds_it(
    guard: Guard, ask: Callable[..., Reply], triton: FakeTriton, monkeypatch: Any
) -> None:
    monkeypatch.setattr(guard._room, "held_bytes", guard._room.most_bytes - 50_000)
    assert ask(INFER, request(60_000)).code == "UNAVAILABLE"
    assert ask(INFER, request(10_000)).code == "OK"
    assert guard._room.held_bytes == guard._room.most_bytes - 50_000


def test_a_taken_port_is_named(config: ServeConfig, guard: Guard) -> None:
    free = take_ports(ServeConfig(http_port=0, grpc_port=0, metrics_port=0))
    with pytest.raises(ConfigError, match=f"got 127.0.0.1:{config.grpc_port} is taken"):
        Guard(replace(free, grpc_port=config.grpc_port)).__enter__()


def test_what_is_not_grpc_is_dropped_and_nothing_is_printed(
    ask: Callable[..., Reply], config: ServeConfig, triton: FakeTriton, capfd: pytest.CaptureFixture[str]
) -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for raw in (
        b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01" + bytes(200),
        preface + b"\xff" * 100,
        preface
        + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
        + b"\x00\x40\x00\x01\x05\x00\x00\x00\x01"
        + b"\xff" * 2**14,
    ):
        with socket.create_connection(("127.0.0.1", config.grpc_port), timeout=10) as connection:
            connection.sendall(raw)
            connection.settimeout(5)
            try:
                while connection.recv(1000):
                    pass
            except ConnectionResetError:
                pass
    assert ask(INFER, request()).code == "OK"
    assert len(triton.seen) == 1
    assert capfd.readouterr() == ("", "")
