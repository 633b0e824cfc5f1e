from __future__ import annotations

import torch

from cbpt_runtime.purification.clean_features import Clean, Views, with_imagined


def unit(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(tensor, dim=-1)


def few() -> tuple[Views, Clean]:
    """Three classes on three axes; images differ along the fourth, those of class 0 not at all."""
    labels = torch.arange(3).repeat(6)
    features = torch.eye(5)[labels]
    features[:, 3] = torch.linspace(-0.3, 0.3, 18) * (labels > 0)
    features = unit(features)
    images = torch.zeros(18, 3, 2, 2, dtype=torch.uint8)
    return Views(features=features, labels=labels), Clean(images=images, labels=labels, features=features)


def test_imagined_images_of_a_class_differ_as_images_of_all_classes_do() -> None:
    views, tune = few()
    more = with_imagined(views, tune, [0], seed=0)
    added = more.features[18:]
    assert torch.equal(more.features[:18], views.features)
    assert len(added) >= 100
    assert (more.labels[18:] == 0).all()
    assert torch.allclose(added.norm(dim=1), torch.ones(len(added)))
    assert (added @ torch.eye(5)[0] > 0.9).all()
    assert added[:, 3].std() > 0.02
    assert added[:, 4].abs().max() < 1e-6


def test_imagined_images_follow_the_seed_and_every_class_gets_its_own() -> None:
    views, tune = few()
    first, again, other = (with_imagined(views, tune, [0, 2], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.features, again.features)
    assert not torch.equal(first.features, other.features)
    assert first.labels[18:].unique(return_counts=True)[1].tolist() == [len(first.labels[18:]) // 2] * 2
    assert torch.equal(with_imagined(views, tune, [], seed=0).features, views.features)


def test_classes_without_images_get_no_imagined_ones() -> None:
    views, tune = few()
    assert torch.equal(with_imagined(views, tune, [3], seed=0).features, views.features)
