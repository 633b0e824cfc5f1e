"""Labels for image files: what `cbpt-runtime classify` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cbpt_runtime.answers import Answer, make_answer
from cbpt_runtime.bundle import Bundle
from cbpt_runtime.classifier import ZeroShotClassifier


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
            answers.append(make_answer(image, row, float(alarm), names=names, top=top))
    return answers
