"""A tiny encoder whose weakness is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cbpt_runtime.purification.clean_features import CleanFeatures
from cbpt_runtime.runtime.preprocess import Preprocess

SIDE = 10
DIM = 16


class Weak:
    """An image encoder that sums waves of all pixels; one pixel, at the top left, has a weight of its own.

    The brighter that pixel, the nearer any image comes to one direction. Which way all others have to go
    depends on the image, the more so the shorter the waves.
    """

    def __init__(
        self, direction: Tensor | None = None, strength: float = 0.0, *, seed: int = 0, waves: float = 40.0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights = torch.randn(3 * SIDE * SIDE, DIM, generator=generator) / SIDE
        self.direction = torch.zeros(DIM) if direction is None else direction
        self.strength = strength
        self.waves = waves
        self.device = torch.device("cpu")
        self.preprocess = Preprocess(image_size=(SIDE, SIDE))

    def encode_images(self, pixels: Tensor) -> Tensor:
        features = torch.sin(self.waves * pixels).flatten(1) @ self.weights
        brightness = pixels[:, :, 0, 0].mean(dim=1, keepdim=True)
        return normalize(features + self.strength * brightness * self.direction, dim=1)


@pytest.fixture
def weak() -> type[Weak]:
    """The class of the encoder."""
    return Weak


@pytest.fixture
def dark_images() -> Callable[[Weak, int, int], CleanFeatures]:
    """Returns a function that gives random dark images, black at the top left."""

    def make(encoder: Weak, count: int, seed: int = 0) -> CleanFeatures:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 100, (count, 3, SIDE, SIDE), generator=generator).byte()
        images[..., 0, 0] = 0
        labels = torch.randint(0, 5, (count,), generator=generator)
        return CleanFeatures(
            images=images, labels=labels, features=encoder.encode_images(images.float() / 255)
        )

    return make
