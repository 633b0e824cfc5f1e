"""An event loop in a thread of its own, for servers that stand beside the program."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

UntilStopped = Callable[[], Coroutine[Any, Any, None]]


class LoopThread:
    """Runs a coroutine from `start` to `stop`.

    Args:
        serve: Gets ready, awaits what it is given, and then tidies up.
        name: Of the thread.
    """

    def __init__(self, serve: Callable[[UntilStopped], Coroutine[Any, Any, None]], name: str) -> None:
        self._serve = serve
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._stop: Callable[[], object] | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Return when the coroutine is ready, or raise what it has raised instead."""
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            self._thread.join()
            raise self._error

    def stop(self) -> None:
        """Let the coroutine tidy up, and wait for it."""
        if self._stop is not None:
            self._stop()
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve(self._until_stopped))
        except BaseException as error:  # handed to whoever waits for the start
            self._error = error
        finally:
            self._ready.set()

    async def _until_stopped(self) -> None:
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()

        def stop() -> None:
            loop.call_soon_threadsafe(stopped.set)

        self._stop = stop
        self._ready.set()
        await stopped.wait()
