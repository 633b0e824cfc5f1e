from __future__ import annotations

from typing import Any

import pytest
import torch

from cbpt_runtime.purification import tuning
from cbpt_runtime.purification.config import PurifyConfig
from cbpt_runtime.purification.tuning import (
    HeadCheck,
    TuningData,
    image_weights,
    soft_targets,
    tune,
    tune_in_rounds,
)


def unit(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(tensor, dim=-1)


def backdoored() -> TuningData:
    """Six classes; a trigger adds one direction to every feature, and class 2 has learnt that direction."""
    generator = torch.Generator().manual_seed(0)
    centres = unit(torch.randn(6, 16, generator=generator))
    direction = unit(torch.randn(16, generator=generator))
    reference = centres.clone()
    reference[2] = unit(centres[2] + 2 * direction)
    labels = torch.arange(6).repeat(20)
    clean = unit(centres[labels] + 0.1 * torch.randn(120, 16, generator=generator))
    others = labels != 2
    return TuningData(
        reference=reference,
        scale=20.0,
        clean=clean,
        clean_labels=labels,
        triggered=unit(clean[others] + 1.5 * direction),
        triggered_labels=labels[others],
        triggered_targets=torch.full_like(labels[others], 2),
        targets=(2,),
        directions=direction.unsqueeze(0),
    )


def test_tuning_gives_triggered_features_their_class_back_and_keeps_clean_ones() -> None:
    data = backdoored()
    before = (data.triggered @ data.reference.T).argmax(dim=1)
    assert (before == 2).float().mean() > 0.9
    head, contexts = tune(data, PurifyConfig(), backdoor_weight=2.0, target_weight=5.0)
    after = (data.triggered @ head.T).argmax(dim=1)
    assert contexts is None
    assert (after == 2).float().mean() < 0.02
    assert (after == data.triggered_labels).float().mean() > 0.9
    correct = (data.clean @ head.T).argmax(dim=1) == data.clean_labels
    assert correct.float().mean() > 0.9


def test_other_classes_move_mostly_along_the_trigger_directions() -> None:
    data = backdoored()
    others = [0, 1, 3, 4, 5]

    def share_across(orthogonal_weight: float) -> float:
        head, _ = tune(
            data, PurifyConfig(orthogonal_weight=orthogonal_weight), backdoor_weight=2.0, target_weight=5.0
        )
        change = (head - data.reference)[others]
        across = change - change @ data.directions.T @ data.directions
        return float(across.norm() / change.norm())

    assert share_across(1000.0) < 0.1 < share_across(0.0)


def test_suspected_classes_are_not_trusted_on_images_of_others() -> None:
    data = backdoored()
    known = soft_targets(data)
    others = data.clean_labels != 2
    assert torch.allclose(known.sum(dim=1), torch.ones(120), atol=1e-5)
    assert (known[others, 2] == 0).all()
    assert (known[~others, 2] == 1).all()


def test_images_of_suspected_classes_weigh_more() -> None:
    assert image_weights(torch.tensor([0, 2, 1]), [2], 10.0).tolist() == [1.0, 10.0, 1.0]


def test_a_suspected_class_counts_the_same_however_many_images_it_has() -> None:
    labels = torch.tensor([0] * 8 + [1] * 8 + [2] * 40)
    weights = image_weights(labels, [2], 5.0)
    assert weights[:16].tolist() == [1.0] * 16
    assert weights[16:].sum().item() == pytest.approx(5 * 8)


@pytest.mark.parametrize(
    ("verdicts", "rounds"),
    [
        (["accepted"], [(2.0, 5.0)]),
        (["trigger_survives", "false_positives", "accepted"], [(2.0, 5.0), (4.0, 5.0), (4.0, 5.0 / 2**0.5)]),
        (["trigger_survives", "trigger_survives", "trigger_survives"], [(2.0, 5.0), (4.0, 5.0), (8.0, 5.0)]),
    ],
)
def test_rounds_change_the_weights_until_a_head_is_accepted(
    verdicts: list[HeadCheck], rounds: list[tuple[float, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    answers = iter(verdicts)
    actual = tuning.tune

    def recorded(data: TuningData, config: PurifyConfig, **weights: Any) -> Any:
        seen.append((weights["backdoor_weight"], weights["target_weight"]))
        return actual(data, config, **weights)

    monkeypatch.setattr(tuning, "tune", recorded)
    config = PurifyConfig(tuning_steps=2, backdoor_weight=2.0, target_weight=5.0, tuning_rounds=3)
    tune_in_rounds(backdoored(), config, lambda head: next(answers))
    assert seen == [pytest.approx(weights) for weights in rounds]
