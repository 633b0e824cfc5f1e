"""The clients, with a stand-in for the wire: what is retried, what is not, and what is never fetched."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cbpt_runtime.errors import ConfigError, ImageDataError, RequestError, ServingError
from cbpt_runtime.serving import AsyncClient, Client
from cbpt_runtime.serving.client import asynchronous
from cbpt_runtime.serving.client import wire as module
from cbpt_runtime.serving.client.wire import WireError, open_wire

NAMES = ("cat", "dog")


class FakeWire:
    """Answers with the length of each file; fails as told."""

    def __init__(self) -> None:
        self.failures: list[WireError] = []
        self.requests: list[list[bytes]] = []
        self.is_closed = False
        self.answering = self.most_answering = 0

    async def infer(
        self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str], timeout_s: float
    ) -> dict[str, np.ndarray]:
        files = [bytes(file) for file in inputs["image"].ravel()]
        self.requests.append(files)
        if self.failures:
            raise self.failures.pop(0)
        if b"bad" in files:
            raise WireError("refused", "HTTP 400: not an image")
        self.answering += 1
        self.most_answering = max(self.most_answering, self.answering)
        await asyncio.sleep(0.01)
        self.answering -= 1
        share = np.array([[len(file) / 100, 1 - len(file) / 100] for file in files], np.float32)
        count = len(files)
        return {
            "probabilities": share,
            "logits": share,
            "alarm": share[:, :1],
            "alarm_target": np.zeros((count, 1), np.int64),
        }

    async def config(self, model: str, timeout_s: float) -> dict[str, Any]:
        return {"max_batch_size": 4, "parameters": {"class_names": {"string_value": json.dumps(NAMES)}}}

    async def models(self, timeout_s: float) -> list[str]:
        return ["pets", "pets_alarm", "pets_classifier", "pets_preprocess"]

    async def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> FakeWire:
    fake = FakeWire()
    monkeypatch.setattr(asynchronous, "open_wire", lambda url, headers: fake)
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.001)
    return fake


@pytest.mark.parametrize("kind", ["busy", "unreachable"])
def test_what_was_not_answered_is_asked_again(kind: Any, wire: FakeWire) -> None:
    wire.failures = [WireError(kind, "no")] * 2
    with Client("grpc://server:1", retries=2) as asked:
        assert asked.predict_files([b"x" * 10]).probabilities[0, 0] == pytest.approx(0.1)
    assert len(wire.requests) == 3
    assert wire.is_closed


@pytest.mark.parametrize(
    ("kind", "error"), [("refused", RequestError), ("timeout", ServingError), ("broken", ServingError)]
)
def test_nothing_else_is_ever_sent_twice(kind: Any, error: type[Exception], wire: FakeWire) -> None:
    wire.failures = [WireError(kind, "no")]
    with Client("grpc://server:1") as asked, pytest.raises(error, match="no"):
        asked.predict_files([b"x"])
    assert len(wire.requests) == 1


def test_retries_are_bounded_in_number_and_in_time(wire: FakeWire, monkeypatch: pytest.MonkeyPatch) -> None:
    wire.failures = [WireError("busy", "full")] * 100
    with Client("grpc://server:1", retries=3) as asked, pytest.raises(ServingError, match="asked 4 times"):
        asked.predict_files([b"x"])
    assert len(wire.requests) == 4
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 60)
    with Client("grpc://server:1", timeout_s=1) as asked, pytest.raises(ServingError, match="full"):
        asked.predict_files([b"x"])
    assert len(wire.requests) == 5


def test_many_files_are_batched_kept_in_order_and_limited_in_flight(wire: FakeWire) -> None:
    sources = [(str(number), b"x" * (number + 1)) for number in range(50)]
    seen: list[int] = []
    with Client("grpc://server:1", in_flight=3) as asked:
        found = asked.classify_files(
            sources, top=1, batch_size=9, progress=lambda stage, step, total, values: seen.append(step)
        )
    assert [answer.image for answer in found] == [name for name, _ in sources]
    assert [answer.alarm for answer in found] == pytest.approx([(n + 1) / 100 for n in range(50)])
    assert max(map(len, wire.requests)) == 4  # what the server takes
    assert wire.most_answering == 3
    assert seen[-1] == 50


def test_one_bad_file_is_named_and_the_others_of_its_batch_are_asked_alone(wire: FakeWire) -> None:
    sources = [("a", b"aa"), ("b", b"bad"), ("c", b"cc")]
    with Client("grpc://server:1") as asked, pytest.raises(RequestError, match="b: HTTP 400") as error:
        asked.classify_files(sources)
    assert "a:" not in str(error.value)
    assert wire.requests == [[b"aa", b"bad", b"cc"], [b"aa"], [b"bad"], [b"cc"]]


def test_a_path_that_cannot_be_read_stops_everything_before_it_is_sent(
    wire: FakeWire, tmp_path: Path
) -> None:
    (tmp_path / "there").write_bytes(b"x")
    with Client("grpc://server:1") as asked:
        with pytest.raises(ImageDataError, match="missing: no such file"):
            asked.classify_files([("there", tmp_path / "there"), ("missing", tmp_path / "missing")])
        with pytest.raises(ImageDataError, match="a URL: nothing is fetched"):
            asked.classify("https://example.org/photo.jpg")
    assert wire.requests == []


def test_several_models_ask_for_a_name(wire: FakeWire, monkeypatch: pytest.MonkeyPatch) -> None:
    async def two(timeout_s: float) -> list[str]:
        return ["cars", "cars_classifier", "pets", "pets_classifier"]

    monkeypatch.setattr(wire, "models", two)
    with Client("grpc://server:1") as asked, pytest.raises(ServingError, match="cars, pets"):
        asked.info()
    with Client("grpc://server:1", model="pets") as asked:
        assert asked.info().class_names == NAMES


def test_the_asynchronous_client_does_the_same(wire: FakeWire) -> None:
    async def ask() -> float:
        async with AsyncClient("http://server:1") as asked:
            return (await asked.classify(b"x" * 30, top=1)).alarm

    assert asyncio.run(ask()) == pytest.approx(0.3)
    assert wire.is_closed


def test_one_client_serves_many_threads(wire: FakeWire) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with Client("grpc://server:1") as asked, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: asked.predict_files([b"x" * n]).alarm[0], range(1, 41)))
    assert found == pytest.approx([n / 100 for n in range(1, 41)])


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8001", "ftp://a:1", "grpc://a", "http://a:1/path", "http://u@a:1", "http://a:99999", "", "x"],
)
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="a server's URL"):
        open_wire(url)
    with pytest.raises(ConfigError, match="a server's URL"):
        Client(url)


@pytest.mark.parametrize("options", [{"timeout_s": 0}, {"retries": -1}, {"in_flight": 0}])
def test_numbers_out_of_range_are_refused(options: dict[str, Any], wire: FakeWire) -> None:
    with pytest.raises(ConfigError, match=r"above 0|at least 1"):
        Client("grpc://a:1", **options)


def test_serving_imports_neither_torch_nor_open_clip() -> None:
    code = """
import sys
import cbpt_runtime.serving.client.asynchronous, cbpt_runtime.serving.triton.launcher
import cbpt_runtime.runtime.triton_models
from cbpt_runtime.serving import Client, running_server
from cbpt_runtime.serving.client.wire import open_wire
import asyncio
async def both():
    for url in ("grpc://127.0.0.1:1", "http://127.0.0.1:1"):
        await open_wire(url).close()
asyncio.run(both())
print(sorted({"torch", "open_clip", "onnx", "matplotlib"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
