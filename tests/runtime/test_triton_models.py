"""The python-backend models, with a stand-in for Triton's own module."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from cbpt_runtime.runtime.prediction import Prediction, above
from cbpt_runtime.runtime.preprocess import Preprocess
from cbpt_runtime.runtime.second_look import look_again
from cbpt_runtime.runtime.triton_models import AlarmCounter, Classifier, Decoder, SecondLooker
from cbpt_runtime.runtime.zero_shot import alarm as loudness
from cbpt_runtime.runtime.zero_shot import probabilities

PREPROCESS = Preprocess(image_size=(8, 8), resize_mode="squash")


@dataclass
class Tensor:
    name: str
    value: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.value


@dataclass
class TritonError:
    message: str
    code: str = "internal"
    INVALID_ARG = "invalid"
    UNAVAILABLE = "unavailable"


@dataclass
class Response:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        return next(tensor.value for tensor in self.output_tensors if tensor.name == name)


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = SimpleNamespace(
        Tensor=Tensor,
        TritonError=TritonError,
        InferenceResponse=Response,
        get_input_tensor_by_name=lambda request, name: request[name],
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)


def arguments(parameters: dict[str, Any], **others: str) -> dict[str, str]:
    entries = {name: {"string_value": str(value)} for name, value in parameters.items()}
    return {"model_config": json.dumps({"parameters": entries}), **others}


def png(colour: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> bytes:
    file = BytesIO()
    Image.new("RGB", size, colour).save(file, format="PNG")
    return file.getvalue()


def request(files: Sequence[bytes]) -> dict[str, Tensor]:
    return {"image": Tensor("image", np.array(files, dtype=object)[:, None])}


@pytest.fixture
def decoder() -> Decoder:
    model = Decoder()
    parameters = {"preprocess": json.dumps(PREPROCESS.to_dict()), "max_pixels": 100, "max_image_bytes": 5000}
    model.initialize(arguments(parameters))
    return model


def test_files_become_pixels_one_response_per_request(decoder: Decoder) -> None:
    red, blue = png((255, 0, 0)), png((0, 0, 255))
    first, second = decoder.execute([request([red, blue]), request([blue])])
    assert first["images"].shape == (2, 8, 8, 3)
    assert first["images"].dtype == np.uint8
    assert first["images"][0, 0, 0].tolist() == [255, 0, 0]
    assert second["images"][0, 0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("file", "named"),
    [
        (b"junk", "a whole, readable image"),
        (b"", "a whole, readable image"),
        (png((1, 2, 3), (30, 30)), "at most 100 pixels"),
        (b"\0" * 6000, "at most 5,000 bytes"),
    ],
)
def test_a_bad_image_fails_its_own_request_only(file: bytes, named: str, decoder: Decoder) -> None:
    good, bad, also_good = decoder.execute(
        [request([png((9, 9, 9))]), request([file]), request([png((9, 9, 9))])]
    )
    assert bad.error is not None
    assert bad.error.code == TritonError.INVALID_ARG
    assert named in bad.error.message
    assert good.error is None
    assert also_good["images"].shape == (1, 8, 8, 3)


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError, UserWarning, MemoryError])
def test_whatever_a_decoder_raises_fails_its_own_request_and_names_the_image(
    kind: type[Exception], decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Image.open

    def open_or_fail(file: BytesIO, **options: Any) -> Image.Image:
        if file.getvalue() == b"worse than junk":
            raise kind("no such thing")
        return real(file, **options)

    monkeypatch.setattr(Image, "open", open_or_fail)
    file = png((9, 9, 9))
    good, bad, also_good = decoder.execute(
        [request([file]), request([file, b"worse than junk", file]), request([file])]
    )
    assert bad.error is not None
    assert bad.error.code == TritonError.INVALID_ARG
    assert "image 2 of 3" in bad.error.message
    assert good.error is None is also_good.error


def test_a_request_that_cannot_be_read_at_all_fails_alone(decoder: Decoder) -> None:
    good, none, broken = decoder.execute([request([png((9, 9, 9))]), request([]), {}])
    assert good.error is None
    assert none.error is not None
    assert "at least one image" in none.error.message
    assert broken.error is not None
    assert broken.error.message == "KeyError: 'image'"


def test_the_classifier_runs_all_requests_together_and_splits_the_answers(tmp_path: Path) -> None:
    write_graph(tmp_path / "1" / "model.onnx")
    model = Classifier()
    parameters = {"provider": "cpu", "intra_op_thread_count": 1}
    model.initialize(arguments(parameters, model_repository=str(tmp_path), model_version="1"))
    images = np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3)
    batches = [images[:1], images[1:]]
    responses = model.execute([{"images": Tensor("images", batch)} for batch in batches])
    for response, batch in zip(responses, batches, strict=True):
        assert response["logits"].shape == (len(batch), 3)
        np.testing.assert_allclose(response["logits"], batch.astype(np.float32).mean(axis=(1, 2)), rtol=1e-5)
        assert response["alarm"].shape == (len(batch),)


@pytest.mark.parametrize("shape", [(8, 8, 3), (1, 8, 9, 3), (0, 8, 8, 3)])
def test_pixels_of_another_shape_fail_alone(tmp_path: Path, shape: tuple[int, ...]) -> None:
    write_graph(tmp_path / "1" / "model.onnx")
    model = Classifier()
    parameters = {"provider": "cpu", "intra_op_thread_count": 1}
    model.initialize(arguments(parameters, model_repository=str(tmp_path), model_version="1"))
    batches = [np.ones((2, 8, 8, 3), np.uint8), np.ones(shape, np.uint8), np.ones((1, 8, 8, 3), np.uint8)]
    first, bad, last = model.execute([{"images": Tensor("images", batch)} for batch in batches])
    assert bad.error is not None
    assert (bad.error.code, "at least one image of (8, 8, 3)" in bad.error.message) == (
        TritonError.INVALID_ARG,
        True,
    )
    assert (first["alarm"].shape, last["alarm"].shape) == ((2,), (1,))


def test_a_provider_that_is_not_there_stops_the_model(tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has it")
    write_graph(tmp_path / "1" / "model.onnx")
    parameters = {"provider": "cuda", "intra_op_thread_count": 1}
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(RuntimeError, match="expected CUDAExecutionProvider"),
    ):
        Classifier().initialize(arguments(parameters, model_repository=str(tmp_path), model_version="1"))


def write_graph(path: Path) -> None:
    """A graph with the served signature: logits are channel means."""
    shape = ["batch", 8, 8, 3]
    axes = onnx.numpy_helper.from_array(np.array([1, 2]), "axes")
    last = onnx.numpy_helper.from_array(np.array([1]), "last")
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["logits"], keepdims=0),
        helper.make_node("Softmax", ["logits"], ["probabilities"]),
        helper.make_node("ReduceMax", ["probabilities", "last"], ["alarm"], keepdims=0),
        helper.make_node("ArgMax", ["probabilities"], ["alarm_target"], axis=1, keepdims=0),
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
        for name, dims in (("logits", ["batch", 3]), ("probabilities", ["batch", 3]), ("alarm", ["batch"]))
    ]
    outputs.append(helper.make_tensor_value_info("alarm_target", TensorProto.INT64, ["batch"]))
    inputs = [helper.make_tensor_value_info("images", TensorProto.UINT8, shape)]
    graph = helper.make_graph(nodes, "means", inputs, outputs, [axes, last])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.parent.mkdir(parents=True)
    onnx.save(model, path)


class Counter:
    """Stands in for Triton's metric."""

    def __init__(self) -> None:
        self.value = 0.0

    def increment(self, value: float) -> None:
        self.value += value


