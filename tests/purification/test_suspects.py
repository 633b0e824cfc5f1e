from __future__ import annotations

import pytest
import torch

from cbpt_runtime.purification.suspects import (
    joint_scores,
    p_value,
    p_values,
    robust_z,
    smooth_scores,
)


def test_robust_z_measures_from_the_median_in_deviations() -> None:
    values = torch.randn(20001, generator=torch.Generator().manual_seed(0)) * 3 + 7
    z = robust_z(values)
    assert z.median().item() == 0
    assert z.std().item() == pytest.approx(1, abs=0.03)


def test_the_t_tail_equals_tabulated_quantiles() -> None:
    assert p_value(1.833, 10, 1) == pytest.approx(0.05, abs=2e-4)  # 95 % quantile, 9 degrees of freedom
    assert p_value(2.365, 100, 1) == pytest.approx(0.01, abs=2e-4)  # 99 % quantile, 99 degrees
    assert p_value(0.0, 50, 1) == pytest.approx(0.5, abs=1e-6)
    assert p_value(0.0, 50, 10) == 1.0


def measured(n_classes: int = 60) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    to_text, noise, collapse = (torch.randn(n_classes, generator=generator) for _ in range(3))
    to_prototype = to_text + 0.1 * noise
    return {
        "to_text": to_text,
        "least_to_text": to_text - 1,
        "to_prototype": to_prototype,
        "collapse": collapse,
    }


@pytest.mark.parametrize("sign", ["to_prototype", "collapse"])
def test_a_class_that_is_reached_and_shows_one_more_sign_scores_highest(sign: str) -> None:
    values = measured()
    values["to_text"][7], values["least_to_text"][7], values["to_prototype"][7] = 3.0, 2.0, 3.0
    before = joint_scores(**values)[7]
    values[sign][7] = {"to_prototype": 0.0, "collapse": 6.0}[sign]
    scores = joint_scores(**values)
    assert scores.argmax() == 7
    assert scores[7] > before + 1


def test_little_asymmetry_speaks_against_a_class_only_so_much() -> None:
    values = measured()
    values["to_prototype"][7] = values["to_text"][7] + 10
    low = joint_scores(**values)
    values["to_prototype"][7] += 100
    assert torch.allclose(joint_scores(**values)[7], low[7], atol=0.05)


def test_a_class_that_is_only_asymmetric_does_not_stand_out() -> None:
    values = measured()
    values["to_text"][7], values["least_to_text"][7], values["to_prototype"][7] = 1.0, 0.0, -30.0
    assert joint_scores(**values)[7] < 2 < robust_z(values["to_text"] - values["to_prototype"])[7]


def test_a_class_that_nothing_reaches_does_not_stand_out() -> None:
    values = measured()
    values["to_text"][7], values["least_to_text"][7], values["to_prototype"][7] = -2.0, -3.0, -4.0
    values["collapse"][7] = 9.0
    assert joint_scores(**values)[7] == 0
    assert smooth_scores(values["to_text"], values["least_to_text"], values["collapse"])[7] == 0


def test_signs_that_hang_together_are_brought_to_their_own_scale() -> None:
    values = measured()
    values["least_to_text"] = values["collapse"] = values["to_text"]
    plain, rescaled = joint_scores(**values), joint_scores(**values, rescale=True)
    assert rescaled.argmax() == plain.argmax()
    assert 0 < rescaled.max() < plain.max()


def test_a_smooth_trigger_stands_out_by_reach_and_collapse() -> None:
    reach, least, collapse = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    reach[7], least[7], collapse[7] = 4.0, 4.0, 4.0
    scores = smooth_scores(reach, least, collapse)
    assert scores.argmax() == 7
    assert scores[7] == pytest.approx(robust_z(sum(map(robust_z, (reach, least, collapse))))[7])
    collapse[7] = -4.0
    assert smooth_scores(reach, least, collapse)[7] < scores[7] - 2


def test_a_backdoor_gets_a_small_p_value_and_a_null_model_none() -> None:
    scores = torch.randn(4, 100, generator=torch.Generator().manual_seed(1))
    painted, others = scores[:3], scores[3:]
    assert p_values(painted, others).min() > 0.01
    painted[1, 42] = 8.0
    others[0, 7] = 6.0
    values = p_values(painted, others)
    assert values[42] < 1e-6
    assert values[42] < values[7] < 1e-4
    assert (values < 0.01).sum() == 2


def test_leading_in_every_family_tells_among_a_dozen_classes() -> None:
    scores = torch.randn(3, 16, generator=torch.Generator().manual_seed(2)).clamp(max=1.5)
    scores[:, 3] = 2.0
    nothing = torch.zeros(1, 16)
    assert p_values(scores, nothing)[3].item() == pytest.approx(2 * 16**-2)
    scores[0, 4] = 2.1
    assert p_values(scores, nothing).min() > 0.05
