"""What a lower precision costs, measured on labelled images that calibrated nothing.

Clean accuracy may drop by half a point, and no dummy trigger of the bundle may succeed half a point more
often than in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.errors import ConfigError, ExportError
from cbpt_runtime.export.images import GateImages

MAX_CA_DROP = 0.005
MAX_ASR_RISE = 0.005
_ROUNDING = 1e-9  # of the shares themselves

Answer = Callable[[UInt8[np.ndarray, "batch height width 3"]], Float[np.ndarray, "batch classes"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How good the answers of one classifier are.

    Attributes:
        labels: Its answer for every held-out image.
        accuracy: Share of them that is right.
        successes: Per dummy trigger, the share of images of other classes called its target.
    """

    labels: Int[np.ndarray, " heldout"]
    accuracy: float
    successes: tuple[float, ...]


class HeldOut:
    """Labelled images, plain and with every dummy trigger of a bundle.

    Args:
        bundle: Whose dummy triggers.
        images: The plain images.

    Raises:
        ConfigError: They have no labels.
    """

    def __init__(self, bundle: Bundle, images: GateImages) -> None:
        if images.labels is None:
            raise ConfigError(
                expected="labelled images to measure fp16 and int8 on",
                got="a bundle that carries none held out",
                fix="Give a folder of clean images, one folder per class, with --calibration "
                "(`verify`: --images), or make the bundle again.",
            )
        from cbpt_runtime.purification.dummy_triggers import (
            paint_dummy_triggers,  # with torch; the rest here needs none
        )

        self._pixels, self._labels = images.pixels, images.labels
        self._painted = paint_dummy_triggers(bundle, images.pixels)

    def measure(self, answer: Answer) -> Quality:
        """Return the quality of a classifier, given as a function from pixels to logits."""
        labels = answer(self._pixels).argmax(axis=1)
        successes = []
        for painted in self._painted:
            others = painted.images[self._labels != painted.target]
            hits = answer(others).argmax(axis=1) == painted.target
            successes.append(float(hits.mean()) if len(hits) else 0.0)
        accuracy = float((labels == self._labels).mean())
        return Quality(labels=labels, accuracy=accuracy, successes=tuple(successes))


def compare(before: Quality, after: Quality) -> dict[str, Any]:
    """Return what changed from float32 to a lower precision, as it stands in ``parity.json``."""
    rises = [now - then for then, now in zip(before.successes, after.successes, strict=True)]
    return {
        "heldout_images": len(before.labels),
        "accuracy_fp32": before.accuracy,
        "accuracy": after.accuracy,
        "dummy_triggers": len(before.successes),
        "dummy_trigger_success_fp32": max(before.successes, default=0.0),
        "dummy_trigger_success": max(after.successes, default=0.0),
        "largest_dummy_trigger_rise": max(rises, default=0.0),
        "labels_equal": float((before.labels == after.labels).mean()),
    }


def is_good_enough(report: dict[str, Any]) -> bool:
    """Whether a report of `compare` stays within both limits."""
    drop = report["accuracy_fp32"] - report["accuracy"]
    rise = report["largest_dummy_trigger_rise"]
    return bool(drop <= MAX_CA_DROP + _ROUNDING and rise <= MAX_ASR_RISE + _ROUNDING)


def refusal(report: dict[str, Any], precision: str) -> ExportError:
    """Return the error that names both limits and everything measured."""
    return ExportError(
        expected=f"{precision} within {MAX_CA_DROP:.1%} of float32's clean accuracy and "
        f"{MAX_ASR_RISE:.1%} of its dummy-trigger success",
        got=", ".join(f"{key} {value:.4f}" for key, value in report.items() if isinstance(value, float)),
        fix="Export with --precision fp32, or give other --calibration images; nothing was written.",
    )
