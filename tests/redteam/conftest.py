"""Coloured pictures a tiny model learns in seconds, and that model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from cbpt_runtime.models.trainable import TrainableClip, new_trainable
from cbpt_runtime.redteam.poisoning import LabelledImages
from cbpt_runtime.redteam.training import Pairs, TrainConfig, caption_texts, train

NAMES = ("apple", "leaf", "ocean")
TEMPLATES = ("a photo of a {}.", "a drawing of a {}.")
TEXTS = caption_texts(NAMES, TEMPLATES)
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@dataclass(frozen=True)
class Lab:
    """A tiny model that knows its classes, with pictures to train and to measure on."""

    clip: TrainableClip
    training: LabelledImages
    heldout: LabelledImages


def coloured_images(per_class: int, seed: int) -> LabelledImages:
    """Noisy pictures that are red, green or blue."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(NAMES)), per_class)
    images = rng.integers(0, 120, (len(labels), 32, 32, 3), dtype=np.uint8)
    for index, label in enumerate(labels):
        images[index, :, :, label] += 100
    return LabelledImages(images=images, labels=labels)


def train_config(**changes: object) -> TrainConfig:
    settings = {"epochs": 4, "learning_rate": 3e-3, "batch_size": 24, "templates": TEMPLATES}
    return TrainConfig(**{**settings, **changes})


def clean_pairs(data: LabelledImages, step: int = 1) -> Pairs:
    """Every `step`-th image with a true caption."""
    return Pairs(
        images=data.images[::step],
        captions=data.labels[::step],
        poisoned=np.zeros(len(data.labels[::step]), dtype=bool),
        alignment=np.zeros(len(data.labels[::step]), dtype=np.float32),
        texts=TEXTS,
    )


@pytest.fixture(scope="session")
def lab() -> Lab:
    training, heldout = coloured_images(64, 0), coloured_images(16, 1)
    clip = new_trainable(CONFIG, seed=0)
    train(clip, clean_pairs(training), train_config(), generator=torch.Generator().manual_seed(0))
    return Lab(clip=clip, training=training, heldout=heldout)
