"""What both guards share: how long a request may take, how much of them is held, and when to try again."""

from __future__ import annotations

from http import HTTPStatus

from cbpt_runtime.serving.guard.admission import Refusal

REQUEST_TIMEOUT_S = 120.0  # for all of a body or message
ANSWER_TIMEOUT_S = 600.0
FULL = Refusal(status=HTTPStatus.SERVICE_UNAVAILABLE, text="too many large requests. Try again.")
NOT_THERE = Refusal(
    status=HTTPStatus.SERVICE_UNAVAILABLE, text="Triton is not there: it starts, stops or broke. Try again."
)


class Room:
    """Counts the bytes of requests that have no answer yet.

    Args:
        most_bytes: What fits.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.held_bytes = 0

    def take(self, number: int) -> bool:
        """Hold so many bytes more; False, and nothing more is held, when they do not fit."""
        if self.held_bytes + number > self.most_bytes:
            return False
        self.held_bytes += number
        return True

    def give_back(self, number: int) -> None:
        """Hold so many bytes less."""
        self.held_bytes -= number
