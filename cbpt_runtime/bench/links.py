"""How a generator reaches what it measures. Imports neither torch nor onnxruntime."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int

from cbpt_runtime.errors import CbptError
from cbpt_runtime.serving.client import AsyncClient
from cbpt_runtime.serving.wire import WireError

OUTCOMES = ("answered", "refused", "busy", "unreachable", "timeout", "broken", "wrong")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What was said about a few images, as much of it as checking needs.

    Attributes:
        labels: Most likely class.
        probabilities: Its probability.
        alarms: In [0, 1].
    """

    labels: Int[np.ndarray, " batch"]
    probabilities: Float[np.ndarray, " batch"]
    alarms: Float[np.ndarray, " batch"]

    def rows(self, chosen: Sequence[int] | slice) -> Answers:
        """Some of them."""
        return Answers(
            labels=self.labels[chosen],
            probabilities=self.probabilities[chosen],
            alarms=self.alarms[chosen],
        )

    def difference(self, expected: Answers) -> float:
        """The largest difference in probability or alarm; 1 where another label is more than a near tie."""
        other = (self.labels != expected.labels) & (
            np.maximum(self.probabilities, expected.probabilities) > 0.5
        )
        if other.any():
            return 1.0
        return float(
            max(
                np.abs(self.probabilities - expected.probabilities).max(initial=0.0),
                np.abs(self.alarms - expected.alarms).max(initial=0.0),
            )
        )


def answers_of(
    probabilities: Float[np.ndarray, "batch classes"], alarms: Float[np.ndarray, " batch"]
) -> Answers:
    """The most likely class of each image, its probability, and the alarm."""
    labels = probabilities.argmax(axis=1)
    return Answers(
        labels=labels,
        probabilities=np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0].astype(np.float64),
        alarms=np.asarray(alarms, np.float64),
    )


class LinkError(Exception):
    """A request without an answer.

    Attributes:
        outcome: One of `OUTCOMES`.
    """

    def __init__(self, outcome: str) -> None:
        self.outcome = outcome
        super().__init__(outcome)


class Link(Protocol):
    """Something that answers for images by their number."""

    async def ask(self, images: Sequence[int]) -> Answers:
        """Send one request; raises LinkError."""

    async def close(self) -> None:
        """Close it."""


class WireLink:
    """A server, over HTTP or gRPC. Requests are sent once: a retry would hide what is measured."""

    def __init__(self, url: str, model: str | None, files: Sequence[bytes], timeout_s: float) -> None:
        self._files = files
        self._client = AsyncClient(url, model=model, timeout_s=timeout_s, retries=0)

    async def ask(self, images: Sequence[int]) -> Answers:
        """Send the files of a few images in one request."""
        try:
            found = await self._client.predict_files([self._files[image] for image in images])
        except CbptError as error:
            cause = error.__cause__
            raise LinkError(cause.kind if isinstance(cause, WireError) else "broken") from error
        return answers_of(found.probabilities, found.alarm)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


class PipeLink:
    """An engine in another process; only image numbers and answers travel.

    Args:
        connection: To the engine.
        timeout_s: For one request.
    """

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._waiting: dict[int, asyncio.Future[Answers]] = {}
        self._last = 0
        asyncio.get_running_loop().add_reader(connection.fileno(), self._read)

    async def ask(self, images: Sequence[int]) -> Answers:
        """Send one request."""
        self._last += 1
        number = self._last
        future: asyncio.Future[Answers] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._connection.send((number, tuple(images)))
        try:
            return await asyncio.wait_for(future, self._timeout_s)
        except TimeoutError:
            raise LinkError("timeout") from None
        finally:
            self._waiting.pop(number, None)

    async def close(self) -> None:
        """Stop listening."""
        asyncio.get_running_loop().remove_reader(self._connection.fileno())

    def _read(self) -> None:
        while self._connection.poll():
            number, answers = self._connection.recv()
            future = self._waiting.get(number)
            if future is not None and not future.done():
                future.set_result(answers)
