from __future__ import annotations

import math

import pytest
import torch

from cbpt_runtime.purification import detection
from cbpt_runtime.purification.detection import Outliers, deviations_above, p_value

DRAWS = 100


def find_outliers(margins: torch.Tensor, level: float) -> Outliers:
    """With triggers that all reach their concepts, measured in one way."""
    return detection.find_outliers(margins[None], torch.ones_like(margins, dtype=torch.bool), level)


def null(seed: int, families: int = 2, concepts: int = 40) -> torch.Tensor:
    """Margins of an encoder without a backdoor; per family the lesser half is given up."""
    margins = torch.randn(families, concepts, generator=torch.Generator().manual_seed(seed))
    middle = margins.median(dim=1, keepdim=True).values
    return margins.masked_fill(margins < middle, -torch.inf)


def planted(*concepts: int, families: int = 3) -> torch.Tensor:
    """A null, but the concepts stand far out in the second family."""
    margins = null(1, families)
    for place, concept in enumerate(concepts):
        margins[1, concept] = 20.0 - place
    return margins


@pytest.mark.parametrize("concepts", [48, 80])
def test_p_values_of_a_normal_null_are_seldom_small(concepts: int) -> None:
    smallest = [float(find_outliers(null(seed, 1, concepts), 1e-12).p_values.min()) for seed in range(DRAWS)]
    assert sum(value < 0.01 for value in smallest) <= 0.03 * DRAWS
    assert sum(value < 0.05 for value in smallest) <= 0.12 * DRAWS
    assert 0.02 * DRAWS <= sum(value < 0.1 for value in smallest) <= 0.25 * DRAWS
    assert sum(value > 0.5 for value in smallest) >= 0.3 * DRAWS


def test_one_planted_outlier_is_the_only_suspect() -> None:
    found = find_outliers(planted(7), 0.01)
    assert found.suspects == [7]
    assert found.families[7] == 1
    assert found.p_values[7] < 0.001
    assert found.p_values.argmin() == 7
    assert found.scores.argmax() == 7


def test_two_planted_outliers_are_both_found_the_clearer_one_first() -> None:
    assert find_outliers(planted(30, 7), 0.01).suspects == [30, 7]
    assert find_outliers(planted(7, 30), 0.01).suspects == [7, 30]


def test_an_outlier_does_not_hide_a_lesser_one() -> None:
    margins = planted(7, 30)
    alone = find_outliers(planted(30), 0.01)
    margins[1, 30], margins[1, 7] = 20.0, 1e6
    both = find_outliers(margins, 0.01)
    assert both.suspects == [7, 30]
    assert both.p_values[30] < 2 * alone.p_values[30]


def test_what_takes_few_images_anywhere_is_no_suspect_however_far_it_stands_out() -> None:
    margins = planted(7)
    reached = torch.ones_like(margins, dtype=torch.bool)
    assert detection.find_outliers(margins[None], reached, 0.01).suspects == [7]
    reached[:, 7] = False
    assert detection.find_outliers(margins[None], reached, 0.01).suspects == []


def test_a_concept_that_stands_out_a_little_everywhere_is_found() -> None:
    margins = null(1, 6)
    assert find_outliers(margins, 0.01).suspects == []
    for family in margins:
        rest = family[[index for index in range(40) if index != 7]]
        family[7] = rest.max() + 0.1
    assert find_outliers(margins, 0.01).suspects == [7]
    assert find_outliers(margins[:1], 0.01).suspects == []


def test_a_suspect_keeps_the_p_value_it_was_suspected_for() -> None:
    for seed in range(20):
        margins = null(seed, 6)
        margins[:, 7] = margins.amax(dim=1) + 0.1
        found = find_outliers(margins, 0.01)
        assert found.suspects
        assert (found.p_values[found.suspects] < 0.01).all()


@pytest.mark.parametrize(("concepts", "expected"), [(20, [7]), (40, [7, 12])])
def test_among_few_concepts_only_the_clearest_is_suspected(concepts: int, expected: list[int]) -> None:
    margins = null(1, 3, concepts)
    margins[0, 7], margins[1, 12] = 200.0, 100.0
    assert find_outliers(margins, 0.01).suspects == expected


@pytest.mark.parametrize("which", [0, 1])
def test_what_stands_out_by_either_margin_is_found(which: int) -> None:
    margins = torch.stack([null(1, 3), null(1, 3)])
    margins[which] = planted(7)
    found = detection.find_outliers(margins, torch.ones(3, 40, dtype=torch.bool), 0.01)
    assert found.suspects == [7]
    assert found.families[7] == 1
    assert found.scores[7] == find_outliers(planted(7), 0.01).scores[7]


