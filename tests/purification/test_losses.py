from __future__ import annotations

import numpy as np
import pytest
import torch

from cbpt_runtime.purification.losses import (
    backdoor_alignment,
    clean_alignment,
    contrastive_inversion,
    prompt_consistency,
)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_contrastive_inversion_is_infonce_over_texts_and_the_clean_feature() -> None:
    to_texts, to_clean = unit(2, 3, 5), unit(2, 3, seed=1)
    targets = torch.tensor([4, 1])
    positives = torch.nn.functional.one_hot(targets, 5).bool()
    loss = contrastive_inversion(to_texts, to_clean, positives, ~positives, scale=7.0)
    expected = []
    for trigger, target in enumerate(targets.tolist()):
        logits = 7.0 * np.concatenate([to_texts[trigger], to_clean[trigger, :, None]], axis=1)
        expected.append(-log_softmax(logits)[:, target].mean())
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)


def test_contrastive_inversion_sums_over_a_triggers_texts_and_leaves_out_those_that_are_no_rivals() -> None:
    to_texts, to_clean = unit(2, 4, 6), unit(2, 4, seed=1)
    positives = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]]).bool()
    negatives = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 0, 0]]).bool()
    loss = contrastive_inversion(to_texts, to_clean, positives, negatives, scale=3.0)
    expected = []
    for trigger in range(2):
        weights, origin = np.exp(3.0 * to_texts[trigger].numpy()), np.exp(3.0 * to_clean[trigger].numpy())
        own = weights[:, positives[trigger].numpy()].sum(axis=1)
        rivals = weights[:, negatives[trigger].numpy()].sum(axis=1) + origin
        expected.append(-np.log(own / (own + rivals)).mean())
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)


def test_contrastive_inversion_has_gradients_to_its_own_texts_and_rivals_only() -> None:
    to_texts, to_clean = (100 * unit(1, 4, 3)).requires_grad_(), unit(1, 4, seed=1)
    positives, negatives = torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]])
    contrastive_inversion(to_texts, to_clean, positives, negatives, scale=100.0).sum().backward()
    assert to_texts.grad is not None
    assert to_texts.grad.isfinite().all()
    assert (to_texts.grad[..., 2] == 0).all()
    assert to_texts.grad[..., 0].min() < 0 < to_texts.grad[..., 1].max()


def test_clean_alignment_is_a_weighted_cross_entropy() -> None:
    logits, known = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), unit(4, 3).abs()
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0])
    per_image = -(known.numpy() * log_softmax(logits.numpy())).sum(axis=1)
    expected = np.average(per_image, weights=weights.numpy())
    assert clean_alignment(logits, known, weights).item() == pytest.approx(expected, rel=1e-5)


def test_clean_alignment_is_least_at_what_is_known() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(4)
    at_best = clean_alignment(logits, logits.softmax(dim=1), ones)
    assert at_best < clean_alignment(logits + torch.tensor([1.0, 0.0, 0.0]), logits.softmax(dim=1), ones)


def test_backdoor_alignment_is_two_cross_entropies() -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    labels, suspects = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([4, 4, 4, 4, 1, 1])
    log_p = log_softmax(logits.numpy())
    rows = np.arange(6)
    own, suspected = log_p[rows, labels], np.exp(log_p[rows, suspects])
    leave = -np.log1p(-suspected)
    for weight in (0.0, 0.2, 1.0):
        expected = (leave + weight * (-own - leave)).mean()
        loss = backdoor_alignment(logits, labels, suspects, weight)
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_backdoor_alignment_has_finite_gradients_where_only_the_suspect_is_left() -> None:
    logits = torch.tensor([[80.0, -80.0, -80.0]], requires_grad=True)
    backdoor_alignment(logits, torch.tensor([1]), torch.tensor([0]), 0.2).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0] > 0.5


def test_prompt_consistency_weighs_classes_and_what_is_across_the_trigger_direction() -> None:
    change = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    along_first = torch.tensor([[1.0, 0.0]])
    loss = prompt_consistency(change, along_first, torch.tensor([1.0, 0.5]), orthogonal_weight=4.0)
    assert loss.item() == pytest.approx((1 * 1.0 + 9 * (1 + 4) * 0.5) / 2)
