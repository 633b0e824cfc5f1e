"""Labels for image files: what `cbpt-runtime classify` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.classifier import ZeroShotClassifier


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """A class name and its probability in [0, 1]."""

    name: str
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the classifier says about one image.

    Attributes:
        image: The name it was given under.
        labels: Most likely first.
        alarm: In [0, 1]: how strongly only the original head calls a suspected target.
    """

    image: str
    labels: tuple[Label, ...]
    alarm: float

    def to_dict(self) -> dict[str, Any]:
        """The answer as a JSON-able dict."""
        return asdict(self)


def classify_images(
    bundle: Bundle | str | Path,
    sources: Sequence[tuple[str, bytes | Path]],
    *,
    top: int = 5,
    device: str = "auto",
    batch_size: int = 64,
) -> list[Answer]:
    """Classify images with the purified head of a bundle.

    Args:
        bundle: A bundle or the path of one.
        sources: Name and content, or name and path, of each image.
        top: Labels per image.
        device: 'auto', 'cpu' or 'cuda'.
        batch_size: Images encoded at once.

    Raises:
        BundleError: The bundle is damaged.
        ImageDataError: Names every image of a batch that cannot be read.
    """
    classifier = ZeroShotClassifier.from_bundle(bundle, device)
    names = classifier.bundle.class_names
    answers = []
    for start in range(0, len(sources), batch_size):
        batch = sources[start : start + batch_size]
        prediction = classifier.predict(classifier.read([content for _, content in batch]))
        for (image, _), row, alarm in zip(batch, prediction.probabilities, prediction.alarm, strict=True):
            best = (-row).argsort(kind="stable")[:top]
            labels = tuple(Label(name=names[i], probability=float(row[i])) for i in best)
            answers.append(Answer(image=image, labels=labels, alarm=float(alarm)))
    return answers