def test_deviations_below_the_least_one_are_noise() -> None:
    margins = 0.01 * planted(7)
    reached = torch.ones_like(margins, dtype=torch.bool)
    assert detection.find_outliers(margins[None], reached, 0.01).suspects == [7]
    least = [detection.find_outliers(margins[None], reached, 0.01, least_deviation=d) for d in (0.01, 0.1)]
    assert [found.suspects for found in least] == [[7], []]


def test_nothing_planted_suspects_nobody() -> None:
    assert all(find_outliers(null(seed), 0.0005).suspects == [] for seed in range(5))


def test_concepts_that_were_given_up_are_never_suspects() -> None:
    margins = planted(7)
    found = find_outliers(margins, 1.0)
    given_up = [concept for concept in range(40) if (margins[:, concept] == -torch.inf).all()]
    assert given_up
    assert not set(given_up) & set(found.suspects)
    assert (found.p_values[given_up] == 1).all()
    assert (found.scores[given_up] == -torch.inf).all()


def test_what_all_concepts_have_in_common_changes_no_verdict() -> None:
    margins, found = planted(7), find_outliers(planted(7), 0.01)
    moved = find_outliers(0.01 * margins + torch.tensor([[3.0], [-5.0], [0.0]]), 0.01)
    kept = found.scores > -torch.inf
    assert moved.suspects == found.suspects
    assert torch.allclose(moved.scores[kept], found.scores[kept], rtol=1e-3, atol=1e-3)


def test_deviations_are_those_of_the_normal_distribution_through_the_upper_quantiles() -> None:
    others = torch.linspace(0, 1, 101)
    by_90 = (0.9 - 0.75) / (1.2816 - 0.6745)
    assert deviations_above(torch.tensor(1.0), others) == pytest.approx(0.6745 + 0.25 / by_90, rel=1e-5)
    heavier = others.clone()
    heavier[95:] = 3.0
    by_95 = (3.0 - 0.75) / (1.6449 - 0.6745)
    assert deviations_above(torch.tensor(1.0), heavier) == pytest.approx(0.6745 + 0.25 / by_95, rel=1e-5)


def test_only_the_upper_quarter_of_the_others_judges() -> None:
    others = torch.linspace(0, 1, 101)
    same = others.masked_fill(others < 0.7, -torch.inf)
    assert deviations_above(torch.tensor(2.0), same) == deviations_above(torch.tensor(2.0), others)


def test_equal_others_give_a_finite_score() -> None:
    assert deviations_above(torch.tensor(0.0), torch.zeros(20)) == pytest.approx(0.6745)
    assert math.isfinite(deviations_above(torch.tensor(1.0), torch.zeros(20)))


def cauchy(score: float) -> float:
    return 0.5 - math.atan(score) / math.pi


def two_degrees(score: float) -> float:
    return 0.5 - score / (2 * math.sqrt(2 + score**2))


def three_degrees(score: float) -> float:
    root = score / math.sqrt(3)
    return 0.5 - (root / (1 + root**2) + math.atan(root)) / math.pi


@pytest.mark.parametrize("score", [-1.0, 0.0, 0.7, 3.0, 30.0])
@pytest.mark.parametrize(("concepts", "tail"), [(2, cauchy), (4, two_degrees), (6, three_degrees)])
def test_p_values_are_those_of_students_t_for_the_largest_of_all_scores(
    score: float, concepts: int, tail: object
) -> None:
    assert callable(tail)
    assert p_value(score, concepts) == pytest.approx(1 - (1 - tail(score)) ** concepts, rel=1e-4)


def test_p_values_agree_with_the_printed_table_of_students_t() -> None:
    for concepts, critical in ((20, 3.169), (60, 2.750), (80, 2.704)):  # 10, 30, 40 degrees, 0.5 %
        assert p_value(critical, concepts) == pytest.approx(1 - 0.995**concepts, rel=2e-3)


def test_extreme_scores_give_p_values_that_are_numbers_in_the_unit_interval() -> None:
    values = [p_value(score, 96) for score in (-math.inf, -1e9, 0.0, 50.0, 1e9)]
    assert values[0] == 1.0
    assert values == sorted(values, reverse=True)
    assert all(0 <= value <= 1 for value in values)
