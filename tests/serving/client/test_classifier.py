"""A server as a classifier, with a stand-in for the wire: what is sent as files, what as pixels."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cbpt_runtime.classification import Answer
from cbpt_runtime.errors import ConfigError, RequestError, ServingError
from cbpt_runtime.loading import open_classifier
from cbpt_runtime.runtime.preprocess import Preprocess
from cbpt_runtime.serving.client import asynchronous
from cbpt_runtime.serving.client import classifier as served
from cbpt_runtime.serving.client.classifier import RemoteClassifier
from cbpt_runtime.serving.client.wire import WireError

NAMES = ("cat", "dog")
URL = "grpc://server:1"
PREPROCESS = Preprocess(
    image_size=(8, 8),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    interpolation="bicubic",
    resize_mode="squash",
    fill_color=0,
)


class FakeWire:
    """A server of two classes that calls bright images dogs; takes four at once."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.preprocess = json.dumps(PREPROCESS.to_dict())
        self.fails: str | None = None
        self.closed = 0
        self.second_look = False

    async def infer(
        self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str], timeout_s: float
    ) -> dict[str, np.ndarray]:
        ((name, images),) = inputs.items()
        self.asked.append((name, len(images)))
        if name == "image" and b"junk" in images:
            raise WireError("refused", "HTTP 400: not an image")
        bright = (
            images.reshape(len(images), -1).mean(axis=1) / 255 if name == "images" else np.ones(len(images))
        )
        share = np.stack([1 - bright, bright], axis=1).astype(np.float32)
        again = {
            "looked_twice": np.ones((len(images), 1), bool),
            "box": np.tile([1, 2, 3, 4], (len(images), 1)),
        }
        found = {
            "probabilities": share,
            "logits": share,
            "alarm": share[:, 1:],
            "alarm_target": np.ones((len(images), 1), np.int64),
            **(again if self.second_look and model == "pets" else {}),
        }
        return {name: found[name] for name in outputs}

    async def config(self, model: str, timeout_s: float) -> dict[str, Any]:
        if model == self.fails:
            raise WireError("refused", "HTTP 404")
        stated = {
            "pets": {"class_names": json.dumps(NAMES), "bundle_digest": "ab" * 32, "verdict": "backdoored"},
            "pets_preprocess": {"preprocess": self.preprocess},
            "pets_alarm": {"suspects": json.dumps({1: "dog"})},
        }[model]
        if self.second_look:
            stated = {**stated, "second_look": "true"}
        return {
            "max_batch_size": 4,
            "parameters": {key: {"string_value": value} for key, value in stated.items()},
        }

    async def models(self, timeout_s: float) -> list[str]:
        return ["pets", "pets_alarm", "pets_classifier", "pets_preprocess"]

    async def close(self) -> None:
        self.closed += 1


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> FakeWire:
    fake = FakeWire()
    monkeypatch.setattr(asynchronous, "open_wire", lambda url, headers: fake)
    monkeypatch.setattr(served, "open_wire", lambda url: fake)
    return fake


def test_a_server_says_what_it_serves(wire: FakeWire) -> None:
    with open_classifier(URL) as classifier:
        assert (classifier.kind, classifier.source, classifier.digest) == ("url", URL, None)
        assert (classifier.class_names, classifier.verdict) == (NAMES, "backdoored")
        assert (classifier.preprocess, classifier.suspects) == (PREPROCESS, ("dog",))
        assert (classifier.detector, classifier.encoder) == ("alarm", None)
        assert classifier.notes == (f"{URL} says that it serves the bundle {'ab' * 32}",)
        assert repr(classifier) == f"<RemoteClassifier {URL}: 2 classes, backdoored, on a server>"
    assert wire.closed >= 1


