"""The parts of a served model: nobody asks them over HTTP, and no shape is the neighbours' trouble."""

from __future__ import annotations

import asyncio
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cbpt_runtime.serving import Client, RunningServer
from cbpt_runtime.serving.client.wire import open_wire
from cbpt_runtime.serving.triton.leftovers import SHARED_MEMORY

from .test_answers import counters
from .test_bad_requests import ask

IMAGES = 'cbpt_images_total{model="shapes"}'
ALARMS = 'cbpt_alarm_total{model="shapes",target="Blue Stripes"}'


@pytest.mark.parametrize("name", ["logits", "probabilities", "alarm", "alarm_target"])
def test_an_image_is_counted_whatever_is_asked_about_it(name: str, server: RunningServer, drawn: Any) -> None:
    before = counters(server)

    async def one() -> None:
        wire = open_wire(server.config.grpc_url)
        try:
            await wire.infer("shapes", {"image": np.array([[drawn.files[0]]], dtype=np.object_)}, (name,), 10)
        finally:
            await wire.close()

    asyncio.run(one())
    assert counters(server)[IMAGES] - before[IMAGES] == 1


def test_nobody_tells_the_counter_of_an_alarm_over_http(server: RunningServer) -> None:
    before = counters(server)
    tensors = [
        {"name": "alarm", "shape": [1, 1], "datatype": "FP32", "data": [1.0]},
        {"name": "alarm_target", "shape": [1, 1], "datatype": "INT64", "data": [2]},
    ]
    status, text = ask(server, "/v2/models/shapes_alarm/infer", json.dumps({"inputs": tensors}).encode())
    assert (status, "a part of it" in text) == (403, True)
    after = counters(server)
    assert (after[IMAGES], after[ALARMS]) == (before[IMAGES], before[ALARMS])


def test_a_batch_size_that_overflows_is_nobody_elses_trouble(server: RunningServer, drawn: Any) -> None:
    def good(number: int) -> bool:
        with Client(server.config.http_url, retries=0) as client:
            found = client.predict_files(drawn.files[number : number + 1])
        return bool(np.abs(found.probabilities - drawn.expected.probabilities[number]).max() < 1e-4)

    restarts = server.restarts
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(good, number) for number in range(40)]
        for shape in (2**63, 2**63 - 1, 2**62, 2**32, -(2**63), -1, 0):
            for model, name, kind, rest in (
                ("shapes", "image", "BYTES", [1]),
                ("shapes_classifier", "images", "UINT8", [32, 32, 3]),
            ):
                tensor = {"name": name, "datatype": kind, "shape": [shape, *rest], "data": [0] * 3072}
                body = json.dumps({"inputs": [tensor]}).encode()
                status, text = ask(server, f"/v2/models/{model}/infer", body)
                assert (status, "digits" in text) == (400, True)
        assert all(answer.result() for answer in answers)
    assert server.restarts == restarts


def test_pictures_in_flight_are_nobody_elses_business(server: RunningServer) -> None:
    regions = list(SHARED_MEMORY.glob(f"{server.process.region_prefix}*"))
    assert {stat.S_IMODE(region.stat().st_mode) for region in regions} == {0o600}


def test_what_stands_on_the_command_line_opens_no_closed_endpoint(server: RunningServer) -> None:
    words = Path(f"/proc/{server.process.pid}/cmdline").read_text().split("\0")
    closed = next(word for word in words if word.startswith("--http-restricted-api=shared-memory"))
    secret = closed.rpartition("=")[2]
    for sent in (secret.strip(), secret.replace("\n", " ")):
        status, _ = ask_triton(server, "/v2/systemsharedmemory/status", {"cbpt-closed": sent})
        assert status == 403


def ask_triton(server: RunningServer, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
    import http.client

    endpoint = server.endpoint
    connection = http.client.HTTPConnection(endpoint.address, endpoint.http_port, timeout=10)
    try:
        connection.request("GET", path, headers=headers | endpoint.headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()