class Family:
    """Stands in for Triton's metric family."""

    COUNTER = "counter"
    known: ClassVar[dict[tuple[str, ...], Counter]] = {}

    def __init__(self, *, name: str, description: str, kind: str) -> None:
        assert description
        assert kind == self.COUNTER
        self.name = name

    def Metric(self, *, labels: dict[str, str]) -> Counter:
        return self.known.setdefault((self.name, *labels.values()), Counter())


def test_alarms_are_counted_per_suspected_target_and_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["triton_python_backend_utils"], "MetricFamily", Family, raising=False)
    Family.known.clear()
    model = AlarmCounter()
    model.initialize(arguments({"counted_model": "shop", "suspects": json.dumps({3: "teapot", 7: "fig"})}))
    assert {name: counter.value for name, counter in Family.known.items()} == {
        ("cbpt_images_total", "shop"): 0,
        ("cbpt_alarm_total", "shop", "teapot"): 0,
        ("cbpt_alarm_total", "shop", "fig"): 0,
    }
    alarm, target = np.array([[0.9], [0.51], [0.5]], np.float32), np.array([[3], [7], [7]])
    answers = {"logits": np.ones((3, 9)), "probabilities": np.ones((3, 9)), "alarm": alarm}
    tensors = {name: Tensor(name, value) for name, value in {**answers, "alarm_target": target}.items()}
    first, second = model.execute([tensors, tensors])
    np.testing.assert_array_equal(first["alarm"], alarm)
    np.testing.assert_array_equal(second["alarm_target"], target)
    assert first["logits"].shape == second["probabilities"].shape == (3, 9)
    assert {name: counter.value for name, counter in Family.known.items()} == {
        ("cbpt_images_total", "shop"): 6,
        ("cbpt_alarm_total", "shop", "teapot"): 2,
        ("cbpt_alarm_total", "shop", "fig"): 2,
    }


def test_without_suspects_only_images_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["triton_python_backend_utils"], "MetricFamily", Family, raising=False)
    Family.known.clear()
    model = AlarmCounter()
    model.initialize(arguments({"counted_model": "shop", "suspects": "{}"}))
    model.count(np.zeros((4, 1), np.float32), np.full((4, 1), -1))
    assert {name: counter.value for name, counter in Family.known.items()} == {
        ("cbpt_images_total", "shop"): 4
    }


LEVEL = 0.2


