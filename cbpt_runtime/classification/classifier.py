"""What classifies images, wherever it runs: `load("bundle/")("photo.jpg")`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, overload

import numpy as np
from PIL import Image

from cbpt_runtime.errors import ConfigError, ImageDataError, RequestError
from cbpt_runtime.progress import Progress
from cbpt_runtime.runtime.prediction import Answer, Prediction, answers_of
from cbpt_runtime.runtime.preprocess import Pixels, Preprocess, decode_image, to_pixels
from cbpt_runtime.runtime.second_look import look_again

if TYPE_CHECKING:
    from jaxtyping import UInt8


AnyImage = bytes | str | Path | Image.Image | np.ndarray
"""A path, the bytes of a file, a picture of Pillow's, or RGB of any size as uint8 [height, width, 3]."""
Kind = Literal["bundle", "checkpoint", "onnx", "repository", "url"]


class Classifier(ABC):
    """Names the classes of images, here or in a server.

    Attributes:
        kind: 'bundle', 'checkpoint', 'onnx', 'repository' or 'url'.
        source: Path or URL of it, or what names a checkpoint.
        digest: SHA-256 of its manifest, of a checkpoint's weights or of a graph; None of a server, which only
            says what it serves.
        class_names: In the order of the class indices.
        class_folders: Names of the classes' image folders, where they may be others than the classes'.
        verdict: 'backdoored', 'clean' or 'unknown'; None of a checkpoint.
        encoder: 'untouched', or what a method made of the image tower; None where nothing says.
        place: Where it runs.
        notes: Remarks for the user.
        sigmoid: Whether each class has a probability of its own, as SigLIP's have.
        looks_twice: Whether it was exported to look again at suspicious images; a server that was does so.
    """

    kind: Kind
    source: str
    digest: str | None
    class_names: tuple[str, ...]
    class_folders: tuple[str, ...] = ()
    verdict: str | None = None
    encoder: str | None = "untouched"
    place: str
    notes: tuple[str, ...] = ()
    sigmoid: bool = False
    looks_twice: bool = False

    @property
    @abstractmethod
    def preprocess(self) -> Preprocess:
        """How an image becomes the model's pixels."""

    @property
    def suspects(self) -> tuple[str, ...]:
        """Names of the suspected targets."""
        return ()

    @property
    def suspect_indices(self) -> tuple[int, ...]:
        """Class indices of the suspected targets, where the classifier knows them."""
        return ()

    @property
    def alarm_threshold(self) -> float | None:
        """Above which alarm an image is suspicious; None where no level was chosen at purification."""
        return None

    @property
    def detector(self) -> str | None:
        """What the alarm of a prediction is: 'alarm', the name of a detector, or None: it says nothing."""
        return "alarm" if self.suspects else None

    @abstractmethod
    def predict(self, images: Pixels) -> Prediction:
        """Classify images.

        Args:
            images: RGB at the model's own size, as `read` gives them.

        Raises:
            ImageDataError: The array is not uint8 RGB at the model's size.
            ServingError: A server does not answer.
        """

    def close(self) -> None:  # noqa: B027 (most have nothing to close)
        """Close the connections to a server; nothing else has any."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        verdict = "" if self.verdict is None else f", {self.verdict}"
        name, count = type(self).__name__, len(self.class_names)
        return f"<{name} {self.source}: {count} classes{verdict}, on {self.place}>"

    @overload
    def __call__(self, images: AnyImage, *, top: int = ...) -> Answer: ...

    @overload
    def __call__(self, images: list[AnyImage] | tuple[AnyImage, ...], *, top: int = ...) -> list[Answer]: ...

    def __call__(
        self, images: AnyImage | list[AnyImage] | tuple[AnyImage, ...], *, top: int = 5
    ) -> Answer | list[Answer]:
        """Labels and alarm of an image, or of each of several.

        Args:
            images: One image, or a list of them.
            top: Labels per image.

        Raises:
            ImageDataError: Names every image that cannot be read.
            ServingError: A server does not answer.
        """
        if isinstance(images, AnyImage):
            return self([images], top=top)[0]
        named = [(image_name(image, number), image) for number, image in enumerate(images, start=1)]
        return self.classify(named, top=top)

    def classify(
        self,
        sources: Sequence[tuple[str, AnyImage]],
        *,
        top: int = 5,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> list[Answer]:
        """Labels and alarms of many images.

        Args:
            sources: Name and image, in this order.
            top: Labels per image.
            batch_size: Images decoded at once; a server takes as many as it can.
            progress: Told how many are answered.

        Raises:
            ImageDataError: Names every image that cannot be read.
            ServingError: A server does not answer.
        """
        answers: list[Answer] = []
        for start in range(0, len(sources), batch_size):
            batch = sources[start : start + batch_size]
            found = self.predict(self._read_batch(sources, batch))
            names = [name for name, _ in batch]
            answers += answers_of(names, found, names=self.class_names, top=top)
            if progress is not None:
                progress("classify", len(answers), len(sources), {})
        return answers

    def classify_each(
        self, sources: Sequence[tuple[str, AnyImage]], *, top: int = 5
    ) -> list[Answer | ImageDataError | RequestError]:
        """As `classify`, for images of which some may be damaged: each gets its answer, or its own error.

        Args:
            sources: Name and image; all of them are decoded at once.
            top: Labels per image.

        Raises:
            ServingError: A server does not answer.
        """
        found = [self._decoded(image) for _, image in sources]
        pixels = [image for image in found if not isinstance(image, ImageDataError)]
        names = [
            name for (name, _), image in zip(sources, found, strict=True) if isinstance(image, np.ndarray)
        ]
        answers: Iterator[Answer] = iter(())
        if pixels:
            said = self.predict(np.stack(pixels))
            answers = iter(answers_of(names, said, names=self.class_names, top=top))
        return [image if isinstance(image, ImageDataError) else next(answers) for image in found]

    def read(self, sources: Sequence[AnyImage]) -> Pixels:
        """Decode image files (or the bytes of some) and bring them to the model's size.

        Raises:
            ImageDataError: Names every image that cannot be read.
        """
        pixels, problems = [], []
        for number, source in enumerate(sources, start=1):
            found = self._decoded(source)
            if isinstance(found, ImageDataError):
                problems.append((image_name(source, number), found))
            else:
                pixels.append(found)
        if problems:
            raise ImageDataError(
                expected="images that can be read",
                got="; ".join(f"{name}: {error.got}" for name, error in problems),
                fix=problems[0][1].fix,
            )
        return np.stack(pixels) if pixels else np.zeros((0, *self.preprocess.image_size, 3), np.uint8)

    def _decoded(self, source: AnyImage) -> UInt8[np.ndarray, "height width 3"] | ImageDataError:
        """Return an image at the model's size, or why it cannot be read."""
        try:
            return to_pixels(_picture(source), self.preprocess)
        except ImageDataError as error:
            return error

    def check_pixels(self, images: Pixels) -> None:
        """Raise ImageDataError unless an array is uint8 RGB at the model's size."""
        height, width = self.preprocess.image_size
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (height, width, 3):
            raise ImageDataError(
                expected=f"uint8 images [batch, {height}, {width}, 3]",
                got=f"{images.dtype} {list(images.shape)}",
                fix="Read them with the classifier's read(), or call the classifier with files.",
            )

    def _read_batch(
        self, sources: Sequence[tuple[str, AnyImage]], batch: Sequence[tuple[str, AnyImage]]
    ) -> Pixels:
        """Return the images of a batch; where one of them cannot be read, all that cannot are named."""
        try:
            return self.read([image for _, image in batch])
        except ImageDataError:
            self.read([image for _, image in sources])
            raise


def image_name(source: AnyImage, number: int) -> str:
    """Name an image: a path says what it is; of others only the place is known."""
    return str(source) if isinstance(source, str | Path) else f"image {number}"


def _picture(source: AnyImage) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, np.ndarray):
        return decode_image(Path(source) if isinstance(source, str) else source)
    if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
        raise ImageDataError(
            expected="a uint8 array [height, width, 3], RGB",
            got=f"{source.dtype} {list(source.shape)}",
            fix="Convert it; values go from 0 to 255, channels last.",
        )
    return Image.fromarray(source)


class SecondLook(Classifier):
    """A classifier that looks again at suspicious images, in process; others cost nothing more.

    A server does it by itself.

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
