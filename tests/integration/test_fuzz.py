"""Requests made up by hypothesis: each is answered as by the bundle, or refused with a message."""

from __future__ import annotations

import http.client
import io
import json
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.errors import ImageDataError, RequestError
from cbpt_runtime.runtime.preprocess import decode_image, to_pixels
from cbpt_runtime.serving import Client, RunningServer
from cbpt_runtime.serving.triton.process import group_usage

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # grpc's own
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

MAX_PIXELS = 4_000_000  # of the repository
MAX_BATCH = 8
SIDE = 32
WARM_UP = 0.3  # share of the requests after which memory must stay as it is
MAX_MEMORY_GROWTH = 0.05
REFUSALS = (
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "OUT_OF_RANGE",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNIMPLEMENTED",
)
Serve = Callable[..., AbstractContextManager[RunningServer]]


def picture(number: int, kind: str) -> bytes:
    coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((40 + 7 * number, 50)).save(file, format=kind)
    return file.getvalue()


PICTURES = [
    picture(number, kind) for number, kind in enumerate(("JPEG", "PNG", "WEBP", "GIF", "BMP", "JPEG"))
]


@st.composite
def spoiled_pictures(draw: st.DrawFn) -> bytes:
    """A picture that was cut, overwritten, stretched or turned around up to three times."""
    file = draw(st.sampled_from(PICTURES))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(file)))
        piece = draw(st.binary(max_size=16))
        how = draw(st.sampled_from(("cut", "overwrite", "insert", "rotate")))
        file = {
            "cut": file[:at],
            "overwrite": file[:at] + piece + file[at + len(piece) :],
            "insert": file[:at] + piece + file[at:],
            "rotate": file[at:] + file[:at],
        }[how]
    return file


class Files(NamedTuple):
    """A request with image files."""

    files: list[bytes]


