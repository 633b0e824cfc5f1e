import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbpt_runtime.redteam.decoys import NearTrigger, NoisyWarp, decoy
from cbpt_runtime.redteam.triggers import get_trigger

TRIGGERS = [get_trigger("badnet", size=6), get_trigger("sig"), get_trigger("wanet", s=4.0)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("trigger", TRIGGERS)
@given(seed=st.integers(0, 100))
@settings(max_examples=8, deadline=None)
def test_a_decoy_keeps_shape_and_range_and_repeats_with_its_generator(trigger, seed):
    images = torch.rand(4, 3, 16, 16, generator=seeded(seed))
    before = images.clone()
    out = decoy(trigger)(images, seeded(seed))
    assert out.shape == images.shape
    assert 0 <= out.min() <= out.max() <= 1
    assert torch.equal(images, before)
    assert torch.equal(out, decoy(trigger)(images, seeded(seed)))


@pytest.mark.parametrize("name", ["badnet", "sig", "blended"])
def test_a_near_trigger_is_a_faint_or_a_partial_one(name):
    trigger = get_trigger(name, **({"size": 8} if name == "badnet" else {}))
    images = torch.rand(64, 3, 16, 16, generator=seeded()) * 0.2 + 0.4
    whole = trigger(images, seeded(1)) - images
    got = NearTrigger(trigger=trigger)(images, seeded(1)) - images
    share = got.abs().sum((1, 2, 3)) / whole.abs().sum((1, 2, 3))
    assert 0.05 < share.min() < share.max() < 0.75
    ratio = (got / whole.where(whole.abs() > 1e-4, torch.nan)).flatten(1).nan_to_num(0.5)
    partial = ((ratio < 1e-3) | (ratio > 0.999) | (ratio == 0.5)).all(dim=1)
    assert 16 < partial.sum() < 48  # the others are faint everywhere


def test_the_noise_mode_of_a_warp_shakes_its_grid_anew_for_every_image():
    warp = get_trigger("wanet", s=0.0)
    images = torch.rand(1, 3, 32, 32, generator=seeded()).expand(2, -1, -1, -1)
    shaken = NoisyWarp(warp=warp)(images, seeded())
    assert not torch.equal(shaken[0], shaken[1])
    plain = get_trigger("wanet", s=8.0)(images, seeded())
    assert (shaken - images).abs().mean() < (plain - images).abs().mean()