def test_pixels_are_sent_in_requests_the_server_takes_and_come_back_in_order(wire: FakeWire) -> None:
    images = np.stack([np.full((8, 8, 3), 20 * number, np.uint8) for number in range(11)])
    with RemoteClassifier(URL) as classifier:
        found = classifier.predict(images)
    np.testing.assert_allclose(found.probabilities[:, 1], np.arange(11) * 20 / 255, atol=1e-6)
    np.testing.assert_array_equal(found.alarm, found.probabilities[:, 1])
    assert sorted(wire.asked) == [("images", 3), ("images", 4), ("images", 4)]
    assert found.reference_labels is None


def test_files_are_sent_as_they_are_and_pictures_as_pixels(wire: FakeWire, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.new("RGB", (20, 20), (255, 255, 255)).save(path)
    with RemoteClassifier(URL) as classifier:
        assert classifier(str(path), top=1).labels[0].name == "dog"
        assert [answer.image for answer in classifier([path, path.read_bytes()])] == [str(path), "image 2"]
        assert {name for name, _ in wire.asked} == {"image"}
        wire.asked.clear()
        black = Image.new("RGB", (20, 20))
        assert [answer.labels[0].name for answer in classifier([black, np.asarray(black)])] == ["cat", "cat"]
        assert wire.asked == [("images", 2)]


def test_each_file_gets_its_answer_or_why_it_was_refused(wire: FakeWire, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.new("RGB", (20, 20), (255, 255, 255)).save(path)
    sources = [("a", path.read_bytes()), ("b", b"junk"), ("c", path.read_bytes())]
    with RemoteClassifier(URL) as classifier:
        first, refused, last = classifier.classify_each(sources, top=1)
    assert isinstance(first, Answer)
    assert (first.image, first.labels[0].name, first.alarm_target) == ("a", "dog", "dog")
    assert isinstance(refused, RequestError)
    assert "not an image" in refused.got
    assert isinstance(last, Answer)
    assert last.image == "c"
    assert {name for name, _ in wire.asked} == {"image"}


def test_a_program_with_an_event_loop_of_its_own_may_ask(wire: FakeWire) -> None:
    async def ask() -> Preprocess:
        with RemoteClassifier(URL) as classifier:
            return classifier.preprocess

    assert asyncio.run(ask()) == PREPROCESS


def test_a_server_that_looks_twice_answers_files_and_pictures_so_and_keeps_the_head_beside_it(
    wire: FakeWire, tmp_path: Path
) -> None:
    path = tmp_path / "photo.png"
    Image.new("RGB", (20, 20)).save(path)
    wire.second_look = True
    with open_classifier(URL, second_look=True) as classifier:
        for image in (path, Image.new("RGB", (20, 20))):
            answer = classifier(image, top=1)
            assert (answer.labels[0].name, answer.looked_twice, answer.box) == ("dog", True, (1, 2, 3, 4))
        found = classifier.predict(np.zeros((5, 8, 8, 3), np.uint8))
        assert (found.labels.tolist(), found.head_labels.tolist()) == ([1] * 5, [0] * 5)
        assert any("looked at twice" in note for note in classifier.notes)


def test_a_server_that_does_not_look_twice_is_not_taken_for_one_that_does(wire: FakeWire) -> None:
    with pytest.raises(ConfigError, match="exported without a second look"):
        open_classifier(URL, second_look=True)
    assert wire.closed


@pytest.mark.parametrize("stated", ["", "[]", "{}", "[" * 100_000])
def test_a_server_that_hides_how_images_become_pixels_is_named(stated: str, wire: FakeWire) -> None:
    wire.preprocess = stated
    with RemoteClassifier(URL) as classifier, pytest.raises(ServingError, match="pets_preprocess"):
        classifier.predict(np.zeros((1, 8, 8, 3), np.uint8))


def test_a_configuration_that_may_not_be_read_is_named(wire: FakeWire) -> None:
    wire.fails = "pets_preprocess"
    with RemoteClassifier(URL) as classifier, pytest.raises(ServingError, match="HTTP 404"):
        _ = classifier.preprocess
