"""Labels for image files: what `cbpt-runtime classify` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from cbpt_runtime.answers import Answer, make_answers
from cbpt_runtime.bundle import Bundle
from cbpt_runtime.classifier import ZeroShotClassifier
from cbpt_runtime.errors import ImageDataError

Source = tuple[str, bytes | Path]
"""Name and content, or name and path, of an image."""


def classify_images(
    bundle: Bundle | str | Path,
    sources: Sequence[Source],
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
        ImageDataError: Names every image that cannot be read.
    """
    classifier = ZeroShotClassifier.from_bundle(bundle, device)
    names = classifier.bundle.class_names
    answers: list[Answer] = []
    for start in range(0, len(sources), batch_size):
        batch = sources[start : start + batch_size]
        prediction = classifier.predict(_read(classifier, sources, batch))
        images = (image for image, _ in batch)
        answers += make_answers(images, prediction.probabilities, prediction.alarm, names=names, top=top)
    return answers


def _read(
    classifier: ZeroShotClassifier, sources: Sequence[Source], batch: Sequence[Source]
) -> UInt8[np.ndarray, "batch height width 3"]:
    """The images of a batch; where one of them cannot be read, all that cannot are named."""
    try:
        return classifier.read([content for _, content in batch])
    except ImageDataError:
        classifier.read([content for _, content in sources])
        raise
