"""`Client`: `AsyncClient` for code without await.

with Client("grpc://127.0.0.1:8001") as client:
    print(client.classify("photo.jpg"))
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from jaxtyping import UInt8

from cbpt_runtime.errors import RequestError
from cbpt_runtime.progress import Progress
from cbpt_runtime.runtime.prediction import Answer
from cbpt_runtime.serving.client.asynchronous import AsyncClient, ModelInfo, ServedPrediction

T = TypeVar("T")


class Client:
    """`AsyncClient` for code without await; may be used from several threads at once.

    The arguments are those of `AsyncClient`. An event loop in a thread of its own does the work.
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
        async def opened() -> AsyncClient:
            return AsyncClient(
                url, model=model, timeout_s=timeout_s, retries=retries, in_flight=in_flight, headers=headers
            )

        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cbpt-client", daemon=True)
        self._thread.start()
        try:
            self._client: AsyncClient = self._run(opened())
        except BaseException:
            self._stop()
            raise

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._client.url}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; safe to call twice."""
        if self._loop.is_closed():
            return
        try:
            self._run(self._client.close())
        finally:
            self._stop()

    def info(self) -> ModelInfo:
        """See `AsyncClient.info`."""
        return self._run(self._client.info())

    def predict_files(self, files: Sequence[bytes]) -> ServedPrediction:
        """See `AsyncClient.predict_files`."""
        return self._run(self._client.predict_files(files))

    def predict_pixels(self, images: UInt8[np.ndarray, "batch height width 3"]) -> ServedPrediction:
        """See `AsyncClient.predict_pixels`."""
        return self._run(self._client.predict_pixels(images))

    def classify(self, image: bytes | str | Path, *, top: int = 5) -> Answer:
        """See `AsyncClient.classify`."""
        return self._run(self._client.classify(image, top=top))

    def classify_files(
        self,
        sources: Iterable[tuple[str, bytes | Path]],
        *,
        top: int = 5,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> list[Answer]:
        """See `AsyncClient.classify_files`."""
        return self._run(
            self._client.classify_files(sources, top=top, batch_size=batch_size, progress=progress)
        )

    def ask_files(
        self, named: Sequence[tuple[str, object]], files: Sequence[bytes], *, top: int = 5
    ) -> list[Answer | RequestError]:
        """See `AsyncClient.ask_files`."""
        return self._run(self._client.ask_files(named, files, top=top))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
