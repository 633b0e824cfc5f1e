"""A served model as a classifier."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cbpt_runtime.classification.classifier import AnyImage, Classifier, Pixels
from cbpt_runtime.classification.prediction import Answer, Prediction, above
from cbpt_runtime.errors import ConfigError, ImageDataError, RequestError, ServingError
from cbpt_runtime.progress import Progress
from cbpt_runtime.runtime.preprocess import Preprocess
from cbpt_runtime.serving import Client
from cbpt_runtime.serving.client.asynchronous import ServedPrediction
from cbpt_runtime.serving.client.wire import WireError, open_wire

_AT_ONCE = 8


class RemoteClassifier(Classifier):
    """A server's encoder and purified head, over HTTP or gRPC. `close` it, or use it in a ``with`` block.

    Image files are sent as they are and decoded there. Pictures and arrays are brought to the model's size
    here and sent as pixels, which the server does not count as alarms; so are the images of an evaluation.

    Args:
        url: Of the server.
        model: Name of the served model, where a server has several.
        timeout_s: For one request with all its retries.

    Raises:
        ConfigError: Not a URL of a server.
        ServingError: No answer, or no model of ours.
    """

    kind = "url"
    digest = None
    encoder = None  # a server does not say

    def __init__(self, url: str, *, model: str | None = None, timeout_s: float = 30.0) -> None:
        self.source, self.place = url, "a server"
        self._timeout_s = timeout_s
        self._client = Client(url, model=model, timeout_s=timeout_s)
        try:
            self.info = self._client.info()
        except BaseException:
            self.close()
            raise
        self.class_names = self.info.class_names
        self.verdict = self.info.provenance.get("verdict")
        served = self.info.provenance.get("bundle_digest", "unknown")
        self.notes = (f"{url} says that it serves the bundle {served}",)

    @cached_property
    def preprocess(self) -> Preprocess:
        """How the server makes the model's pixels of an image."""
        return Preprocess.from_dict(self._stated("preprocess", "preprocess"))

    @property
    def alarm_threshold(self) -> float | None:
        """Above which alarm an image is suspicious, as the server says."""
        return self.info.alarm_threshold

    @cached_property
    def suspects(self) -> tuple[str, ...]:
        """Names of the suspected targets."""
        return tuple(str(name) for name in self._stated("alarm", "suspects").values())

    def predict(self, images: Pixels) -> Prediction:
        """Classify images with the purified head, several requests at once."""
        self.check_pixels(images)
        size = self.info.max_batch
        pieces = [np.ascontiguousarray(images[start : start + size]) for start in range(0, len(images), size)]
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            found = list(threads.map(self._client.predict_pixels, pieces))
        alarm = np.concatenate([part.alarm for part in found])
        return Prediction(
            logits=np.concatenate([part.logits for part in found]),
            probabilities=np.concatenate([part.probabilities for part in found]),
            alarm=alarm,
            suspicious=above(alarm, self.alarm_threshold),
            alarm_target=np.concatenate([part.alarm_target for part in found]),
        )

    def predict_files(self, files: Sequence[bytes]) -> ServedPrediction:
        """Classify image files in one request; they are sent as they are and decoded there."""
        return self._client.predict_files(files)

    def classify(
        self,
        sources: Sequence[tuple[str, AnyImage]],
        *,
        top: int = 5,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> list[Answer]:
        """As `Classifier.classify`; image files are sent as they are, several requests at once."""
        files = [(name, Path(image) if isinstance(image, str) else image) for name, image in sources]
        encoded = [(name, image) for name, image in files if isinstance(image, bytes | Path)]
        if len(encoded) < len(files):
            return super().classify(sources, top=top, batch_size=batch_size, progress=progress)
        return self._client.classify_files(encoded, top=top, batch_size=batch_size, progress=progress)

    def classify_each(
        self, sources: Sequence[tuple[str, AnyImage]], *, top: int = 5
    ) -> list[Answer | ImageDataError | RequestError]:
        """As `Classifier.classify_each`; contents of files are sent as they are, others as pixels."""
        contents = [image for _, image in sources if isinstance(image, bytes)]
        if len(contents) < len(sources):
            return super().classify_each(sources, top=top)
        return [*self._client.ask_files(sources, contents, top=top)]

    def close(self) -> None:
        """Close the connections; safe to call twice."""
        self._client.close()

    def _stated(self, part: str, key: str) -> Any:
        """Return what the configuration of one part of the served model says under a key."""
        name = f"{self.info.name}_{part}"
        with ThreadPoolExecutor(1) as thread:  # the caller may run an event loop of its own
            config = thread.submit(asyncio.run, self._config(name)).result()
        entry = config.get("parameters", {}).get(key, {})
        try:
            value = json.loads(entry.get("string_value", entry.get("stringValue", "")))
            if not isinstance(value, dict):
                raise ValueError("no object")
            if key == "preprocess":
                Preprocess.from_dict(value)
        except (ValueError, RecursionError, ConfigError) as error:
            raise ServingError(
                expected=f"what {name} at {self.source} says of its {key}",
                got=str(error),
                fix="Serve a repository of `cbpt-runtime export` there.",
            ) from error
        return value

    async def _config(self, name: str) -> dict[str, Any]:
        wire = open_wire(self.source)
        try:
            return await wire.config(name, self._timeout_s)
        except WireError as error:
            raise ServingError(
                expected=f"the configuration of {name} from {self.source}",
                got=str(error),
                fix="Let it be read there: an evaluation needs to know how images become pixels.",
            ) from error
        finally:
            await wire.close()
