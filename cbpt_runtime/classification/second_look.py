"""A classifier that looks again at suspicious images, here in process; a server does it by itself."""

from __future__ import annotations

from cbpt_runtime.classification.classifier import Classifier
from cbpt_runtime.errors import ConfigError
from cbpt_runtime.runtime.prediction import Prediction
from cbpt_runtime.runtime.preprocess import Pixels, Preprocess
from cbpt_runtime.runtime.second_look import look_again


class SecondLook(Classifier):
    """A classifier that looks again at suspicious images; others cost nothing more.

    Args:
        first: Whose answers those of the first look are: a bundle, a graph or a repository, whose suspected
            targets and level of the alarm are known.

    Raises:
        ConfigError: It calls nothing suspicious: a checkpoint, a bundle without suspects, or an older one
            without a level.
    """

    def __init__(self, first: Classifier) -> None:
        if first.alarm_threshold is None or not first.suspect_indices:
            raise ConfigError(
                expected="a bundle or graph with suspected targets and a level of the alarm, to look twice",
                got=f"{first.source} ({first.kind}), which calls no image suspicious",
                fix="Purify again with this version, or leave the second look away.",
            )
        self.first, self._threshold = first, first.alarm_threshold
        self.kind, self.source, self.digest, self.place = first.kind, first.source, first.digest, first.place
        self.class_names, self.class_folders = first.class_names, first.class_folders
        self.verdict, self.encoder, self.looks_twice = first.verdict, first.encoder, True
        self.notes = (*first.notes, f"{first.source}: suspicious images are looked at twice")

    @property
    def preprocess(self) -> Preprocess:
        """How an image becomes the model's pixels."""
        return self.first.preprocess

    @property
    def suspects(self) -> tuple[str, ...]:
        """Names of the suspected targets."""
        return self.first.suspects

    @property
    def suspect_indices(self) -> tuple[int, ...]:
        """Class indices of the suspected targets."""
        return self.first.suspect_indices

    @property
    def alarm_threshold(self) -> float | None:
        """Above which alarm an image is suspicious."""
        return self._threshold

    def predict(self, images: Pixels) -> Prediction:
        """Classify images with the purified head, suspicious ones without what may be the trigger."""
        first = self.first
        said = first.predict(images)
        return look_again(
            images,
            said,
            first.predict,
            first.suspect_indices,
            threshold=self._threshold,
            sigmoid=first.sigmoid,
        )

    def close(self) -> None:
        """Close what the first look needs."""
        self.first.close()
