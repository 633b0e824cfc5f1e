"""The models Triton's python backend runs: one decodes images, one classifies with onnxruntime, one counts.

The last also looks again at suspicious images, where that was exported. They travel inside the model
repository, so a server needs numpy, Pillow and, for the classifier, onnxruntime; nothing of this package
installed.
``triton_python_backend_utils`` exists only inside the server and is imported there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ImageDataError
from .prediction import OUTPUTS, Prediction, prediction_of
from .preprocess import Preprocess, decode_image, to_pixels
from .second_look import PLACES, look_again

ALARM_THRESHOLD = 0.5  # where the repository names none, because its bundle has none
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Decoder:
    """Image files in, pixels at the model's size out: the python-backend model ``<name>_preprocess``."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Set it up: Triton calls this once, with the model's configuration as JSON."""
        parameters = _parameters(args)
        self.preprocess = Preprocess.from_dict(json.loads(parameters["preprocess"]))
        self.max_pixels = int(parameters["max_pixels"])
        self.max_image_bytes = int(parameters["max_image_bytes"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request; an image that cannot be read fails its own request only."""
        import triton_python_backend_utils as pb

        responses = []
        for request in requests:
            try:
                files = pb.get_input_tensor_by_name(request, "image").as_numpy().ravel()
                pixels = self.decode([bytes(file) for file in files])
                response = pb.InferenceResponse(output_tensors=[pb.Tensor("images", pixels)])
            except ImageDataError as error:
                response = _failed(pb.TritonError(str(error), pb.TritonError.INVALID_ARG))
            except Exception as error:  # whatever it is, it is not the neighbours'
                response = _failed(pb.TritonError(f"{type(error).__name__}: {error}"))
            responses.append(response)
        return responses

    def decode(self, files: Sequence[bytes]) -> np.ndarray:
        """Return the files as uint8 [batch, height, width, 3].

        Raises:
            ImageDataError: There is none, or one of them is too large or cannot be read; the text says which.
        """
        if not files:
            raise ImageDataError(expected="at least one image", got="none", fix="Send one.")
        pixels = []
        for number, file in enumerate(files, start=1):
            name = f"image {number} of {len(files)}"
            if len(file) > self.max_image_bytes:
                raise ImageDataError(
                    expected=f"an image file of at most {self.max_image_bytes:,} bytes",
                    got=f"{len(file):,} in {name}",
                    fix="Send a smaller file.",
                )
            image = decode_image(file, max_pixels=self.max_pixels, name=name)
            pixels.append(to_pixels(image, self.preprocess))
        return np.stack(pixels)


class Classifier:
    """Pixels in, answers out: ``<name>_classifier`` on servers without an ONNX Runtime backend."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Set it up: Triton calls this once, with the model's configuration as JSON.

        Raises:
            RuntimeError: onnxruntime does not run on the provider the configuration asks for.
        """
        import onnxruntime

        parameters = _parameters(args)
        provider = _PROVIDERS[parameters["provider"]]
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = int(parameters["intra_op_thread_count"])
        settings.inter_op_num_threads = 1
        graph = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(graph), settings, providers=[provider])
        if self.session.get_providers()[0] != provider:  # onnxruntime falls back to the CPU silently
            raise RuntimeError(f"expected {provider}; got {self.session.get_providers()}")
        self.shape = tuple(self.session.get_inputs()[0].shape[1:])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One run of the network for all requests together, one response for each."""
        import triton_python_backend_utils as pb

        batches = [pb.get_input_tensor_by_name(request, "images").as_numpy() for request in requests]
        fitting = [batch for batch in batches if self._fits(batch)]
        answers = self.classify(np.concatenate(fitting)) if fitting else {}
        responses, end = [], 0
        for batch in batches:
            if not self._fits(batch):
                text = (
                    f"expected at least one image of {self.shape} as uint8; got {batch.dtype} {batch.shape}."
                )
                responses.append(_failed(pb.TritonError(text, pb.TritonError.INVALID_ARG)))
                continue
            start, end = end, end + len(batch)
            tensors = [pb.Tensor(name, answers[name][start:end]) for name in OUTPUTS]
            responses.append(pb.InferenceResponse(output_tensors=tensors))
        return responses

    def _fits(self, batch: np.ndarray) -> bool:
        """Whether the pixels of one request can be put beside those of others."""
        return batch.dtype == np.uint8 and len(batch) > 0 and batch.shape[1:] == self.shape

    def classify(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Logits, probabilities and the alarm of uint8 [batch, height, width, 3]."""
        answers = self.session.run(list(OUTPUTS), {"images": images})
        return dict(zip(OUTPUTS, answers, strict=True))


