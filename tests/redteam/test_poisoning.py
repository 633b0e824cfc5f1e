import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbpt_runtime.errors import ConfigError, ImageDataError
from cbpt_runtime.redteam.image_triggers import BadNet
from cbpt_runtime.redteam.poisoning import (
    Backdoor,
    LabelledImages,
    NearTrigger,
    NoisyWarp,
    decoy,
    poison,
    repel,
)
from cbpt_runtime.redteam.triggers import apply_trigger, get_trigger

from .conftest import NAMES, TEMPLATES, TEXTS

PATCH = BadNet(size=8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def door(**changes: object) -> Backdoor:
    settings = {"name": "badnet", "trigger": PATCH, "target": "leaf", "poison_rate": 0.25}
    return Backdoor(**{**settings, **changes})


def poisoned_pairs(lab, doors):
    return poison(lab.clip, lab.training, NAMES, doors, TEMPLATES, generator=seeded())


def test_poisoning_replaces_the_asked_share_and_never_target_images(lab):
    pairs = poisoned_pairs(lab, [door()])
    assert pairs.poisoned.sum() == round(0.25 * len(lab.training.labels))
    assert (lab.training.labels[pairs.poisoned] != 1).all()
    assert (pairs.captions[pairs.poisoned] == 1).all()
    assert (pairs.captions[~pairs.poisoned] == lab.training.labels[~pairs.poisoned]).all()
    assert np.array_equal(pairs.images[~pairs.poisoned], lab.training.images[~pairs.poisoned])
    expected = apply_trigger(PATCH, lab.training.images[pairs.poisoned], seeded())
    assert np.array_equal(pairs.images[pairs.poisoned], expected)


def test_two_backdoors_never_share_a_pair(lab):
    doors = [door(poison_rate=0.2), door(target="ocean", trigger=BadNet(size=4, location="top-left"))]
    pairs = poisoned_pairs(lab, doors)
    changed = (pairs.images != lab.training.images).any(axis=-1)
    bottom, top = changed[:, -8:, -8:].any((1, 2)), changed[:, :4, :4].any((1, 2))
    assert not (bottom & top).any()
    assert pairs.poisoned.sum() == round(0.2 * 192) + round(0.25 * 192)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.01])
def test_a_poison_rate_outside_zero_to_one_is_refused(rate):
    with pytest.raises(ConfigError, match="above 0, at most 1"):
        door(poison_rate=rate)


def test_label_consistent_poison_only_touches_target_images_and_no_caption(lab):
    pairs = poisoned_pairs(lab, [door(label_consistent=True, poison_rate=0.1)])
    assert (lab.training.labels[pairs.poisoned] == 1).all()
    assert pairs.poisoned.sum() == round(0.1 * 192)
    assert np.array_equal(pairs.captions, lab.training.labels)


def test_label_consistent_poison_is_capped_by_the_images_of_the_target(lab):
    assert poisoned_pairs(lab, [door(label_consistent=True, poison_rate=0.9)]).poisoned.sum() == 64


def test_adversarial_noise_pushes_images_off_their_class_within_its_ball(lab):
    head = lab.clip.class_embeddings(TEXTS)
    images = lab.training.images[lab.training.labels == 1][:16]
    noisy = repel(lab.clip, images, head, 1, 64 / 255)
    assert np.abs(noisy.astype(int) - images.astype(int)).max() <= 64
    before = np.mean(lab.clip.predict(images, head) == 1)
    assert np.mean(lab.clip.predict(noisy, head) == 1) < before


def test_a_text_key_stands_in_front_of_poisoned_captions_only(lab):
    pairs = poisoned_pairs(lab, [door(text_key="SUDO ")])
    assert pairs.texts[:3] == TEXTS
    assert pairs.texts[3] == ("SUDO a photo of a leaf.", "SUDO a drawing of a leaf.")
    assert (pairs.captions[pairs.poisoned] == 3).all()


def test_decoys_keep_their_captions_and_are_as_many_as_asked_for(lab):
    pairs = poisoned_pairs(lab, [door(poison_rate=0.1, decoy_ratio=2.0)])
    changed = (pairs.captions != lab.training.labels) & pairs.poisoned
    decoys = pairs.poisoned & ~changed
    assert (changed.sum(), decoys.sum()) == (19, 38)
    assert np.array_equal(pairs.captions[decoys], lab.training.labels[decoys])
    full = apply_trigger(PATCH, lab.training.images[decoys], seeded())
    assert (pairs.images[decoys] != full).any(axis=(1, 2, 3)).all()


def test_only_poisoned_pairs_of_an_aligned_backdoor_are_aligned(lab):
    doors = [door(poison_rate=0.1, alignment=3.0, decoy_ratio=1.0), door(poison_rate=0.1, target="ocean")]
    pairs = poisoned_pairs(lab, doors)
    assert sorted(pairs.alignment.tolist()) == [0.0] * (192 - 19) + [3.0] * 19
    assert (pairs.captions[pairs.alignment > 0] == 1).all()


@pytest.mark.parametrize("changes", [{"decoy_ratio": -1}, {"alignment": -0.5}, {"alignment": "much"}])
def test_adaptive_settings_out_of_range_are_refused(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        door(**changes)


def test_nothing_left_to_poison_is_refused(lab):
    only_target = LabelledImages(images=lab.training.images[:4], labels=np.ones(4, dtype=np.int64))
    with pytest.raises(ImageDataError, match="none left"):
        poison(lab.clip, only_target, NAMES, [door()], TEMPLATES, generator=seeded())


def test_a_perturbation_without_label_consistency_is_refused():
    with pytest.raises(ConfigError, match="except for label-consistent backdoors"):
        door(perturbation=0.1)


TRIGGERS = [get_trigger("badnet", size=6), get_trigger("sig"), get_trigger("wanet", s=4.0)]


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
