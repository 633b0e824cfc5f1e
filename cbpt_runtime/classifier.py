"""The purified zero-shot classifier of a bundle, running in PyTorch: `load("bundle/")("photo.jpg")`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from cbpt_runtime import heads
from cbpt_runtime.answers import Answer, make_answers
from cbpt_runtime.bundle import ENCODER, Bundle, read_bundle
from cbpt_runtime.errors import BundleError, ImageDataError
from cbpt_runtime.models.clip import ImageEncoder, load_image_encoder, resolve_device
from cbpt_runtime.models.preprocess import decode_image, to_pixels

AnyImage = bytes | str | Path | Image.Image | np.ndarray
"""A path, the bytes of a file, a picture of Pillow's, or RGB of any size as uint8 [height, width, 3]."""


def load(bundle: Bundle | str | Path, *, device: str = "auto") -> ZeroShotClassifier:
    """Load the classifier of a bundle, on a GPU where there is one: call the result with images."""
    return ZeroShotClassifier.from_bundle(bundle, device)


def encoder_tensors(bundle: Bundle) -> dict[str, torch.Tensor]:
    """Weights of a bundle's image encoder.

    Raises:
        BundleError: The file is not the manifest's, or no safetensors.
    """
    content = bundle.read_file(ENCODER)
    try:
        return load_tensors(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise BundleError(
            expected=f"safetensors in {bundle.path / ENCODER}",
            got=str(error),
            fix="Make the bundle again with `cbpt-runtime purify`, or fetch an intact copy.",
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What both heads say about a batch of images.

    Attributes:
        logits: Of the purified head.
        probabilities: Of the purified head, in [0, 1].
        alarm: In [0, 1]: how strongly only the original head calls a suspected target.
        reference_logits: Of the head before purification.
    """

    logits: Float[np.ndarray, "batch classes"]
    probabilities: Float[np.ndarray, "batch classes"]
    alarm: Float[np.ndarray, " batch"]
    reference_logits: Float[np.ndarray, "batch classes"]

    @property
    def labels(self) -> Int[np.ndarray, " batch"]:
        """Index of the most likely class of each image."""
        best: np.ndarray = self.logits.argmax(axis=1)
        return best


class ZeroShotClassifier:
    """Image encoder and both heads of a bundle; the encoder runs once per image.

    Attributes:
        bundle: Where they come from.
        device: Where the encoder runs.
    """

    def __init__(self, bundle: Bundle, encoder: ImageEncoder, device: torch.device) -> None:
        self.bundle = bundle
        self.device = device
        self._encoder = encoder

    @classmethod
    def from_bundle(cls, bundle: Bundle | str | Path, device: str = "cpu") -> ZeroShotClassifier:
        """Load the classifier of a bundle.

        Args:
            bundle: A bundle or the path of one.
            device: 'auto', 'cpu' or 'cuda'.

        Raises:
            BundleError: The bundle is damaged.
            ConfigError: The device is not there.
        """
        if not isinstance(bundle, Bundle):
            bundle = read_bundle(bundle, verify=False)  # the files used are checked as they are read
        place = resolve_device(device)
        state = encoder_tensors(bundle)
        encoder = load_image_encoder(bundle.model_config, bundle.preprocess, state, str(place))
        return cls(bundle, encoder, place)

    def __repr__(self) -> str:
        names = self.bundle.class_names
        return f"<{type(self).__name__} of {len(names)} classes, {self.bundle.verdict}, on {self.device}>"

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
        """
        if isinstance(images, AnyImage):
            return self([images], top=top)[0]
        prediction = self.predict(self.read(images))
        names = (_name(image, number) for number, image in enumerate(images, start=1))
        return make_answers(
            names, prediction.probabilities, prediction.alarm, names=self.bundle.class_names, top=top
        )

    def read(self, sources: Sequence[AnyImage]) -> UInt8[np.ndarray, "batch height width 3"]:
        """Decode image files (or the bytes of some) and bring them to the model's size.

        Raises:
            ImageDataError: Names every image that cannot be read.
        """
        pixels, problems = [], []
        for number, source in enumerate(sources, start=1):
            try:
                pixels.append(to_pixels(_picture(source), self.bundle.preprocess))
            except ImageDataError as error:
                problems.append((_name(source, number), error))
        if problems:
            raise ImageDataError(
                expected="images that can be read",
                got="; ".join(f"{name}: {error.got}" for name, error in problems),
                fix=problems[0][1].fix,
            )
        return np.stack(pixels) if pixels else np.zeros((0, *self.bundle.preprocess.image_size, 3), np.uint8)

    def features(
        self, images: UInt8[np.ndarray, "batch height width 3"], *, batch_size: int = 64
    ) -> Float[np.ndarray, "batch dim"]:
        """Unit-norm image features.

        Args:
            images: RGB at the model's own size, as `read` gives them.
            batch_size: Images encoded at once.

        Raises:
            ImageDataError: The array is not uint8 RGB at the model's size.
        """
        self._check_images(images)
        parts = [np.zeros((0, self.bundle.class_embeddings.shape[1]), np.float32)]
        with torch.inference_mode():
            for start in range(0, len(images), batch_size):
                batch = torch.from_numpy(np.ascontiguousarray(images[start : start + batch_size]))
                pixels = batch.to(self.device).permute(0, 3, 1, 2).float().div(255)
                parts.append(self._encoder.encode_images(pixels).cpu().numpy())
        return np.concatenate(parts)

    def predict(self, images: UInt8[np.ndarray, "batch height width 3"]) -> Prediction:
        """Classify images with the purified head and compare with the head before.

        Args:
            images: RGB at the model's own size, as `read` gives them.
        """
        return self.predict_features(self.features(images))

    def predict_features(self, features: Float[np.ndarray, "batch dim"]) -> Prediction:
        """As `predict`, from features that are already there."""
        bundle = self.bundle
        sigmoid = bundle.logit_bias is not None
        scale, bias = bundle.logit_scale, bundle.logit_bias
        purified = heads.logits(features, bundle.class_embeddings, scale, bias)
        reference = heads.logits(features, bundle.reference_embeddings, scale, bias)
        return Prediction(
            logits=purified,
            probabilities=heads.probabilities(purified, sigmoid=sigmoid),
            alarm=heads.alarm(reference, purified, bundle.suspect_indices, sigmoid=sigmoid),
            reference_logits=reference,
        )

    def _check_images(self, images: UInt8[np.ndarray, "batch height width 3"]) -> None:
        height, width = self.bundle.preprocess.image_size
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (height, width, 3):
            raise ImageDataError(
                expected=f"uint8 images [batch, {height}, {width}, 3]",
                got=f"{images.dtype} {list(images.shape)}",
                fix="Read them with ZeroShotClassifier.read.",
            )


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


def _name(source: AnyImage, number: int) -> str:
    """A path says what image it is; of others only the place is known."""
    return str(source) if isinstance(source, str | Path) else f"image {number}"
