"""The purified zero-shot classifier of a bundle, running in PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from cbpt_runtime.bundle import ENCODER, Bundle, read_bundle
from cbpt_runtime.classification.classifier import Classifier
from cbpt_runtime.errors import BundleError
from cbpt_runtime.models.clip import ImageEncoder, load_image_encoder, resolve_device
from cbpt_runtime.models.pixels import to_float
from cbpt_runtime.runtime import zero_shot
from cbpt_runtime.runtime.prediction import Prediction, above
from cbpt_runtime.runtime.preprocess import Pixels, Preprocess


class BundleClassifier(Classifier):
    """Image encoder and both heads of a bundle; the encoder runs once per image.

    Attributes:
        bundle: Where they come from.
        image_encoder: The bundle's image tower.
        device: Where the encoder runs.
    """

    kind = "bundle"

    def __init__(self, bundle: Bundle, encoder: ImageEncoder, device: torch.device) -> None:
        self.bundle = bundle
        self.device = device
        self.source, self.digest, self.place = str(bundle.path), bundle.digest, str(device)
        self.class_names, self.class_folders = bundle.class_names, bundle.class_folders
        self.verdict, self.encoder = bundle.verdict, bundle.encoder
        self.sigmoid = bundle.logit_bias is not None
        self.image_encoder = encoder

    @classmethod
    def from_bundle(cls, bundle: Bundle | str | Path, device: str = "cpu") -> BundleClassifier:
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
        state = _encoder_tensors(bundle)
        encoder = load_image_encoder(bundle.model_config, bundle.preprocess, state, str(place))
        return cls(bundle, encoder, place)

    @property
    def preprocess(self) -> Preprocess:
        """How an image becomes the model's pixels."""
        return self.bundle.preprocess

    @property
    def suspect_indices(self) -> tuple[int, ...]:
        """Class indices of the suspected targets."""
        return self.bundle.suspect_indices

    @property
    def alarm_threshold(self) -> float | None:
        """Above which alarm an image is suspicious."""
        return self.bundle.alarm_threshold

    @property
    def suspects(self) -> tuple[str, ...]:
        """Names of the suspected targets, most suspicious first."""
        return tuple(suspect.name for suspect in self.bundle.suspects)

    def features(self, images: Pixels, *, batch_size: int = 64) -> Float[np.ndarray, "batch dim"]:
        """Unit-norm image features.

        Args:
            images: RGB at the model's own size, as `read` gives them.
            batch_size: Images encoded at once.

        Raises:
            ImageDataError: The array is not uint8 RGB at the model's size.
        """
        self.check_pixels(images)
        parts = [np.zeros((0, self.bundle.class_embeddings.shape[1]), np.float32)]
        with torch.inference_mode():
            for start in range(0, len(images), batch_size):
                pixels = to_float(images[start : start + batch_size], self.device)
                parts.append(self.image_encoder.encode_images(pixels).cpu().numpy())
        return np.concatenate(parts)

    def predict(self, images: Pixels) -> Prediction:
        """Classify images with the purified head and compare with the head before."""
        return self.predict_features(self.features(images))

    def predict_features(self, features: Float[np.ndarray, "batch dim"]) -> Prediction:
        """As `predict`, from features that are already there."""
        bundle = self.bundle
        sigmoid = self.sigmoid
        scale, bias = bundle.logit_scale, bundle.logit_bias
        purified = zero_shot.logits(features, bundle.class_embeddings, scale, bias)
        reference = zero_shot.logits(features, bundle.reference_embeddings, scale, bias)
        alarm, target = zero_shot.alarm_and_target(
            reference, purified, bundle.suspect_indices, sigmoid=sigmoid
        )
        return Prediction(
            logits=purified,
            probabilities=zero_shot.probabilities(purified, sigmoid=sigmoid),
            alarm=alarm,
            reference_logits=reference,
            suspicious=above(alarm, bundle.alarm_threshold),
            alarm_target=target,
        )


def _encoder_tensors(bundle: Bundle) -> dict[str, torch.Tensor]:
    content = bundle.read_file(ENCODER)
    try:
        return load_tensors(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise BundleError(
            expected=f"safetensors in {bundle.path / ENCODER}",
            got=str(error),
            fix="Make the bundle again with `cbpt-runtime purify`, or fetch an intact copy.",
        ) from error
