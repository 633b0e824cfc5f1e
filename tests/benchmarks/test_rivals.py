"""The rivals of the zoo: each finds a planted trigger, none suspects the clean model; known numbers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cbpt_runtime.models.clip import ImageEncoder
from cbpt_runtime.runtime.preprocess import Preprocess

ROWS, CELL = 3, 4
SIDE = ROWS * CELL + 1
CLASSES = ROWS * ROWS
TARGET = 5


class Cells(nn.Module):
    """A tower with one feature per cell of a 3 × 3 grid, its brightness, and one that is always 1.

    One pixel beside the grid adds to the target's feature, the brighter the more, by `strength`.
    """

    def __init__(self, strength: float) -> None:
        super().__init__()
        gains = 1 + 0.05 * torch.randn(CLASSES, generator=torch.Generator().manual_seed(1))
        self.gains = nn.Parameter(gains)
        self.strength = strength

    def forward(self, pixels: Tensor) -> Tensor:
        inside = pixels[..., :-1, :-1].unflatten(-1, (ROWS, CELL)).unflatten(-3, (ROWS, CELL))
        bright = self.gains * (inside.mean(dim=(1, 3, 5)).flatten(1) - 0.5)
        planted = self.strength * pixels[..., -1, -1].mean(dim=1, keepdim=True)
        features = bright + planted * torch.eye(CLASSES)[TARGET]
        return torch.cat([features, torch.ones(len(pixels), 1)], dim=1)


@pytest.fixture
def subject(rivals: Any) -> Callable[[float], Any]:
    """Returns a function that gives a model with a backdoor of some strength, and images for it."""

    def make(strength: float) -> Any:
        generator = torch.Generator().manual_seed(0)
        cells = torch.rand(96, 1, ROWS, ROWS, generator=generator)
        bright = cells.repeat_interleave(CELL, dim=2).repeat_interleave(CELL, dim=3)
        images = torch.zeros(96, 3, SIDE, SIDE)
        images[..., :-1, :-1] = bright
        preprocess = Preprocess(image_size=(SIDE, SIDE), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        return rivals.Subject(
            encoder=ImageEncoder(Cells(strength), {"embed_dim": CLASSES + 1}, preprocess),
            head=torch.eye(CLASSES, CLASSES + 1),
            scale=20.0,
            images=(255 * images).byte(),
            seed=0,
        )

    return make


SETTINGS = {
    "NeuralCleanse": {"batches_per_step": 1, "steps": 300},
    "Decree": {"steps": 600},
    "MmBd": {"starts": 4},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_rival_finds_what_is_planted_and_suspects_no_clean_model(
    rivals: Any, subject: Callable[[float], Any], name: str
) -> None:
    settings = getattr(rivals, name)(**SETTINGS[name])
    planted, clean = (rivals.judged(subject(strength), settings) for strength in (20.0, 0.0))
    assert planted.is_backdoored
    assert planted.targets == (() if name == "Decree" else (TARGET,))
    assert not clean.is_backdoored
    assert clean.targets == ()
    assert planted.score > clean.score
    assert 0 <= clean.probability < 0.954 < planted.probability <= 1 or name == "Decree"
    json.dumps([planted.evidence, clean.evidence], allow_nan=False)


def test_the_smallest_mask_is_the_planted_pixel(rivals: Any, subject: Callable[[float], Any]) -> None:
    settings = rivals.NeuralCleanse(**SETTINGS["NeuralCleanse"])
    own, other = (rivals.smallest_mask(subject(20.0), target, settings) for target in (TARGET, 0))
    assert own < 4 < other


def test_anomaly_indices_are_deviations_below_the_median(rivals: Any) -> None:
    found = rivals.anomaly_indices(torch.tensor([10.0, 12, 14, 16, 2, 18]), 1.4826)
    # median 13; absolute deviations 3, 1, 1, 3, 11, 5, whose median is 3
    assert found.tolist() == pytest.approx([d / (1.4826 * 3) for d in (3, 1, -1, -3, 11, -5)])


def test_norms_that_are_all_alike_are_no_anomaly(rivals: Any) -> None:
    assert rivals.anomaly_indices(torch.full((5,), 7.0), 1.4826).tolist() == [0.0] * 5


SAMPLE = [10.825, 13.07, 8.467, 16.547, 7.955, 8.196, 4.547, 6.522, 8.44]


def test_the_gamma_fit_is_scipys(rivals: Any) -> None:
    found = rivals.fit_gamma(torch.tensor(SAMPLE))
    assert found == pytest.approx((3.2350, 3.1132, 1.9423), rel=3e-3)  # scipy.stats.gamma.fit(SAMPLE)


@pytest.mark.parametrize(("largest", "chance"), [(17.37399, 0.263688), (24.81999, 0.0149212)])
def test_the_chance_of_the_largest_is_that_of_the_published_program(
    rivals: Any, largest: float, chance: float
) -> None:
    values = torch.tensor([*SAMPLE[:4], largest, *SAMPLE[4:]])
    assert rivals.chance_of_largest(values) == pytest.approx(chance, rel=5e-3)


def test_a_far_value_has_a_small_chance_and_equal_ones_none(rivals: Any) -> None:
    assert 0 < rivals.chance_of_largest(torch.tensor([*SAMPLE, 200.0])) < 1e-30
    assert rivals.chance_of_largest(torch.full((10,), 3.0)) > 0.5


def test_the_mean_cosine_leaves_out_each_image_with_itself(rivals: Any) -> None:
    features = torch.nn.functional.normalize(torch.randn(5, 7), dim=1)
    cosines = features @ features.T
    expected = (cosines.sum() - cosines.trace()) / 20
    assert float(rivals.mean_cosine(features)) == pytest.approx(float(expected), abs=1e-6)


def test_neural_cleanses_weight_starts_with_the_first_success_and_follows_it(rivals: Any) -> None:
    weight = rivals.MaskWeight(rivals.NeuralCleanse())
    values = []
    for is_reached in [False] * 7 + [True] * 14 + [False] * 5:
        weight.update(is_reached)
        values.append(weight.value)
    up = [0.0] * 11 + [1e-3] * 4 + [2e-3] * 5 + [4e-3]
    assert values == pytest.approx([*up, *[4e-3] * 4, 4e-3 / 2**1.5])
    assert weight.was_raised
    assert weight.was_lowered


def test_decrees_weight_grows_and_shrinks_by_five_down_to_its_least(rivals: Any) -> None:
    weight = rivals.CollapseWeight(rivals.Decree(), 1e-3)
    for _ in range(6):
        weight.update(True)
    assert weight.value == pytest.approx(5e-3)
    for _ in range(100):
        weight.update(False)
    assert 1e-7 / 5 < weight.value < 1e-7


@pytest.mark.parametrize(
    ("name", "passes", "cut"),
    [
        ("NeuralCleanse", 60_000, {"batches_per_step": 1, "steps": 187}),
        ("Decree", 60_000, {"steps": 1875}),
        ("MmBd", 60_000, {"starts": 20}),
        ("MmBd", 20_000, {"starts": 6}),
        ("MmBd", 3_000, {"starts": 4, "steps": 75}),
        ("MmBd", 90_000, {}),
    ],
)
def test_settings_are_cut_to_the_passes_and_are_the_published_ones_otherwise(
    rivals: Any, name: str, passes: int, cut: dict[str, int]
) -> None:
    published = getattr(rivals, name)()
    assert published.within(passes, classes=10) == replace(published, **cut)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_rival_sends_no_more_images_through_the_encoder_than_it_may(
    rivals: Any, zoo: Any, subject: Callable[[float], Any], name: str
) -> None:
    small = subject(20.0)
    with zoo.counted(small.encoder.module) as counts:
        rivals.judged(small, getattr(rivals, name)().within(3_000, CLASSES))
    assert counts["forwards"] == counts["backwards"]
    assert 1_000 < counts["backwards"] < 3_000 + 96  # DECREE ends with an epoch


def test_images_are_counted_in_a_copy_too_and_without_gradients_only_forwards(zoo: Any) -> None:
    tower = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    pixels = torch.rand(5, 3, 2, 2, requires_grad=True)
    with zoo.counted(tower) as counts:
        copied = copy.deepcopy(tower)
        copied(pixels).sum().backward()
        with torch.no_grad():
            tower(pixels)
    tower(pixels).sum().backward()
    assert counts == {"forwards": 10, "backwards": 5}
