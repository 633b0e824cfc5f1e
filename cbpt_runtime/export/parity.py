"""The gate every export must pass: PyTorch and onnxruntime agree on images, at several batch sizes.

One tolerance per quantity: features, class cosines, probabilities, alarm, its target and arg-max are compared
separately, because a logit scale near 100 turns a cosine error of 1e-5 into 1e-3 in logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from jaxtyping import Int, UInt8

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.errors import ExportError
from cbpt_runtime.export.images import GateImages
from cbpt_runtime.export.onnx import FEATURES, with_features
from cbpt_runtime.export.session import Provider, open_session, run_session
from cbpt_runtime.runtime import zero_shot
from cbpt_runtime.runtime.prediction import Prediction

COSINE_TOLERANCE = 1e-5
PROBABILITY_TOLERANCE = 1e-4
FEW = 4  # images at batch size 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One quantity at one batch size.

    Attributes:
        quantity: What was compared.
        batch_size: Images per run.
        images: Images compared.
        largest_difference: Between PyTorch and onnxruntime; a count for 'arg-max'.
        tolerance: Largest difference that passes.
    """

    quantity: str
    batch_size: int
    images: int
    largest_difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference is a number within the tolerance."""
        return self.largest_difference <= self.tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """What the gate saw.

    Attributes:
        provider: Execution provider really used.
        onnxruntime: Its version.
        images: Where the images came from: 'folder' or 'drawn'.
        comparisons: Everything compared.
    """

    provider: str
    onnxruntime: str
    images: str
    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        """Whether every comparison passed."""
        return all(comparison.passed for comparison in self.comparisons)

    def with_second_look(self, got: Prediction, expected: Prediction, *, max_batch: int) -> Parity:
        """Return the report with one more comparison, for a server that looks twice.

        Args:
            got: What comes of a second look in onnxruntime, at images other than those of the gate.
            expected: The same in PyTorch; where other places are covered, they are infinitely far apart.
            max_batch: Largest batch that will be served.
        """
        places = [(said.looked_twice, said.boxes) for said in (got, expected)]
        is_same = all(np.array_equal(a, b) for a, b in zip(*places, strict=True) if a is not None)
        compared = Comparison(
            quantity="second look",
            batch_size=max_batch,
            images=len(expected.probabilities),
            largest_difference=_largest(got.probabilities, expected.probabilities) if is_same else math.inf,
            tolerance=PROBABILITY_TOLERANCE,
        )
        return replace(self, comparisons=(*self.comparisons, compared))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON-able dict; a difference that is not a number becomes None."""
        values = asdict(self) | {"passed": self.passed}
        for row in values["comparisons"]:
            if not math.isfinite(row["largest_difference"]):
                row["largest_difference"] = None
        return values

    def require(self) -> None:
        """Do nothing when every comparison passed.

        Raises:
            ExportError: Names every quantity that failed, its largest difference and the tolerance.
        """
        failed = [comparison for comparison in self.comparisons if not comparison.passed]
        if failed:
            raise ExportError(
                expected="a graph that answers as PyTorch does",
                got="; ".join(_failure(comparison) for comparison in failed),
                fix=f"Nothing was written. Ran on {self.provider} with onnxruntime {self.onnxruntime}; "
                "install the package versions of constraints.txt and export again.",
            )


def measure_parity(
    model: onnx.ModelProto,
    classifier: BundleClassifier,
    images: GateImages,
    *,
    max_batch: int,
    provider: Provider = "cpu",
) -> Parity:
    """Compare a float32 graph with PyTorch at batch 1, 3 and `max_batch`.

    Args:
        model: The graph.
        classifier: The same bundle in PyTorch.
        images: What both look at.
        max_batch: Largest batch that will be served.
        provider: Where the graph will be served.

    Raises:
        ConfigError: The provider is not there.
        ExportError: onnxruntime cannot open or run the graph.
    """
    session = open_session(model, provider)
    inner = open_session(with_features(model), provider)
    pixels = images.repeated(max(max_batch, min(3 * FEW, len(images.pixels))))
    features = classifier.features(pixels)
    expected = classifier.predict_features(features)
    comparisons: list[Comparison] = []
    for batch_size, count in _batches(max_batch, len(pixels)):
        got = _run(session, pixels[:count], batch_size)
        embedded = _run(inner, pixels[:count], batch_size, [FEATURES])[FEATURES]
        largest = {"features": (_cosine_distance(embedded, features[:count]), COSINE_TOLERANCE)}
        largest |= _answer_differences(got, expected, classifier.bundle)
        comparisons += [
            Comparison(
                quantity=quantity,
                batch_size=batch_size,
                images=count,
                largest_difference=difference,
                tolerance=tolerance,
            )
            for quantity, (difference, tolerance) in largest.items()
        ]
    return Parity(
        provider=session.get_providers()[0],
        onnxruntime=onnxruntime.__version__,
        images=images.source,
        comparisons=tuple(comparisons),
    )


