"""What comes over the wire is what the bundle says: HTTP and gRPC, files and pixels, alone and in a crowd."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.runtime.prediction import Answer
from cbpt_runtime.serving import AsyncClient, Client, RunningServer, ServedPrediction
from cbpt_runtime.serving.client.wire import open_wire

CLASS_NAMES = ("red_square", "green disc", "Blue Stripes")
PROTOCOLS = ("http", "grpc")
OUTPUTS = ("logits", "probabilities", "alarm", "alarm_target")


def url(server: RunningServer, protocol: str) -> str:
    return str(getattr(server.config, f"{protocol}_url"))


def check(found: ServedPrediction, pictures, rows: slice | list[int], tolerance: float = 1e-4) -> None:
    expected = pictures.expected
    np.testing.assert_allclose(found.probabilities, expected.probabilities[rows], atol=tolerance)
    np.testing.assert_allclose(found.alarm, expected.alarm[rows], atol=tolerance)
    np.testing.assert_array_equal(found.logits.argmax(axis=1), expected.labels[rows])


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", ["files", "pixels"])
@pytest.mark.parametrize("which", ["drawn", "real"])
def test_two_hundred_images_get_the_answers_of_the_bundle(
    protocol: str, kind: str, which: str, server: RunningServer, request: pytest.FixtureRequest
) -> None:
    pictures = request.getfixturevalue(which)
    sizes = (1, 3, 8)
    with Client(url(server, protocol)) as client:
        start = 0
        while start < len(pictures.files):
            part = slice(start, start + sizes[start % 3])
            if kind == "files":
                found = client.predict_files(pictures.files[part])
            else:
                found = client.predict_pixels(np.ascontiguousarray(pictures.pixels[part]))
            check(found, pictures, part)
            start = part.stop


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sixty_four_clients_at_once_get_the_answers_to_their_own_questions(
    protocol: str, server: RunningServer, drawn
) -> None:
    """Each asks for other images, in other batch sizes, over a connection of its own."""

    async def ask(number: int) -> int:
        async with AsyncClient(url(server, protocol), timeout_s=120, retries=20) as client:
            for turn in range(4):
                rows = [(7 * number + 3 * turn + i) % 200 for i in range(1 + number % 3)]
                if number % 2:
                    found = await client.predict_files([drawn.files[row] for row in rows])
                else:
                    found = await client.predict_pixels(np.ascontiguousarray(drawn.pixels[rows]))
                check(found, drawn, rows)
        return 4

    async def crowd() -> list[int]:
        return await asyncio.gather(*(ask(number) for number in range(64)))

    assert sum(asyncio.run(crowd())) == 256


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_many_files_come_back_in_order_with_the_labels_of_the_bundle(
    protocol: str, server: RunningServer, drawn, tiny_bundle
) -> None:
    sources = [(f"{number}", file) for number, file in enumerate(drawn.files[:50])]
    steps: list[tuple[int, int]] = []
    with Client(url(server, protocol)) as client:
        found = client.classify_files(
            sources, top=2, progress=lambda stage, step, total, values: steps.append((step, total))
        )
    expected = BundleClassifier.from_bundle(tiny_bundle).classify(sources, top=2)
    for got, wanted in zip(found, expected, strict=True):
        assert_same(got, wanted)
    assert steps[-1] == (50, 50)


def assert_same(got: Answer, wanted: Answer) -> None:
    assert got.image == wanted.image
    assert [label.name for label in got.labels] == [label.name for label in wanted.labels]
    assert got.alarm == pytest.approx(wanted.alarm, abs=1e-4)
    for mine, theirs in zip(got.labels, wanted.labels, strict=True):
        assert mine.probability == pytest.approx(theirs.probability, abs=1e-4)


def test_a_client_learns_what_is_served(server: RunningServer, tiny_bundle) -> None:
    with Client(server.config.http_url) as client:
        info = client.info()
    assert (info.name, info.class_names, info.max_batch) == ("shapes", CLASS_NAMES, 8)
    assert info.provenance["bundle_digest"] == tiny_bundle.digest


def test_alarms_and_images_are_counted_beside_tritons_own_metrics(server: RunningServer, drawn) -> None:
    before = counters(server)
    with Client(server.config.grpc_url) as client:
        for start in range(0, 200, 8):
            client.predict_files(drawn.files[start : start + 8])
    after = counters(server)
    loud = int((drawn.expected.alarm >= 0.5).sum())
    images, alarms = (
        'cbpt_images_total{model="shapes"}',
        'cbpt_alarm_total{model="shapes",target="Blue Stripes"}',
    )
    assert after[images] - before[images] == 200
    assert after[alarms] - before[alarms] == loud
    assert any(name.startswith("nv_inference_request_success") for name in after)


def counters(server: RunningServer) -> dict[str, float]:
    """What Triton counts; quantiles, which are no number while nothing is asked, are left out."""
    text = urllib.request.urlopen(server.config.metrics_url).read().decode()
    text = re.sub(r"^.*quantile=.*\n", "", text, flags=re.MULTILINE)
    return {name: float(value) for name, value in re.findall(r"^(\w+\{[^}]*\}) (\S+)$", text, re.MULTILINE)}


def test_triton_adds_labels_for_clients_that_ask_for_classification(server: RunningServer, drawn) -> None:
    from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput

    image = InferInput("image", [1, 1], "BYTES")
    image.set_data_from_numpy(np.array([[drawn.files[0]]], dtype=np.object_))
    wanted = InferRequestedOutput("probabilities", class_count=1)
    with InferenceServerClient(server.config.grpc_url.removeprefix("grpc://")) as client:
        answer = client.infer("shapes", [image], outputs=[wanted]).as_numpy("probabilities")
    assert answer[0, 0].decode().split(":")[2] == CLASS_NAMES[drawn.expected.labels[0]]


@pytest.mark.parametrize(
    "names",
    [c for k in (1, 2, 3) for c in combinations(("logits", "probabilities", "alarm", "alarm_target"), k)],
)
def test_a_client_may_ask_for_any_of_the_outputs(
    names: tuple[str, ...], server: RunningServer, drawn
) -> None:
    async def ask() -> dict[str, np.ndarray]:
        wire = open_wire(server.config.http_url)
        image = np.array([[drawn.files[0]]], dtype=np.object_)
        try:
            return await wire.infer("shapes", {"image": image}, names, 10)
        finally:
            await wire.close()

    assert set(asyncio.run(ask())) == set(names)


def test_the_command_line_prints_the_same_from_a_server_as_from_a_bundle(
    server: RunningServer, tiny_bundle, drawn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cbpt_runtime.__main__ import main

    paths = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    for path, file in zip(paths, drawn.files, strict=False):
        path.write_bytes(file)

    def run(*arguments: object) -> dict:
        with pytest.raises(SystemExit) as done:
            main(["classify", *map(str, arguments), "--json"])
        assert done.value.code == 0
        return json.loads(capsys.readouterr().out)

    there = run("--url", server.config.grpc_url, *paths)
    here = run(tiny_bundle.path, *paths)
    assert there["url"] == server.config.grpc_url
    for got, wanted in zip(there["images"], here["images"], strict=True):
        assert got["image"] == wanted["image"]
        assert [label["name"] for label in got["labels"]] == [label["name"] for label in wanted["labels"]]
        assert got["alarm"] == pytest.approx(wanted["alarm"], abs=1e-4)
