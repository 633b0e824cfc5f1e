"""A real Triton that looks again at suspicious images: the same answers as here, over both protocols."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.classification.classifier import SecondLook
from cbpt_runtime.evaluation import evaluate_all
from cbpt_runtime.loading import open_classifier
from cbpt_runtime.runtime.prediction import Prediction
from cbpt_runtime.serving import AsyncClient, Client, RunningServer, ServeConfig, running_server
from cbpt_runtime.serving.client.asynchronous import ServedPrediction
from cbpt_runtime.serving.triton.servers import TritonServer

from .test_answers import counters

PROTOCOLS = ("http", "grpc")


@pytest.fixture(scope="module")
def looking(tritonserver: TritonServer, twice_served: Path) -> Iterator[RunningServer]:
    """A server of a repository exported with a second look, whose self-test has seen one."""
    config = ServeConfig(http_port=0, grpc_port=0, metrics_port=0, drain_timeout_s=10.0)
    with running_server(twice_served, config, tell=print) as running:
        yield running
        running.require_running()


@pytest.fixture(scope="module")
def folder(tiny_image_folder: Path, tiny_triggered_folder: Path, tmp_path_factory: Any) -> Path:
    """Half of the images with a trigger, one folder per class."""
    mixed = tmp_path_factory.mktemp("mixed")
    for path in sorted(tiny_image_folder.rglob("*.png")):
        source = tiny_triggered_folder if int(path.stem) % 2 else tiny_image_folder
        (mixed / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(source / path.parent.name / path.name, mixed / path.parent.name)
    return mixed


@pytest.fixture(scope="module")
def files(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.rglob("*.png"))]


@pytest.fixture(scope="module")
def expected(levelled_bundle: Bundle, files: list[bytes]) -> Prediction:
    """What a second look says in this process; of every kind of answer there is one."""
    classifier = SecondLook(BundleClassifier.from_bundle(levelled_bundle, "cpu"))
    said = classifier.predict(classifier.read(files))
    assert said.suspicious is not None
    assert said.looked_twice is not None
    assert said.boxes is not None
    freed = said.boxes.any(axis=1)
    assert freed.any()
    assert (said.looked_twice & ~freed).any() or (said.suspicious & ~said.looked_twice).any()
    assert not said.suspicious.all()
    assert (said.labels != said.head_labels).any()
    return said


def check(found: ServedPrediction, expected: Prediction, rows: list[int]) -> None:
    assert found.looked_twice is not None
    assert expected.looked_twice is not None
    np.testing.assert_array_equal(found.looked_twice, expected.looked_twice[rows])
    np.testing.assert_array_equal(found.boxes, expected.boxes[rows])
    np.testing.assert_allclose(found.probabilities, expected.probabilities[rows], atol=1e-4)
    np.testing.assert_allclose(found.alarm, expected.alarm[rows], atol=1e-4)
    np.testing.assert_array_equal(found.logits.argmax(axis=1), expected.labels[rows])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_files_are_looked_at_twice_as_here_and_counted_once(
    protocol: str, looking: RunningServer, files: list[bytes], expected: Prediction
) -> None:
    before = counters(looking)
    with Client(getattr(looking.config, f"{protocol}_url")) as client:
        assert client.info().second_look
        for start in range(0, len(files), 5):
            rows = list(range(start, min(start + 5, len(files))))
            check(client.predict_files([files[row] for row in rows]), expected, rows)
    grown = {name: value - before[name] for name, value in counters(looking).items() if "cbpt_" in name}
    assert grown['cbpt_images_total{model="shapes"}'] == len(files)
    assert grown['cbpt_alarm_total{model="shapes",target="Blue Stripes"}'] == int(expected.suspicious.sum())


def test_many_at_once_get_the_answers_to_their_own_questions(
    looking: RunningServer, files: list[bytes], expected: Prediction
) -> None:
    async def ask(number: int) -> None:
        rows = [(7 * number + step) % len(files) for step in range(1 + number % 8)]
        async with AsyncClient(looking.config.grpc_url, timeout_s=120, retries=20) as client:
            check(await client.predict_files([files[row] for row in rows]), expected, rows)

    async def crowd() -> None:
        await asyncio.gather(*(ask(number) for number in range(64)))

    asyncio.run(crowd())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pixels_get_the_answer_of_the_head_alone(
    protocol: str, looking: RunningServer, levelled_bundle: Bundle, files: list[bytes], expected: Prediction
) -> None:
    pixels = BundleClassifier.from_bundle(levelled_bundle, "cpu").read(files[:8])
    with Client(getattr(looking.config, f"{protocol}_url")) as client:
        found = client.predict_pixels(pixels)
    assert (found.looked_twice, found.boxes) == (None, None)
    np.testing.assert_array_equal(found.logits.argmax(axis=1), expected.head_labels[:8])


def test_the_command_says_what_was_looked_at_twice_and_where(
    looking: RunningServer, folder: Path, expected: Prediction, run: Callable
) -> None:
    done = run("classify", "--url", looking.config.http_url, folder, "--json")
    assert done.code == 0, done.err
    images = json.loads(done.out)["images"]
    assert [image["suspicious"] for image in images] == expected.suspicious.tolist()
    assert [image["looked_twice"] for image in images] == expected.looked_twice.tolist()
    boxes = [box if any(box) else None for box in expected.boxes.tolist()]
    assert [image["box"] for image in images] == boxes
    assert "covered" in run("classify", "--url", looking.config.grpc_url, folder).out


def test_an_evaluation_measures_what_users_get_and_the_head_beside_it(
    looking: RunningServer, levelled_bundle: Bundle, folder: Path
) -> None:
    here, there = evaluate_all(
        [levelled_bundle, looking.config.grpc_url], folder, target="blue stripes",
        device="cpu", second_look=True,
    )  # fmt: skip
    assert (there.after, there.after_head_alone) == (here.after, here.after_head_alone)
    np.testing.assert_array_equal(there.clean.after, here.clean.after)
    assert (there.clean.after != there.clean.after_head_alone).any()
    assert any("looked at twice, and all images counted" in note for note in there.notes)


def test_arrays_are_looked_at_twice_too(
    looking: RunningServer, files: list[bytes], expected: Prediction
) -> None:
    rows = np.flatnonzero(expected.looked_twice)[:3]
    with open_classifier(looking.config.http_url, second_look=True) as classifier:
        pixels = classifier.read([files[row] for row in rows])
        found = classifier.predict(pixels)
    np.testing.assert_array_equal(found.boxes, expected.boxes[rows])
    np.testing.assert_array_equal(found.labels, expected.labels[rows])
    np.testing.assert_array_equal(found.head_labels, expected.head_labels[rows])