class Tensor(NamedTuple):
    """A request with pixels, all zero, that may be wrong about anything."""

    model: str = "shapes_classifier"
    name: str = "images"
    dtype: str = "UINT8"
    shape: tuple[int, ...] = (1, SIDE, SIDE, 3)
    size_bytes: int = SIDE * SIDE * 3

    @property
    def is_right(self) -> bool:
        images = self.size_bytes // (SIDE * SIDE * 3)
        return 1 <= images <= MAX_BATCH and self == Tensor(
            shape=(images, SIDE, SIDE, 3), size_bytes=images * SIDE * SIDE * 3
        )


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Right, or wrong in one way or several."""
    batch = draw(st.integers(1, MAX_BATCH))
    tensor = Tensor(shape=(batch, SIDE, SIDE, 3), size_bytes=batch * SIDE * SIDE * 3)
    sides = st.one_of(
        st.sampled_from((1, 3, SIDE, MAX_BATCH + 1)),
        st.integers(-2, 40),
        st.sampled_from((2**31, 2**32, 2**62, 2**63 - 1)),
    )
    shapes = st.lists(sides, max_size=5).map(tuple)
    wrong = {
        "model": st.sampled_from(("nothing", "shapes", "shapes_alarm", "shapes_preprocess")),
        "name": st.sampled_from(("image", "pixels", "", "Images")) | st.text(max_size=8),
        "dtype": st.sampled_from(("INT8", "FP32", "BYTES", "BOOL", "FP16", "BF16", "UINT9", "")),
        "shape": shapes,
        "size_bytes": st.integers(0, 30_000),
    }
    for field in draw(st.sets(st.sampled_from(sorted(wrong)), max_size=3)):
        tensor = tensor._replace(**{field: draw(wrong[field])})
    return tensor


class Body(NamedTuple):
    """An HTTP request whose body is not what it should be."""

    content: bytes


@st.composite
def bodies(draw: st.DrawFn) -> Body:
    """A right body in JSON with some bytes changed, or no such thing."""
    tensor = {"name": "images", "shape": [1, SIDE, SIDE, 3], "datatype": "UINT8", "data": [0] * SIDE**2 * 3}
    body = json.dumps({"inputs": [tensor]}).encode()
    at = draw(st.integers(0, 120))
    piece = draw(st.binary(min_size=1, max_size=8))
    return Body(draw(st.sampled_from((body[:at] + piece + body[at + len(piece) :], body[:at], piece))))


REQUESTS = st.one_of(
    st.lists(spoiled_pictures() | st.binary(max_size=2000), max_size=MAX_BATCH + 1).map(Files),
    st.lists(spoiled_pictures(), min_size=1, max_size=2).map(Files),
    tensors(),
    bodies(),
)


class Judge:
    """Asks a server, compares what comes with what the bundle says, and counts the outcomes."""

    def __init__(self, server: RunningServer, classifier: BundleClassifier) -> None:
        self.outcomes: Counter[str] = Counter()
        self.memory_bytes: list[int] = []
        self._server = server
        self._classifier = classifier
        urls = (server.config.http_url, server.config.grpc_url)
        self._clients = [Client(url, timeout_s=60) for url in urls]
        self._channel = grpc.insecure_channel(server.config.grpc_url.removeprefix("grpc://"))
        self._infer = service_pb2_grpc.GRPCInferenceServiceStub(self._channel).ModelInfer

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self._channel.close()

    def judge(self, request: Files | Tensor | Body) -> None:
        """Ask over HTTP and, where it is a request gRPC can make, over gRPC."""
        if isinstance(request, Files):
            for client in self._clients:
                self._ask_files(client, request.files)
        elif isinstance(request, Tensor):
            self._ask_http(request)
            self._ask_grpc(request)
        else:
            status, body = self._post("shapes_classifier", request.content)
            self._count(status == 200, status, json.loads(body).get("error"))
        assert self._server.process.exit_code is None
        self.memory_bytes.append(group_usage(self._server.process.pid).memory_bytes)

    def _ask_files(self, client: Client, files: list[bytes]) -> None:
        try:
            images = [decode_image(file, max_pixels=MAX_PIXELS) for file in files]
        except ImageDataError:
            images = []
        if not 1 <= len(images) <= MAX_BATCH:
            with pytest.raises(RequestError, match=r"(HTTP 4\d\d|INVALID_ARGUMENT): .{10}"):
                client.predict_files(files)
            self.outcomes["refused"] += 1
            return
        pixels = np.stack([to_pixels(image, self._classifier.bundle.preprocess) for image in images])
        found = client.predict_files(files)
        expected = self._classifier.predict(pixels).probabilities
        np.testing.assert_allclose(found.probabilities, expected, atol=1e-4)
        self.outcomes["answered"] += 1

    def _ask_http(self, tensor: Tensor) -> None:
        about = {"name": tensor.name, "shape": tensor.shape, "datatype": tensor.dtype}
        about["parameters"] = {"binary_data_size": tensor.size_bytes}
        head = json.dumps({"inputs": [about]}).encode()
        content = head + bytes(tensor.size_bytes)
        status, body = self._post(
            tensor.model, content, **{"Inference-Header-Content-Length": str(len(head))}
        )
        answer = json.loads(body)
        self._count(status == 200, status, answer.get("error"), expect=tensor.is_right)
        if status == 200:
            (found,) = (output["data"] for output in answer["outputs"] if output["name"] == "probabilities")
            self._check_blank(np.array(found), tensor.shape[0])

    def _ask_grpc(self, tensor: Tensor) -> None:
        about = {"name": tensor.name, "shape": tensor.shape, "datatype": tensor.dtype}
        content = [bytes(tensor.size_bytes)]
        request = service_pb2.ModelInferRequest(
            model_name=tensor.model, inputs=[about], raw_input_contents=content
        )
        try:
            answer = self._infer(request, timeout=60)
        except grpc.RpcError as error:
            self._count(False, error.code().name, error.details(), expect=tensor.is_right)
            return
        self._count(True, "OK", None, expect=tensor.is_right)
        place = [output.name for output in answer.outputs].index("probabilities")
        self._check_blank(np.frombuffer(answer.raw_output_contents[place], np.float32), tensor.shape[0])

    def _check_blank(self, found: np.ndarray, batch: int) -> None:
        expected = self._classifier.predict(np.zeros((batch, SIDE, SIDE, 3), np.uint8)).probabilities
        np.testing.assert_allclose(found.reshape(batch, -1), expected, atol=1e-4)

    def _count(
        self, is_answered: bool, status: object, message: str | None, *, expect: bool | None = None
    ) -> None:
        """Refused means a 4xx, or its like, with a message; Triton 2.51 says 500 to JSON it cannot read."""
        assert expect is None or is_answered == expect, (status, message)
        if is_answered:
            self.outcomes["answered"] += 1
            return
        assert message
        is_refusal = status in REFUSALS or (isinstance(status, int) and 400 <= status < 500)
        assert is_refusal or status == 500, (status, message)
        self.outcomes["refused" if is_refusal else "refused with 500"] += 1

    def _post(self, model: str, content: bytes, **headers: str) -> tuple[int, str]:
        config = self._server.config
        connection = http.client.HTTPConnection(config.reachable_host, config.http_port, timeout=60)
        try:
            connection.request("POST", f"/v2/models/{model}/infer", content, headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(
                "utf-8", "replace"
            )  # Triton repeats names as they came
        finally:
            connection.close()


@contextmanager
def good_neighbour(server: RunningServer, drawn: Any) -> Iterator[Counter[str]]:
    """Somebody who asks well all the time, over both protocols, and must get the right answers."""
    outcomes: Counter[str] = Counter()
    has_asked, is_over = threading.Event(), threading.Event()

    def ask() -> None:
        with Client(server.config.http_url) as one, Client(server.config.grpc_url) as other:
            while not is_over.wait(0.01):
                rows = [(outcomes["asked"] + i) % 200 for i in range(2)]
                outcomes["asked"] += 1
                found = (one, other)[rows[0] % 2].predict_files([drawn.files[row] for row in rows])
                difference = np.abs(found.probabilities - drawn.expected.probabilities[rows]).max()
                outcomes["right" if difference <= 1e-4 else "wrong"] += 1
                has_asked.set()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert has_asked.wait(60)
        yield outcomes
    finally:
        is_over.set()
        thread.join()


@pytest.mark.parametrize(
    "number", [pytest.param(200, id="200"), pytest.param(2000, id="2000", marks=pytest.mark.nightly)]
)
def test_requests_made_up_at_random_are_answered_rightly_or_refused_with_a_message(
    number: int, serve: Serve, drawn: Any, classifier: BundleClassifier
) -> None:
    with serve() as server, good_neighbour(server, drawn) as neighbour:
        judge = Judge(server, classifier)

        @settings(
            max_examples=number,
            deadline=None,
            database=None,
            derandomize=number < 1000,
            suppress_health_check=list(HealthCheck),
        )
        @given(request=REQUESTS)
        def ask(request: Files | Tensor | Body) -> None:
            judge.judge(request)

        try:
            ask()
        finally:
            judge.close()
        assert server.restarts == 0
    warm, last = judge.memory_bytes[int(WARM_UP * number)], judge.memory_bytes[-1]
    print(dict(judge.outcomes), dict(neighbour), warm, last)
    assert len(judge.memory_bytes) >= number
    assert min(judge.outcomes["answered"], judge.outcomes["refused"]) >= number // 20
    assert neighbour["right"] == neighbour["asked"] > 0
    assert last / warm - 1 < MAX_MEMORY_GROWTH
