"""Bad requests over gRPC: refused before Triton reads them, and nobody else's trouble."""

from __future__ import annotations

import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cbpt_runtime.serving import RunningServer
from cbpt_runtime.serving.triton.process import group_usage

from .test_answers import counters
from .test_fuzz import good_neighbour

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # grpc's own
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

SERVICE = "/inference.GRPCInferenceService"
NUMBER = 2000
MAX_MEMORY_GROWTH = 0.05
REFUSED = ("INVALID_ARGUMENT", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "NOT_FOUND", "UNIMPLEMENTED")


@pytest.fixture
def stub(server: RunningServer) -> Iterator[Any]:
    with grpc.insecure_channel(server.config.grpc_url.removeprefix("grpc://")) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def pixels(**fields: Any) -> Any:
    """A right request for pixels, with other fields."""
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3]}
    right = {"model_name": "shapes_classifier", "inputs": [tensor], "raw_input_contents": [bytes(3072)]}
    return service_pb2.ModelInferRequest(**(right | fields))


def code(call: Any, message: Any) -> tuple[str, str]:
    try:
        call(message, timeout=30)
    except grpc.RpcError as error:
        return error.code().name, error.details()
    return "OK", ""


def test_a_batch_size_that_overflows_is_nobody_elses_trouble(
    server: RunningServer, stub: Any, drawn: Any
) -> None:
    restarts = server.restarts
    with good_neighbour(server, drawn) as neighbour:
        for size in (2**63 - 1, 2**62, 2**32, 10**9, 0, -1, -(2**63)):
            for model, name, kind, rest in (
                ("shapes", "image", "BYTES", [1]),
                ("shapes_classifier", "images", "UINT8", [32, 32, 3]),
            ):
                tensor = {"name": name, "datatype": kind, "shape": [size, *rest]}
                found, text = code(stub.ModelInfer, pixels(model_name=model, inputs=[tensor]))
                assert (found, "shape" in text) == ("INVALID_ARGUMENT", True)
    assert neighbour["right"] == neighbour["asked"] > 0
    assert server.restarts == restarts


def settled(server: RunningServer) -> dict[str, float]:
    """Return the counters once they stand still: requests that earlier clients left may still be at work."""
    for _ in range(30):
        first = counters(server)
        time.sleep(1)
        if counters(server) == first:
            return first
    pytest.fail("the counters do not stand still")


def test_nobody_tells_the_counter_of_an_alarm(server: RunningServer, stub: Any) -> None:
    before = settled(server)
    tensors = [
        {"name": "alarm", "datatype": "FP32", "shape": [1, 1], "contents": {"fp32_contents": [1.0]}},
        {"name": "alarm_target", "datatype": "INT64", "shape": [1, 1], "contents": {"int64_contents": [2]}},
    ]
    for name in ("shapes_alarm", "shapes_preprocess"):
        request = pixels(model_name=name, inputs=tensors, raw_input_contents=[])
        assert code(stub.ModelInfer, request)[0] == "PERMISSION_DENIED"
    assert counters(server) == before


def test_endpoints_nobody_needs_are_closed(stub: Any) -> None:
    for name, message in (
        ("RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest(model_name="shapes")),
        ("RepositoryModelUnload", service_pb2.RepositoryModelUnloadRequest(model_name="shapes")),
        ("SystemSharedMemoryRegister", service_pb2.SystemSharedMemoryRegisterRequest(name="a", key="/a")),
        ("SystemSharedMemoryStatus", service_pb2.SystemSharedMemoryStatusRequest()),
        ("CudaSharedMemoryStatus", service_pb2.CudaSharedMemoryStatusRequest()),
        ("TraceSetting", service_pb2.TraceSettingRequest()),
        ("LogSettings", service_pb2.LogSettingsRequest()),
    ):
        assert code(getattr(stub, name), message)[0] == "UNIMPLEMENTED"
    parameters = {"shared_memory_region": {"string_param": "a"}}
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "parameters": parameters}
    request = pixels(inputs=[tensor], raw_input_contents=[])
    assert code(stub.ModelInfer, request) == (
        "PERMISSION_DENIED", "expected tensors in the request; got shared memory.",
    )  # fmt: skip


def test_the_questions_of_a_client_are_answered(server: RunningServer, stub: Any) -> None:
    assert stub.ServerLive(service_pb2.ServerLiveRequest()).live
    assert stub.ServerReady(service_pb2.ServerReadyRequest()).ready
    assert stub.ModelReady(service_pb2.ModelReadyRequest(name="shapes")).ready
    assert stub.ServerMetadata(service_pb2.ServerMetadataRequest()).version == server.version
    assert stub.ModelMetadata(service_pb2.ModelMetadataRequest(name="shapes")).name == "shapes"
    assert stub.ModelConfig(service_pb2.ModelConfigRequest(name="shapes")).config.name == "shapes"
    assert len(stub.ModelStatistics(service_pb2.ModelStatisticsRequest()).model_stats) == 4
    assert len(stub.RepositoryIndex(service_pb2.RepositoryIndexRequest()).models) == 4
    address = server.config.grpc_url.removeprefix("grpc://")
    with grpc.insecure_channel(address) as channel:
        assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=10) == b"\x08\x01"  # SERVING


