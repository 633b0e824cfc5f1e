"""The client of a served classifier; `cbpt_runtime.serving.client.blocking` has the same without await.

    async with AsyncClient("grpc://127.0.0.1:8001") as client:
        print(await client.classify("photo.jpg"))

Image files are sent as they are and decoded by the server. Nothing but the server's URL is ever opened:
an image is a path or bytes, never a URL.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from cbpt_runtime.artifacts import read_regular_file
from cbpt_runtime.errors import ConfigError, ImageDataError, RequestError, ServingError
from cbpt_runtime.progress import Progress
from cbpt_runtime.runtime.prediction import Answer, Prediction, above, answers_of, parse_level
from cbpt_runtime.serving.client.wire import Retries, Wire, open_wire

_MAX_FILE_BYTES = 10**9  # the most any repository takes
_OUTPUTS = ("probabilities", "logits", "alarm", "alarm_target")
_SECOND_LOOK = ("looked_twice", "box")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedPrediction:
    """What a server says about a batch of images.

    Attributes:
        logits: Of the purified head.
        probabilities: Of the purified head, in [0, 1].
        alarm: In [0, 1]: how strongly only the original head calls a suspected target.
        alarm_target: Class index the alarm speaks of; -1 when nothing is suspected.
        looked_twice: As in `Prediction`; None where the server does not look twice, or was sent pixels.
        boxes: Likewise.
    """

    logits: Float[np.ndarray, "batch classes"]
    probabilities: Float[np.ndarray, "batch classes"]
    alarm: Float[np.ndarray, " batch"]
    alarm_target: Int[np.ndarray, " batch"]
    looked_twice: Bool[np.ndarray, " batch"] | None = None
    boxes: Int[np.ndarray, "batch 4"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a server says about the model it serves.

    Attributes:
        name: Of the model that takes image files; ``<name>_classifier`` takes pixels.
        class_names: In the order of the probabilities.
        max_batch: Images per request at most.
        provenance: Digests of what is served.
        alarm_threshold: Above which alarm an image is suspicious; None where the server does not say.
        second_look: Whether it looks again at suspicious images that come as files.
    """

    name: str
    class_names: tuple[str, ...]
    max_batch: int
    provenance: dict[str, str]
    alarm_threshold: float | None = None
    second_look: bool = False


