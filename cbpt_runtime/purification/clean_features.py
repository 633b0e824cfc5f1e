"""What the purification works with: features of the clean images, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import normalize

from cbpt_runtime.models.clip import DualEncoder, ImageEncoder
from cbpt_runtime.models.data import ClassList, CleanSplit
from cbpt_runtime.models.faster import faster
from cbpt_runtime.purification.augmentation import N_AUGMENTATIONS, augment

_BATCH = 256
_SYNTHETIC = 300
_SPREAD = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanFeatures:
    """Clean images with their features.

    Attributes:
        images: uint8, channels first, on the encoder's device.
        labels: Class indices.
        features: Unit features of the images.
    """

    images: UInt8[Tensor, "batch 3 height width"]
    labels: Int[Tensor, " batch"]
    features: Float[Tensor, "batch dim"]

    def part(self, which: Tensor) -> CleanFeatures:
        """Return some of the images, by mask or place."""
        which = which.to(self.labels.device)
        return CleanFeatures(
            images=self.images[which], labels=self.labels[which], features=self.features[which]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentedFeatures:
    """Features of clean images and of augmented ones.

    Attributes:
        features: Unit features.
        labels: Class indices.
    """

    features: Float[Tensor, "augmented dim"]
    labels: Int[Tensor, " augmented"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DefenderData:
    """Everything a defender knows, on one device.

    Attributes:
        encoder: The suspect's image encoder, batch norms folded.
        texts: Reference class embeddings.
        scale: The model's logit scale.
        tune: Images to tune on.
        augmented: The tune images as they are and augmented.
        heldout: Images to select on; the tune images where none could be held out.
    """

    encoder: ImageEncoder
    texts: Float[Tensor, "classes dim"]
    scale: float
    tune: CleanFeatures
    augmented: AugmentedFeatures
    heldout: CleanFeatures


def compute_features(
    encoder: DualEncoder, classes: ClassList, split: CleanSplit, *, seed: int = 0
) -> DefenderData:
    """Compute reference embeddings and the features of all clean images; the seed is for augmentation."""
    fast = faster(encoder.image_encoder)
    tune = encode_clean(fast, split.tune_images, split.tune_labels)
    heldout = tune
    if len(split.heldout_labels):
        heldout = encode_clean(fast, split.heldout_images, split.heldout_labels)
    return DefenderData(
        encoder=fast,
        texts=encoder.class_embeddings(classes),
        scale=encoder.logit_scale,
        tune=tune,
        augmented=_augmented(fast, tune, seed),
        heldout=heldout,
    )


def with_synthetic_features(
    augmented: AugmentedFeatures, tune: CleanFeatures, classes: Sequence[int], seed: int
) -> AugmentedFeatures:
    """Add features that images of some classes might have had.

    A few images tell little of how those of a class differ from each other, all classes together tell much:
    a synthetic feature is the mean of its class plus a share of what some image, of any class, differs from
    the mean of its own.

    Args:
        augmented: What to add to.
        tune: The images themselves.
        classes: Class indices that get synthetic features; those without images get none.
        seed: Of the draw.
    """
    counts = tune.labels.bincount()
    means = _class_sums(tune, len(counts)) / counts.clamp(min=1).unsqueeze(1)
    deviations = tune.features - means[tune.labels]
    generator = torch.Generator().manual_seed(seed)
    features, labels = [augmented.features], [augmented.labels]
    for index in classes:
        if index >= len(counts) or not counts[index]:
            continue
        drawn = torch.randint(len(deviations), (_SYNTHETIC,), generator=generator)
        features.append(normalize(means[index] + _SPREAD * deviations[drawn.to(deviations.device)], dim=1))
        labels.append(torch.full((_SYNTHETIC,), index, device=tune.labels.device))
    return AugmentedFeatures(features=torch.cat(features), labels=torch.cat(labels))


def _class_sums(clean: CleanFeatures, n_classes: int) -> Float[Tensor, "classes dim"]:
    sums = torch.zeros(n_classes, clean.features.shape[1], device=clean.features.device)
    return sums.index_add_(0, clean.labels, clean.features)


def _augmented(encoder: ImageEncoder, clean: CleanFeatures, seed: int) -> AugmentedFeatures:
    generator = torch.Generator().manual_seed(seed)
    features = [clean.features]
    with torch.no_grad():
        for number in range(N_AUGMENTATIONS):
            features.extend(map(encoder.encode_images, augment(clean.images, number, generator)))
    return AugmentedFeatures(features=torch.cat(features), labels=clean.labels.repeat(1 + N_AUGMENTATIONS))


def encode_clean(encoder: ImageEncoder, images: object, labels: object) -> CleanFeatures:
    """Images with their features; uint8 of shape [batch, height, width, 3], as an array."""
    pixels = torch.as_tensor(images).permute(0, 3, 1, 2).contiguous().to(encoder.device)
    with torch.no_grad():
        parts = [encoder.encode_images(part.float() / 255) for part in pixels.split(_BATCH)]
    return CleanFeatures(
        images=pixels,
        labels=torch.as_tensor(labels).long().to(encoder.device),
        features=torch.cat(parts),
    )
