"""Bad requests: a 4xx with a message each, answers for their neighbours, and a server as it was before."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cbpt_runtime.errors import RequestError
from cbpt_runtime.serving import AsyncClient, Client, RunningServer
from cbpt_runtime.serving.triton.process import group_usage

RANDOM_REQUESTS = 2000
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")  # aiohttp
MAX_MEMORY_GROWTH = 0.05


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises very many pixels in very few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (200, 30, 40)).save(file, format="JPEG")
    return file.getvalue()


BAD_FILES = {
    "empty": b"",
    "truncated": jpeg()[:200],
    "not an image": b"#!/bin/sh\necho hello\n" * 20,
    "a bomb": png_header(20_000, 20_000),
    "a URL": b"http://127.0.0.1:1/photo.jpg",
    "too large a file": b"\xff\xd8" + bytes(21_000_000),
}


def ask(server: RunningServer, path: str, body: bytes, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(server.config.reachable_host, server.config.http_port, timeout=60)
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace")
    finally:
        connection.close()


def infer_body(**changes: Any) -> bytes:
    """A request in JSON for pixels; right unless something is changed."""
    tensor = {"name": "images", "shape": [1, 32, 32, 3], "datatype": "UINT8", "data": [7] * 3072}
    return json.dumps({"inputs": [tensor | changes]}).encode()


INFER = "/v2/models/shapes_classifier/infer"
BAD_REQUESTS: dict[str, tuple[str, bytes]] = {
    "wrong dtype": (INFER, infer_body(datatype="FP32", data=[0.5] * 3072)),
    "unknown dtype": (INFER, infer_body(datatype="UINT9")),
    "wrong shape": (INFER, infer_body(shape=[1, 16, 64, 3])),
    "negative shape": (INFER, infer_body(shape=[-1, 32, 32, 3])),
    "a batch of none that has data": (INFER, infer_body(shape=[0, 32, 32, 3])),
    "too little data": (INFER, infer_body(data=[7] * 3071)),
    "wrong name": (INFER, infer_body(name="image")),
    "a batch too large": (INFER, infer_body(shape=[9, 32, 32, 3], data=[7] * (9 * 3072))),
    "an empty batch": (INFER, infer_body(shape=[0, 32, 32, 3], data=[])),
    "no inputs": (INFER, b'{"inputs": []}'),
    "an unknown output": (
        INFER, infer_body()[:-1] + b', "outputs": [{"name": "secrets"}]}',
    ),
    "not JSON": (INFER, b"\x00\x01\x02 nonsense"),
    "an empty body": (INFER, b""),
    "an unknown model": ("/v2/models/nothing/infer", infer_body()),
    "an unknown version": ("/v2/models/shapes_classifier/versions/7/infer", infer_body()),
    "an image as JSON text": (
        "/v2/models/shapes/infer",
        infer_body(name="image", shape=[1, 1], datatype="BYTES", data=["x"]),
    ),
}  # fmt: skip


# Triton 2.51 answers 500 where its own JSON reader gives up; the message is there all the same.
FAULTS_OF_TRITON = ("too little data", "not JSON")


def is_alive(server: RunningServer, drawn: Any) -> bool:
    with Client(server.config.grpc_url) as client:
        found = client.predict_files(drawn.files[:2])
    np.testing.assert_allclose(found.probabilities, drawn.expected.probabilities[:2], atol=1e-4)
    return server.process.exit_code is None


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_bad_file_is_refused_with_a_message(
    name: str, protocol: str, server: RunningServer, drawn: Any
) -> None:
    url = getattr(server.config, f"{protocol}_url")
    words = {"a bomb": "pixels", "too large a file": "bytes"}.get(name, "readable image")
    with Client(url) as client, pytest.raises(RequestError, match=words):
        client.predict_files([BAD_FILES[name]])
    assert is_alive(server, drawn)


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_refused_with_a_message(name: str, server: RunningServer, drawn: Any) -> None:
    path, body = BAD_REQUESTS[name]
    status, text = ask(server, path, body)
    assert 400 <= status < 500 or (status == 500 and name in FAULTS_OF_TRITON), text
    assert json.loads(text)["error"]
    assert is_alive(server, drawn)


def test_an_animated_image_is_its_first_frame(server: RunningServer, classifier: Any) -> None:
    file = io.BytesIO()
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue", "green")]
    frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:])
    expected = classifier.predict(classifier.read([file.getvalue()]))
    with Client(server.config.http_url) as client:
        found = client.predict_files([file.getvalue()])
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-4)


def avif_that_is_a_runtime_error() -> bytes:
    """An AVIF with a changed byte, for which Pillow raises what is not an OSError."""
    file = io.BytesIO()
    Image.new("RGB", (24, 20), (200, 30, 40)).save(file, format="AVIF")
    for at in range(len(file.getvalue())):
        content = bytearray(file.getvalue())
        content[at] ^= 255
        try:
            Image.open(io.BytesIO(content)).load()
        except RuntimeError:
            return bytes(content)
        except Exception:  # of no interest here
            continue
    raise AssertionError("none found")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_an_image_that_breaks_its_decoder_spoils_no_other(server: RunningServer, drawn: Any) -> None:
    bad = avif_that_is_a_runtime_error()

    async def ask() -> list[Any]:
        async with AsyncClient(server.config.grpc_url, timeout_s=60) as client:
            files = [bad if number % 8 == 0 else drawn.files[number % 200] for number in range(276)]
            room = asyncio.Semaphore(16)

            async def one(file: bytes) -> Any:
                async with room:
                    return await client.predict_files([file])

            return await asyncio.gather(*map(one, files), return_exceptions=True)

    for number, found in enumerate(asyncio.run(ask())):
        if number % 8 == 0:
            assert isinstance(found, RequestError)
            assert "image 1 of 1" in found.got
        else:
            expected = drawn.expected.probabilities[number % 200]
            np.testing.assert_allclose(found.probabilities[0], expected, atol=1e-4)


def test_endpoints_nobody_needs_are_closed(server: RunningServer) -> None:
    for path in ("/v2/systemsharedmemory/region/evil/register", "/v2/logging", "/v2/trace/setting"):
        status, _ = ask(server, path, b'{"key": "/evil", "offset": 0, "byte_size": 8}')
        assert 400 <= status < 500, path
    for action in ("load", "unload"):
        status, _ = ask(server, f"/v2/repository/models/shapes/{action}", b"{}")
        assert 400 <= status < 600, action
    assert server.process.exit_code is None


def test_many_bad_requests_among_good_ones_harm_neither_neighbours_nor_the_server(
    serve: Callable[..., AbstractContextManager[RunningServer]], drawn: Any
) -> None:
    """2,000 requests spoiled at random, with good ones between them; counts, answers and memory."""
    dice = random.Random(5)
    with serve() as server:
        outcomes: Counter[str] = Counter()
        asyncio.run(mix(server, drawn, dice, 300, Counter()))  # warm-up
        before = group_usage(server.process.pid)
        asyncio.run(mix(server, drawn, dice, RANDOM_REQUESTS, outcomes))
        after = group_usage(server.process.pid)
        assert is_alive(server, drawn)
    print(dict(outcomes), before.memory_bytes, after.memory_bytes)
    assert outcomes["bad refused"] + outcomes["spoiled but readable"] == RANDOM_REQUESTS
    assert outcomes["good answered"] == RANDOM_REQUESTS // 2
    assert after.memory_bytes / before.memory_bytes - 1 < MAX_MEMORY_GROWTH
    assert after.pids == before.pids


async def mix(
    server: RunningServer, drawn: Any, dice: random.Random, number: int, outcomes: Counter[str]
) -> None:
    room = asyncio.Semaphore(16)
    good = [dice.randrange(200) for _ in range(number // 2)]
    bad = [spoiled(drawn.files[dice.randrange(200)], dice) for _ in range(number)]
    urls = (server.config.http_url, server.config.grpc_url)
    async with AsyncClient(urls[0], timeout_s=120) as one, AsyncClient(urls[1], timeout_s=120) as other:
        clients = (one, other)

        async def ask_well(row: int) -> None:
            async with room:
                found = await clients[row % 2].predict_files([drawn.files[row]])
            np.testing.assert_allclose(found.probabilities[0], drawn.expected.probabilities[row], atol=1e-4)
            outcomes["good answered"] += 1

        async def ask_badly(index: int, files: list[bytes]) -> None:
            async with room:
                try:
                    await clients[index % 2].predict_files(files)
                except RequestError:
                    outcomes["bad refused"] += 1
                else:  # Pillow reads many a file with a changed byte
                    outcomes["spoiled but readable"] += 1

        work = [ask_well(row) for row in good] + [ask_badly(i, files) for i, files in enumerate(bad)]
        dice.shuffle(work)
        await asyncio.gather(*work)


def spoiled(file: bytes, dice: random.Random) -> list[bytes]:
    """One request that is wrong in one of many ways."""
    position = dice.randrange(len(file))
    kind = dice.randrange(7)
    if kind == 0:
        return [file[:position]]
    if kind == 1:
        return [dice.randbytes(dice.randrange(3000))]
    if kind == 2:
        return [file[:position] + dice.randbytes(8) + file[position + 8 :]]
    if kind == 3:
        return [file, b"", file]  # a bad one among good ones of the same request
    if kind == 4:
        return [file] * 9  # one more than a batch may have
    if kind == 5:
        return [png_header(dice.randrange(2_100, 60_000), 20_000)]
    return [file[position:] + file[:position]]
