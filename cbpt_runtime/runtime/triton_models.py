"""The models Triton's python backend runs: one decodes images, one classifies with onnxruntime, one counts.

They travel inside the model repository, so a server needs numpy, Pillow and, for the classifier, onnxruntime;
nothing of this package installed.
``triton_python_backend_utils`` exists only inside the server and is imported there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ImageDataError
from .preprocess import Preprocess, decode_image, to_pixels

ALARM_THRESHOLD = 0.5  # where the repository names none, because its bundle has none
_OUTPUTS = ("logits", "probabilities", "alarm", "alarm_target")
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
            tensors = [pb.Tensor(name, answers[name][start:end]) for name in _OUTPUTS]
            responses.append(pb.InferenceResponse(output_tensors=tensors))
        return responses

    def _fits(self, batch: np.ndarray) -> bool:
        """Whether the pixels of one request can be put beside those of others."""
        return batch.dtype == np.uint8 and len(batch) > 0 and batch.shape[1:] == self.shape

    def classify(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Logits, probabilities and the alarm of uint8 [batch, height, width, 3]."""
        answers = self.session.run(list(_OUTPUTS), {"images": images})
        return dict(zip(_OUTPUTS, answers, strict=True))


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
        import triton_python_backend_utils as pb

        responses = []
        for request in requests:
            given = {name: pb.get_input_tensor_by_name(request, name).as_numpy() for name in _OUTPUTS}
            self.count(given["alarm"], given["alarm_target"])
            tensors = [pb.Tensor(name, value) for name, value in given.items()]
            responses.append(pb.InferenceResponse(output_tensors=tensors))
        return responses

    def count(self, alarm: np.ndarray, target: np.ndarray) -> None:
        """Add images, and those that alarm to the target they alarm about."""
        self.images.increment(alarm.size)
        loud, times = np.unique(target[alarm > self.threshold], return_counts=True)
        for index, number in zip(loud.tolist(), times.tolist(), strict=True):
            if index in self.alarms:
                self.alarms[index].increment(number)


def _failed(error: Any) -> Any:
    import triton_python_backend_utils as pb

    return pb.InferenceResponse(output_tensors=[], error=error)


def _parameters(args: Mapping[str, str]) -> dict[str, str]:
    given = json.loads(args["model_config"])["parameters"]
    return {name: entry["string_value"] for name, entry in given.items()}