class AsyncClient:
    """Asks a served classifier. Use it in one event loop, from as many tasks as you like.

    Args:
        url: ``grpc://host:port`` or ``http://host:port``; ``grpcs://`` and ``https://`` with TLS.
        model: Name of the served model; needed only where a server has several.
        timeout_s: For one request with all its retries.
        retries: How often a request is sent again when the connection fails or the server has no room
            (HTTP 503, and 429 or 502 of a gateway); nothing else is ever sent twice.
        in_flight: Requests on their way at once, for many files.
        headers: Sent with every request, for a gateway that wants to know who asks.

    Raises:
        ConfigError: Not a URL of a server, or a number out of range.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        timeout_s: float = 30.0,
        retries: int = 5,
        in_flight: int = 8,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if in_flight < 1:
            raise ConfigError(
                expected="at least 1 request in flight", got=str(in_flight), fix="Correct the argument."
            )
        self.url = url
        self._retries = Retries(url=url, timeout_s=timeout_s, number=retries)
        self.in_flight = in_flight
        self._model = model
        self._info: ModelInfo | None = None
        self._wire: Wire = open_wire(url, headers=headers)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._wire.close()

    async def info(self) -> ModelInfo:
        """Return what is served; asked once.

        Raises:
            ServingError: No answer, or no model of ours.
            RequestError: There is no model of that name.
        """
        if self._info is None:
            name = self._model or await self._only_model()
            config = await self._retries.ask(lambda left_s: self._wire.config(name, left_s))
            self._info = _model_info(name, config, self.url)
        return self._info

    async def predict_files(self, files: Sequence[bytes]) -> ServedPrediction:
        """Logits, probabilities and alarm of encoded images (JPEG, PNG, WebP, ...), in one request.

        Raises:
            RequestError: The server refused it; one unreadable image is enough.
            ServingError: No answer in time, or the server failed.
        """
        info = await self.info()
        images = np.array(list(files), dtype=np.object_).reshape(len(files), 1)
        outputs = (*_OUTPUTS, *_SECOND_LOOK) if info.second_look else _OUTPUTS
        return await self._predict(info.name, {"image": images}, outputs)

    async def predict_pixels(self, images: UInt8[np.ndarray, "batch height width 3"]) -> ServedPrediction:
        """Return the same for RGB at the model's own size; nothing is decoded, counted or looked at twice."""
        info = await self.info()
        return await self._predict(f"{info.name}_classifier", {"images": images}, _OUTPUTS)

    async def classify(self, image: bytes | str | Path, *, top: int = 5) -> Answer:
        """Labels and alarm of one image, a path or the bytes of a file.

        Raises:
            ImageDataError: The file cannot be read.
            RequestError: The server refused it.
            ServingError: No answer in time, or the server failed.
        """
        name = "image" if isinstance(image, bytes) else str(image)
        (answer,) = await self.classify_files([(name, _source(image))], top=top)
        return answer

    async def classify_files(
        self,
        sources: Iterable[tuple[str, bytes | Path]],
        *,
        top: int = 5,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> list[Answer]:
        """Labels and alarms of many images, several per request and several requests at once.

        Args:
            sources: Name and content, or name and path, of each image.
            top: Labels per image.
            batch_size: Images per request; never more than the server takes.
            progress: Told how many are answered.

        Raises:
            ImageDataError: Names every file that cannot be read; nothing was sent.
            RequestError: Names every image the server refused; all others were asked, too.
            ServingError: No answer in time, or the server failed.
        """
        named = list(sources)
        found = await self.ask_files(
            named, _read_files(named), top=top, batch_size=batch_size, progress=progress
        )
        _require_all(named, found)
        return [item for item in found if isinstance(item, Answer)]

    async def ask_files(
        self,
        named: Sequence[tuple[str, object]],
        files: Sequence[bytes],
        *,
        top: int = 5,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> list[Answer | RequestError]:
        """As `classify_files`, of contents: what was refused has its error in the place of an answer.

        Args:
            named: Names of the images; what comes second is not looked at.
            files: Their contents, in the same order.
            top: Labels per image.
            batch_size: Images per request; never more than the server takes.
            progress: Told how many are answered.

        Raises:
            ServingError: No answer in time, or the server failed.
        """
        info = await self.info()
        size = max(1, min(batch_size, info.max_batch))
        starts = range(0, len(files), size)
        room = asyncio.Semaphore(self.in_flight)
        answered = 0

        async def ask(start: int) -> list[Answer | RequestError]:
            nonlocal answered
            async with room:
                found = await self._classify_batch(
                    named[start : start + size], files[start : start + size], top
                )
            answered += len(found)
            if progress is not None:
                progress("classify", answered, len(files), {})
            return found

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(ask(start)) for start in starts]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [item for task in tasks for item in task.result()]

    async def _classify_batch(
        self, named: Sequence[tuple[str, object]], files: Sequence[bytes], top: int
    ) -> list[Answer | RequestError]:
        """Return the answers of one request; if it was refused, of one per image to find the culprits."""
        info = await self.info()
        try:
            prediction = await self.predict_files(files)
        except RequestError as error:
            if len(files) == 1:
                return [error]
            parts = [
                await self._classify_batch(named[i : i + 1], files[i : i + 1], top) for i in range(len(files))
            ]
            return [item for part in parts for item in part]
        said = Prediction(
            logits=prediction.logits,
            probabilities=prediction.probabilities,
            alarm=prediction.alarm,
            suspicious=above(prediction.alarm, info.alarm_threshold),
            alarm_target=prediction.alarm_target,
            looked_twice=prediction.looked_twice,
            boxes=prediction.boxes,
        )
        return [*answers_of((name for name, _ in named), said, names=info.class_names, top=top)]

    async def _predict(
        self, model: str, inputs: dict[str, np.ndarray], outputs: Sequence[str]
    ) -> ServedPrediction:
        found = await self._retries.ask(lambda left_s: self._wire.infer(model, inputs, outputs, left_s))
        twice = found.get("looked_twice")
        return ServedPrediction(
            logits=found["logits"],
            probabilities=found["probabilities"],
            alarm=found["alarm"].reshape(-1),
            alarm_target=found["alarm_target"].reshape(-1),
            looked_twice=None if twice is None else twice.reshape(-1).astype(bool),
            boxes=found.get("box"),
        )

    async def _only_model(self) -> str:
        names = await self._retries.ask(lambda left_s: self._wire.models(left_s))
        ours = [name for name in names if f"{name}_classifier" in names]
        if len(ours) != 1:
            raise ServingError(
                expected=f"one model of cbpt-runtime at {self.url}",
                got=", ".join(ours or names) or "none that is ready",
                fix="Name the model." if ours else "Serve a repository of `cbpt-runtime export` there.",
            )
        return ours[0]


def _model_info(name: str, config: Mapping[str, Any], url: str) -> ModelInfo:
    parameters = {
        key: str(entry.get("string_value", entry.get("stringValue", "")))
        for key, entry in config.get("parameters", {}).items()
    }
    if "class_names" not in parameters:
        raise ServingError(
            expected=f"a model of cbpt-runtime called {name!r} at {url}",
            got="one without class names",
            fix="Name the model that takes image files, exported with this version of cbpt-runtime.",
        )
    names = tuple(json.loads(parameters.pop("class_names")))
    max_batch = int(config.get("max_batch_size", config.get("maxBatchSize", 1)))
    return ModelInfo(
        name=name,
        class_names=names,
        max_batch=max_batch,
        provenance=parameters,
        alarm_threshold=_level(parameters.pop("alarm_threshold", None), url),
        second_look=parameters.pop("second_look", "false") == "true",
    )


def _level(said: str | None, url: str) -> float | None:
    try:
        return parse_level(said)
    except ValueError as error:
        raise ServingError(
            expected=f"a level of the alarm in [0, 1] from {url}",
            got=repr(said)[:80],
            fix="Serve a repository of `cbpt-runtime export` there.",
        ) from error


def _source(image: bytes | str | Path) -> bytes | Path:
    return image if isinstance(image, bytes) else Path(image)


def _read_files(named: Sequence[tuple[str, bytes | Path]]) -> list[bytes]:
    files, problems = [], []
    for name, source in named:
        try:
            files.append(
                source if isinstance(source, bytes) else read_regular_file(source, max_bytes=_MAX_FILE_BYTES)
            )
        except OSError as error:
            is_url = name.partition("://")[0] in ("http", "https", "ftp", "file", "data", "s3")
            reason = "a URL: nothing is fetched" if is_url else (error.strerror or str(error)).lower()
            problems.append(f"{name}: {reason}")
    if problems:
        raise ImageDataError(
            expected="image files that can be read", got="; ".join(problems), fix="Correct the paths."
        )
    return files


def _require_all(named: Sequence[tuple[str, object]], found: Sequence[Answer | RequestError]) -> None:
    refused = [
        (name, item) for (name, _), item in zip(named, found, strict=True) if isinstance(item, RequestError)
    ]
    if refused:
        shown = "; ".join(f"{name}: {error.got}" for name, error in refused)
        raise RequestError(
            expected="images the server can read", got=shown, fix="Leave them out or repair them."
        )