class AlarmCounter:
    """``<name>_alarm``: passes all answers on and counts alarms per suspected target beside Triton's metrics.

    ``cbpt_images_total{model}`` counts images answered, ``cbpt_alarm_total{model,target}`` those whose alarm
    lies above the level chosen at purification (`ALARM_THRESHOLD` where none was), whichever outputs were
    asked for. Every suspected target has a counter from the start, at zero.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Set it up: Triton calls this once, with the model's configuration as JSON."""
        import triton_python_backend_utils as pb

        parameters = _parameters(args)
        model = parameters["counted_model"]
        self.threshold = np.float32(parameters.get("alarm_threshold", ALARM_THRESHOLD))
        self.families = [
            pb.MetricFamily(name=name, description=description, kind=pb.MetricFamily.COUNTER)
            for name, description in (
                ("cbpt_images_total", "Images classified"),
                ("cbpt_alarm_total", f"Images whose alarm is above {self.threshold:g}"),
            )
        ]
        images, alarms = self.families
        self.images = images.Metric(labels={"model": model})
        self.alarms = {
            int(index): alarms.Metric(labels={"model": model, "target": name})
            for index, name in json.loads(parameters["suspects"]).items()
        }

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request: what it came with."""
        responses = []
        for request in requests:
            given = _given(request, OUTPUTS)
            self.count(given["alarm"], given["alarm_target"])
            responses.append(_response(given))
        return responses

    def count(self, alarm: np.ndarray, target: np.ndarray) -> None:
        """Add images, and those that alarm to the target they alarm about."""
        self.images.increment(alarm.size)
        loud, times = np.unique(target[alarm > self.threshold], return_counts=True)
        for index, number in zip(loud.tolist(), times.tolist(), strict=True):
            if index in self.alarms:
                self.alarms[index].increment(number)


class SecondLooker(AlarmCounter):
    """``<name>_alarm`` of a repository exported with a second look: also looks again at suspicious images.

    The views are classified by ``<name>_classifier``, beside the images of other requests. Requests without
    a suspicious image are answered first, so that they do not wait for the others.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Take the model's configuration, as JSON from Triton."""
        super().initialize(args)
        parameters = _parameters(args)
        self.level = float(parameters["alarm_threshold"])
        self.suspects = [int(index) for index in json.loads(parameters["suspects"])]
        self.classifier = parameters["classifier"]
        self.sigmoid = parameters["probabilities"] == "sigmoid"
        self.max_batch = int(json.loads(args["model_config"])["max_batch_size"])

    def execute(self, requests: Sequence[Any]) -> None:  # type: ignore[override]  # answers go out one by one
        """Answer every request; one whose second look fails, fails alone and may be asked again."""
        import triton_python_backend_utils as pb

        def answer(request: Any, response: Any) -> None:
            final = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            request.get_response_sender().send(response, flags=final)

        waiting = []
        for request in requests:
            given = _given(request, (*OUTPUTS, "images"))
            self.count(given["alarm"], given["alarm_target"])
            if (given["alarm"] > self.threshold).any():
                waiting.append((request, given))
            else:
                answer(request, _response(self.look_once(given)))
        for request, given in waiting:
            try:
                response = _response(self.look_twice(given))
            except Exception as error:  # whatever it is, it is not the neighbours'
                text = f"no second look: {type(error).__name__}: {error}"
                response = _failed(pb.TritonError(text, pb.TritonError.UNAVAILABLE))
            answer(request, response)

    def look_once(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs of images nobody looks at again."""
        count = len(given["alarm"])
        again = {"looked_twice": np.zeros((count, 1), bool), "box": np.zeros((count, 4), np.int64)}
        return {name: given[name] for name in OUTPUTS} | again

    def look_twice(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs after a second look at those of the images that are suspicious.

        Raises:
            RuntimeError: The classifier did not answer.
        """
        found = {name: value.copy() for name, value in self.look_once(given).items()}
        suspicious = np.flatnonzero(given["alarm"].ravel() > self.threshold)
        at_once = max(1, self.max_batch // PLACES**2)
        for start in range(0, len(suspicious), at_once):
            rows = suspicious[start : start + at_once]
            said = look_again(
                given["images"][rows],
                prediction_of({name: given[name][rows] for name in OUTPUTS}, self.level),
                self.classify,
                self.suspects,
                threshold=self.level,
                sigmoid=self.sigmoid,
            )
            found["looked_twice"][rows, 0], found["box"][rows] = said.looked_twice, said.boxes
            freed = found["box"].any(axis=1)[rows]
            found["logits"][rows[freed]] = said.logits[freed]
            found["probabilities"][rows[freed]] = said.probabilities[freed]
        return found

    def classify(self, images: np.ndarray) -> Prediction:
        """Ask the classifier beside this model about uint8 [batch, height, width, 3].

        Raises:
            RuntimeError: It did not answer.
        """
        import triton_python_backend_utils as pb

        parts = []
        for start in range(0, len(images), self.max_batch):
            views = np.ascontiguousarray(images[start : start + self.max_batch])
            request = pb.InferenceRequest(
                model_name=self.classifier,
                requested_output_names=list(OUTPUTS),
                inputs=[pb.Tensor("images", views)],
            )
            response = request.exec()
            if response.has_error():
                raise RuntimeError(response.error().message())
            parts.append({name: pb.get_output_tensor_by_name(response, name).as_numpy() for name in OUTPUTS})
        found = {name: np.concatenate([part[name] for part in parts]) for name in OUTPUTS}
        return prediction_of(found, self.level)


def _given(request: Any, names: Sequence[str]) -> dict[str, np.ndarray]:
    import triton_python_backend_utils as pb

    return {name: pb.get_input_tensor_by_name(request, name).as_numpy() for name in names}


def _response(found: Mapping[str, np.ndarray]) -> Any:
    import triton_python_backend_utils as pb

    return pb.InferenceResponse(output_tensors=[pb.Tensor(name, value) for name, value in found.items()])


def _failed(error: Any) -> Any:
    import triton_python_backend_utils as pb

    return pb.InferenceResponse(output_tensors=[], error=error)


def _parameters(args: Mapping[str, str]) -> dict[str, str]:
    given = json.loads(args["model_config"])["parameters"]
    return {name: entry["string_value"] for name, entry in given.items()}
