"""What a client sends again, how often, and what it says when it gives up."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from cbpt_runtime.errors import ConfigError, RequestError, ServingError
from cbpt_runtime.serving.client.wire import WireError

_RETRIED = ("busy", "unreachable")  # nothing was answered; asking again is safe and may help
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """How long and how often one server is asked.

    Attributes:
        url: Of the server, for people.
        timeout_s: For one request with all its retries.
        number: How often a request is sent again when nothing was answered; nothing else is ever sent twice.

    Raises:
        ConfigError: A number is out of range.
    """

    url: str
    timeout_s: float
    number: int

    def __post_init__(self) -> None:
        if not (self.timeout_s > 0 and self.number >= 0):
            raise ConfigError(
                expected="a time-out above 0 and at least 0 retries",
                got=f"{self.timeout_s}, {self.number}",
                fix="Correct the argument.",
            )

    async def ask(self, send: Callable[[float], Coroutine[Any, Any, T]]) -> T:
        """Send a request, and again where that is safe, until the time is up."""
        deadline = time.monotonic() + self.timeout_s
        pause_s = _FIRST_PAUSE_S
        for attempt in range(self.number + 1):
            try:
                return await send(max(0.001, deadline - time.monotonic()))
            except WireError as error:
                wait_s = pause_s * random.uniform(0.5, 1.5)  # not all clients at the same moment
                is_last = attempt == self.number or time.monotonic() + wait_s >= deadline
                if error.kind not in _RETRIED or is_last:
                    raise self._explained(error, attempt + 1) from error
            await asyncio.sleep(wait_s)
            pause_s = min(4 * pause_s, _LONGEST_PAUSE_S)
        raise RuntimeError("unreachable: the last attempt returns or raises")

    def _explained(self, error: WireError, attempts: int) -> RequestError | ServingError:
        if error.kind == "refused":
            return RequestError(
                expected=f"a request {self.url} accepts", got=str(error), fix="Correct what was sent."
            )
        fixes = {
            "busy": "The server has no room or is not there; try later or with fewer requests at once.",
            "unreachable": "Check that `cbpt-runtime serve` runs and that the URL is right.",
            "timeout": "Allow more time, or ask with fewer requests at once.",
            "broken": "Look at the server's log.",
        }
        times = f" (asked {attempts} times)" if attempts > 1 else ""
        return ServingError(
            expected=f"an answer from {self.url}", got=f"{error}{times}", fix=fixes[error.kind]
        )
