"""The purified zero-shot classifier of a bundle, running in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from safetensors.torch import load as load_tensors

from cbpt_runtime import heads
from cbpt_runtime.bundle import ENCODER, Bundle, read_bundle
from cbpt_runtime.errors import ImageDataError
from cbpt_runtime.models.clip import ImageEncoder, load_image_encoder, resolve_device
from cbpt_runtime.models.preprocess import decode_image, to_pixels


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
        state = load_tensors(bundle.read_file(ENCODER))
        encoder = load_image_encoder(bundle.model_config, bundle.preprocess, state, str(place))
        return cls(bundle, encoder, place)

    def read(self, sources: Sequence[bytes | str | Path]) -> UInt8[np.ndarray, "batch height width 3"]:
        """Decode image files (or the bytes of some) and bring them to the model's size.

        Raises:
            ImageDataError: Names every image that cannot be read.
        """
        pixels, problems = [], []
        for number, source in enumerate(sources, start=1):
            try:
                image = decode_image(Path(source) if isinstance(source, str) else source)
                pixels.append(to_pixels(image, self.bundle.preprocess))
            except ImageDataError as error:
                problems.append((f"image {number}" if isinstance(source, bytes) else str(source), error))
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
