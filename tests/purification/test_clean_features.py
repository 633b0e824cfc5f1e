from __future__ import annotations

import torch

from cbpt_runtime.purification.clean_features import AugmentedFeatures, CleanFeatures, with_synthetic_features


def unit(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(tensor, dim=-1)


def few() -> tuple[AugmentedFeatures, CleanFeatures]:
    """Three classes on three axes; images differ along the fourth, those of class 0 not at all."""
    labels = torch.arange(3).repeat(6)
    features = torch.eye(5)[labels]
    features[:, 3] = torch.linspace(-0.3, 0.3, 18) * (labels > 0)
    features = unit(features)
    images = torch.zeros(18, 3, 2, 2, dtype=torch.uint8)
    return AugmentedFeatures(features=features, labels=labels), CleanFeatures(
        images=images, labels=labels, features=features
    )


def test_imagined_images_of_a_class_differ_as_images_of_all_classes_do() -> None:
    augmented, tune = few()
    more = with_synthetic_features(augmented, tune, [0], seed=0)
    added = more.features[18:]
    assert torch.equal(more.features[:18], augmented.features)
    assert len(added) >= 100
    assert (more.labels[18:] == 0).all()
    assert torch.allclose(added.norm(dim=1), torch.ones(len(added)))
    assert (added @ torch.eye(5)[0] > 0.9).all()
    assert added[:, 3].std() > 0.02
    assert added[:, 4].abs().max() < 1e-6


def test_imagined_images_follow_the_seed_and_every_class_gets_its_own() -> None:
    augmented, tune = few()
    first, again, other = (with_synthetic_features(augmented, tune, [0, 2], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.features, again.features)
    assert not torch.equal(first.features, other.features)
    assert first.labels[18:].unique(return_counts=True)[1].tolist() == [len(first.labels[18:]) // 2] * 2
    assert torch.equal(with_synthetic_features(augmented, tune, [], seed=0).features, augmented.features)


def test_classes_without_images_get_no_imagined_ones() -> None:
    augmented, tune = few()
    assert torch.equal(with_synthetic_features(augmented, tune, [3], seed=0).features, augmented.features)
