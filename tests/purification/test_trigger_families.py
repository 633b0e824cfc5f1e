from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cbpt_runtime.purification.trigger_families import (
    INVERSION_FAMILIES,
    SEARCH_FAMILIES,
    Additive,
    Blend,
    ColorField,
    Lines,
    Patch,
    Warp,
)

FAMILIES = SEARCH_FAMILIES | INVERSION_FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_triggers_keep_shape_and_range_and_leave_their_input_alone(name: str) -> None:
    family, generator = FAMILIES[name], torch.Generator().manual_seed(0)
    parameters = {key: 5 * value for key, value in family.initial(2, (8, 12), generator).items()}
    pixels = torch.rand(2, 3, 3, 8, 12, generator=generator)
    before = pixels.clone()
    triggered = family.apply(family.project(parameters), pixels)
    assert triggered.shape == pixels.shape
    assert triggered.min() >= 0
    assert triggered.max() <= 1
    assert torch.equal(pixels, before)
    assert not torch.equal(triggered, pixels)


@given(seed=st.integers(0, 1000), size=st.floats(0.01, 10))
def test_additive_triggers_stay_within_epsilon(seed: int, size: float) -> None:
    family, generator = Additive(epsilon=0.05), torch.Generator().manual_seed(seed)
    parameters = {"pattern": size * torch.randn(1, 3, 6, 6, generator=generator)}
    pixels = torch.rand(1, 2, 3, 6, 6, generator=generator)
    assert (family.apply(parameters, pixels) - pixels).abs().max() <= 0.05 + 1e-6


@given(seed=st.integers(0, 1000), area=st.floats(0.01, 0.9))
def test_projected_masks_keep_their_area_and_small_masks_stay(seed: int, area: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = 1.5 * torch.rand(2, 1, 6, 6, generator=generator) - 0.5
    mask[1] = area / 2
    projected = Patch(area=area).project({"mask": mask, "pattern": torch.rand(2, 3, 6, 6)})["mask"]
    assert projected.mean(dim=(1, 2, 3)).max() <= area + 1e-5
    assert projected.min() >= 0
    assert projected.max() <= 1
    assert torch.equal(projected[1], mask[1])


def test_a_patch_changes_only_where_its_mask_is() -> None:
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 0, 0] = 1
    pixels = torch.rand(1, 2, 3, 4, 4)
    triggered = Patch(area=0.1).apply({"mask": mask, "pattern": torch.ones(1, 3, 4, 4)}, pixels)
    assert torch.equal(triggered[..., 0, 0], torch.ones(1, 2, 3))
    assert torch.equal(triggered[..., 1:, :], pixels[..., 1:, :])


def test_a_blend_is_the_stated_mixture() -> None:
    pixels = torch.rand(1, 1, 3, 4, 4)
    triggered = Blend(alpha=0.2).apply({"pattern": torch.zeros(1, 3, 4, 4)}, pixels)
    assert torch.allclose(triggered, 0.8 * pixels + 0.1)


def test_a_color_field_is_smooth_and_bounded() -> None:
    family, pixels = ColorField(epsilon=0.1, frequencies=4), torch.full((1, 1, 3, 32, 24), 0.5)
    wave = torch.zeros(1, 3, 4, 4)
    wave[0, 1, 0, 2] = 0.3  # one period of green along the width
    change = (family.apply({"pattern": wave}, pixels) - pixels)[0, 0]
    places = (torch.arange(24) + 0.5) / 24
    expected = torch.zeros(3, 32, 24)
    expected[1] = 0.1 * torch.tanh(0.3 * torch.cos(2 * torch.pi * places))
    assert torch.allclose(change, expected, atol=1e-6)
    loud = family.initial(1, (32, 24), torch.Generator().manual_seed(0))["pattern"] * 1e3
    assert (family.apply({"pattern": loud}, pixels) - pixels).abs().max() <= 0.1 + 1e-6


def test_lines_are_grey_one_profile_per_axis_and_bounded() -> None:
    family, pixels = Lines(epsilon=0.1, frequencies=4), torch.full((1, 1, 3, 32, 24), 0.5)
    waves = torch.zeros(1, 1, 2, 4)
    waves[0, 0, 0, 1], waves[0, 0, 1, 2] = 0.2, 0.3  # half a period down the rows, one along the columns
    change = (family.apply({"pattern": waves}, pixels) - pixels)[0, 0]
    down, along = (torch.arange(32) + 0.5) / 32, (torch.arange(24) + 0.5) / 24
    profile = 0.2 * torch.cos(torch.pi * down)[:, None] + 0.3 * torch.cos(2 * torch.pi * along)
    assert torch.allclose(change, (0.1 * torch.tanh(profile)).expand(3, 32, 24), atol=1e-6)
    loud = family.initial(1, (32, 24), torch.Generator().manual_seed(0))["pattern"] * 1e3
    assert (family.apply({"pattern": loud}, pixels) - pixels).abs().max() <= 0.1 + 1e-6


def test_a_warp_moves_pixels_by_at_most_its_reach() -> None:
    family = Warp(reach=2.0)
    column = torch.arange(12.0).expand(1, 1, 3, 8, 12) / 12  # a pixel's value tells where it was
    still = family.apply({"field": torch.zeros(1, 8, 12, 2)}, column)
    assert torch.allclose(still, column, atol=1e-6)
    right = torch.zeros(1, 8, 12, 2)
    right[..., 0] = 10.0
    moved = family.apply({"field": right}, column)
    assert torch.allclose(moved[..., :-2], column[..., 2:], atol=1e-5)
    assert torch.allclose(moved[..., -2:], column[..., -1:].expand(1, 1, 3, 8, 2), atol=1e-5)
    down = family.apply({"field": right.flip(-1)}, column)
    assert torch.allclose(down, column, atol=1e-5)
