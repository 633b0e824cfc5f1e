"""A served model as a classifier."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cbpt_runtime.classification.classifier import AnyImage, Classifier
from cbpt_runtime.errors import ConfigError, ImageDataError, RequestError, ServingError
from cbpt_runtime.progress import Progress
from cbpt_runtime.runtime.prediction import Answer, Prediction, above
from cbpt_runtime.runtime.preprocess import Pixels, Preprocess
from cbpt_runtime.serving import Client
from cbpt_runtime.serving.client.asynchronous import ServedPrediction
from cbpt_runtime.serving.client.wire import WireError, open_wire

_AT_ONCE = 8


class RemoteClassifier(Classifier):
    """A server's encoder and purified head, over HTTP or gRPC. `close` it, or use it in a ``with`` block.

    Image files are sent as they are and decoded there. Pictures and arrays are brought to the model's size
    here and sent as pixels, which the server does not count as alarms; so are the images of an evaluation.
    A server that looks twice does so with files only: it is sent pixels for its first answer, and the same
    pixels as PNG files, which it counts, for its last.

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
        self.looks_twice = self.info.second_look
        self.notes = (f"{url} says that it serves the bundle {served}",)
        if self.looks_twice:
            self.notes += (f"{url}: suspicious images are looked at twice, and all images counted, there",)

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
            first = _joined(list(threads.map(self._client.predict_pixels, pieces)))
            said = replace(first, suspicious=above(first.alarm, self.alarm_threshold))
            if not self.looks_twice:
                return said
            last = _joined(list(threads.map(self._client.predict_files, map(_files, pieces))))
        return replace(
            said,
            logits=last.logits,
            probabilities=last.probabilities,
            looked_twice=last.looked_twice,
            boxes=last.boxes,
            head_logits=first.logits,
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


def _joined(parts: Sequence[ServedPrediction]) -> Prediction:
    """Join the answers of several requests."""
    joined: dict[str, Any] = {}
    for name in (field.name for field in fields(ServedPrediction)):
        values = [getattr(part, name) for part in parts]
        joined[name] = None if values[0] is None else np.concatenate(values)
    return Prediction(**joined)


def _files(images: Pixels) -> list[bytes]:
    """Pixels as files that decode to the same pixels."""
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="PNG", compress_level=1)
        files.append(file.getvalue())
    return files