@pytest.mark.parametrize("is_typed", [True, False])
def test_pixels_are_taken_raw_and_typed(is_typed: bool, stub: Any, classifier: Any) -> None:
    expected = classifier.predict(np.zeros((1, 32, 32, 3), np.uint8)).probabilities
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3]}
    typed = {"inputs": [tensor | {"contents": {"uint_contents": [0] * 3072}}], "raw_input_contents": []}
    answer = stub.ModelInfer(pixels(**(typed if is_typed else {})), timeout=30)
    place = [output.name for output in answer.outputs].index("probabilities")
    np.testing.assert_allclose(
        np.frombuffer(answer.raw_output_contents[place], np.float32), expected[0], atol=1e-4
    )


def test_tritons_own_port_answers_the_guard_alone(server: RunningServer) -> None:
    endpoint = server.endpoint
    words = Path(f"/proc/{server.process.pid}/cmdline").read_text().split("\0")
    closed = next(word for word in words if word.startswith("--grpc-restricted-protocol=shared-memory"))
    with grpc.insecure_channel(f"{endpoint.address}:{endpoint.grpc_port}") as channel:
        for method in ("ServerReady", "ModelConfig", "RepositoryIndex", "ModelInfer", "ModelStatistics"):
            with pytest.raises(grpc.RpcError, match="restricted"):
                channel.unary_unary(f"{SERVICE}/{method}")(b"", timeout=10)
        ready = channel.unary_unary(f"{SERVICE}/ServerReady")
        assert ready(b"", timeout=10, metadata=endpoint.metadata) == b"\x08\x01"
        secret = ("triton-grpc-protocol-cbpt-closed", closed.rpartition("=")[2].strip())
        with pytest.raises(grpc.RpcError, match="restricted"):
            channel.unary_unary(f"{SERVICE}/SystemSharedMemoryStatus")(
                b"", timeout=10, metadata=[*endpoint.metadata, secret]
            )


def spoiled(message: bytes, dice: random.Random) -> bytes:
    """One message that is wrong in one of many ways."""
    at = dice.randrange(len(message))
    kind = dice.randrange(8)
    if kind == 0:
        return message[:at]
    if kind == 1:
        return dice.randbytes(dice.randrange(3000))
    if kind == 2:
        head = bytearray(message)
        head[dice.randrange(60)] ^= dice.randrange(1, 256)
        return bytes(head)
    if kind == 3:
        return b"\x2a\x00" * dice.randrange(1, 2**20)  # a parser makes a hundred bytes of each two
    if kind == 4:
        shape = [dice.choice((-1, 0, 9, 2**31, 2**62, 2**63 - 1)), 32, 32, 3]
        tensor = {"name": "images", "datatype": "UINT8", "shape": shape}
        return bytes(pixels(inputs=[tensor]).SerializeToString())
    if kind == 5:
        return b"\x0b" * dice.randrange(1, 100_000)  # groups in groups
    if kind == 6:
        return message + b"\x0a\x0cshapes_alarm"
    return message[at:] + message[:at]


def test_many_bad_messages_among_good_ones_harm_neither_neighbours_nor_the_server(
    serve: Callable[..., AbstractContextManager[RunningServer]], drawn: Any
) -> None:
    """2,000 messages spoiled at random or compressed, good requests beside them; counts and memory."""
    dice = random.Random(9)
    good = pixels().SerializeToString()
    outcomes: Counter[str] = Counter()
    with serve() as server, good_neighbour(server, drawn) as neighbour:
        address = server.config.grpc_url.removeprefix("grpc://")
        with grpc.insecure_channel(address) as channel, ThreadPoolExecutor(8) as pool:
            infer = channel.unary_unary(f"{SERVICE}/ModelInfer")

            def ask(number: int) -> str:
                bomb = grpc.Compression.Gzip if number % 10 == 0 else None
                message = bytes(20_000_000) if bomb else spoiled(good, dice)
                try:
                    infer(message, timeout=60, compression=bomb)
                except grpc.RpcError as error:
                    return str(error.code().name) if error.details() else "without a reason"
                return "OK"

            Counter(pool.map(ask, range(300)))  # warm-up
            before = group_usage(server.process.pid)
            outcomes.update(pool.map(ask, range(NUMBER)))
            after = group_usage(server.process.pid)
        assert server.process.exit_code is None
        assert server.restarts == 0
    print(dict(outcomes), dict(neighbour), before.memory_bytes, after.memory_bytes)
    assert sum(outcomes[name] for name in (*REFUSED, "OK")) == NUMBER
    assert outcomes["OK"] < NUMBER // 10  # a changed byte of a picture is a picture
    assert neighbour["right"] == neighbour["asked"] > 0
    assert after.memory_bytes / before.memory_bytes - 1 < MAX_MEMORY_GROWTH
    assert after.pids == before.pids
