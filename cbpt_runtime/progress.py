"""Types shared by the rooms of the package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Told how far the work is; must return quickly and must not raise."""

    def __call__(self, stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        """Report one step.

        Args:
            stage: What is being done, in a word or two.
            step: Steps done, 1 to ``total``.
            total: Steps of this stage.
            values: What is worth seeing right now, for example losses.
        """


def silent(stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
    """Ignore all progress: for those who want to see none."""