def _batches(max_batch: int, available: int) -> list[tuple[int, int]]:
    """Batch sizes and how many images each sees; the images of batch 3 end in a smaller batch."""
    sizes = sorted({1, min(3, max_batch), max_batch})
    seen = {1: FEW, 3: 3 * FEW - 1}
    return [(size, min(available, seen.get(size, available))) for size in sizes]


def _run(
    session: onnxruntime.InferenceSession,
    pixels: UInt8[np.ndarray, "batch height width 3"],
    batch_size: int,
    outputs: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    try:
        return run_session(session, pixels, batch_size=batch_size, outputs=outputs)
    except Exception as error:  # onnxruntime raises classes of its own that share no public base
        raise ExportError(
            expected=f"a graph that runs at batch size {batch_size}",
            got=f"{type(error).__name__}: {' '.join(str(error).split()):.300}",
            fix="Install the package versions of constraints.txt and export again.",
        ) from error


def _answer_differences(
    got: dict[str, np.ndarray], expected: Prediction, bundle: Bundle
) -> dict[str, tuple[float, float]]:
    if expected.alarm is None:
        raise RuntimeError("a bundle has an alarm")
    count = len(got["logits"])
    cosines = _largest(got["logits"], expected.logits[:count]) / bundle.logit_scale
    disagree = int(np.count_nonzero(got["logits"].argmax(axis=1) != expected.labels[:count]))
    return {
        "class cosines": (cosines, COSINE_TOLERANCE),
        "probabilities": (
            _largest(got["probabilities"], expected.probabilities[:count]),
            PROBABILITY_TOLERANCE,
        ),
        "alarm": (_largest(got["alarm"], expected.alarm[:count]), PROBABILITY_TOLERANCE),
        "alarm target": (_quieter(got["alarm_target"], expected, bundle), PROBABILITY_TOLERANCE),
        "arg-max": (disagree, 0),
    }


def _quieter(named: Int[np.ndarray, " batch"], expected: Prediction, bundle: Bundle) -> float:
    """By how much the suspected target that is named is at most quieter than the loudest one."""
    suspects, count = list(bundle.suspect_indices), len(named)
    if expected.reference_logits is None:
        raise RuntimeError("a bundle has both heads")
    before, after = expected.reference_logits[:count], expected.logits[:count]
    if not suspects:
        return 0.0 if (named == -1).all() else math.inf
    if not np.isin(named, suspects).all():
        return math.inf
    each = np.full((count, len(bundle.class_names)), -math.inf)
    for suspect in suspects:
        each[:, suspect] = zero_shot.alarm(before, after, [suspect], sigmoid=bundle.logit_bias is not None)
    return float((each.max(axis=1) - each[np.arange(count), named]).max())


def _largest(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference; infinite when the shapes differ, NaN when a value is."""
    if got.shape != expected.shape:
        return math.inf
    return float(np.abs(got.astype(np.float64) - expected).max())


def _cosine_distance(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest ``1 - cosine`` over the rows."""
    if got.shape != expected.shape:
        return math.inf
    a, b = got.astype(np.float64), expected.astype(np.float64)
    cosines = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float(np.abs(1 - cosines).max())


def _failure(comparison: Comparison) -> str:
    where = f"{comparison.quantity} at batch {comparison.batch_size}"
    if comparison.quantity == "arg-max":
        return f"{where}: {comparison.largest_difference:.0f} of {comparison.images} images differ"
    return (
        f"{where}: largest difference {comparison.largest_difference:.3g}, tolerance {comparison.tolerance:g}"
    )