def answered(images: np.ndarray) -> dict[str, np.ndarray]:
    """Class 1 on grey images; where a pixel is red the original head says 2 and the purified one wavers."""
    red = ((images[..., 0] == 255) & (images[..., 1] == 0)).any(axis=(1, 2))[:, None]
    before = np.where(red, [0.0, 0.0, 9.0], [0.0, 5.0, 1.0]).astype(np.float32)
    logits = np.where(red, [2.0, 1.0, -3.0], [0.0, 5.0, 1.0]).astype(np.float32)
    alarm = loudness(before, logits, [2])[:, None]
    target = np.full((len(images), 1), 2)
    return {
        "logits": logits,
        "probabilities": probabilities(logits),
        "alarm": alarm,
        "alarm_target": target,
    }


@dataclass
class ServedRequest:
    """A request to the model that looks twice: what the classifier said of some images, and the images."""

    images: np.ndarray
    order: list[int]
    number: int
    response: Response | None = None

    def __getitem__(self, name: str) -> Tensor:
        return Tensor(name, {"images": self.images, **answered(self.images)}[name])

    def get_response_sender(self) -> ServedRequest:
        return self

    def send(self, response: Response, *, flags: int) -> None:
        assert flags == 1
        self.response = response
        self.order.append(self.number)


class Asked:
    """Stands in for a request to the classifier beside the model; as many images at once as it takes."""

    sizes: ClassVar[list[int]] = []
    fails: ClassVar[bool] = False

    def __init__(self, *, model_name: str, requested_output_names: list[str], inputs: list[Tensor]) -> None:
        assert model_name == "shop_classifier"
        (self.images,) = (tensor.value for tensor in inputs)
        self.names = requested_output_names

    def exec(self) -> Asked:
        self.sizes.append(len(self.images))
        return self

    def has_error(self) -> bool:
        return self.fails

    def error(self) -> SimpleNamespace:
        return SimpleNamespace(message=lambda: "queue is full")

    def __getitem__(self, name: str) -> Tensor:
        return Tensor(name, answered(self.images)[name])


@pytest.fixture
def looker(monkeypatch: pytest.MonkeyPatch) -> SecondLooker:
    backend = sys.modules["triton_python_backend_utils"]
    for name, value in {
        "MetricFamily": Family,
        "InferenceRequest": Asked,
        "TRITONSERVER_RESPONSE_COMPLETE_FINAL": 1,
        "get_output_tensor_by_name": lambda response, name: response[name],
    }.items():
        monkeypatch.setattr(backend, name, value, raising=False)
    Family.known.clear()
    monkeypatch.setattr(Asked, "sizes", [])
    model = SecondLooker()
    parameters = {
        "counted_model": "shop",
        "suspects": json.dumps({2: "teapot"}),
        "alarm_threshold": LEVEL,
        "classifier": "shop_classifier",
        "probabilities": "softmax",
    }
    config = json.loads(arguments(parameters)["model_config"]) | {"max_batch_size": 10}
    model.initialize({"model_config": json.dumps(config)})
    return model


def shown(*triggered: bool) -> np.ndarray:
    images = np.full((len(triggered), 32, 32, 3), 120, np.uint8)
    images[np.array(triggered), 3:6, 20:23] = (255, 0, 0)
    return images


def test_suspicious_images_are_looked_at_again_as_in_process(looker: SecondLooker) -> None:
    images = shown(False, True, False, True, True)
    order: list[int] = []
    requests = [
        ServedRequest(images=images, order=order, number=0),
        ServedRequest(images=shown(False, False), order=order, number=1),
    ]
    assert looker.execute(requests) is None
    assert order == [1, 0]  # who has no suspicious image does not wait
    assert max(Asked.sizes) <= 10
    first, clean = (request.response for request in requests)
    said = answered(images)
    prediction = Prediction(
        logits=said["logits"],
        probabilities=said["probabilities"],
        alarm=said["alarm"].ravel(),
        suspicious=above(said["alarm"].ravel(), LEVEL),
    )
    expected = look_again(images, prediction, looker.classify, [2], threshold=LEVEL)
    assert first["looked_twice"].ravel().tolist() == [False, True, False, True, True]
    assert first["box"].any(axis=1).tolist() == [False, True, False, True, True]
    np.testing.assert_array_equal(first["box"], expected.boxes)
    np.testing.assert_allclose(first["probabilities"], expected.probabilities, rtol=1e-6)
    np.testing.assert_array_equal(first["logits"].argmax(axis=1), [1] * 5)
    np.testing.assert_array_equal(first["alarm"], said["alarm"])
    assert not clean["looked_twice"].any()
    assert not clean["box"].any()
    assert Family.known["cbpt_images_total", "shop"].value == 7
    assert Family.known["cbpt_alarm_total", "shop", "teapot"].value == 3


def test_a_second_look_that_fails_fails_alone_and_may_be_asked_again(
    looker: SecondLooker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Asked, "fails", True)
    requests = [
        ServedRequest(images=shown(triggered), order=[], number=0) for triggered in (True, False, True)
    ]
    looker.execute(requests)
    first, clean, last = (request.response for request in requests)
    assert first.error is not None
    assert (first.error.code, "queue is full" in first.error.message) == (TritonError.UNAVAILABLE, True)
    assert last.error is not None
    assert clean.error is None
