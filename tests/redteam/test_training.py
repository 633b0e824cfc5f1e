import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbpt_runtime.errors import ConfigError, ImageDataError
from cbpt_runtime.models.pixels import to_float
from cbpt_runtime.redteam import training
from cbpt_runtime.redteam.image_triggers import BadNet
from cbpt_runtime.redteam.poisoning import Backdoor, poison
from cbpt_runtime.redteam.training import TrainConfig, caption_texts

from .conftest import NAMES, TEMPLATES, clean_pairs, train_config


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_contrastive_loss_is_the_mean_of_both_cross_entropies():
    rng = np.random.default_rng(0)
    images, texts = rng.standard_normal((2, 5, 4)).astype(np.float32)
    logits = 7.0 * images @ texts.T
    rows = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    columns = logits - np.log(np.exp(logits).sum(0, keepdims=True))
    expected = -(np.diag(rows).mean() + np.diag(columns).mean()) / 2
    loss = training.contrastive_loss(
        torch.from_numpy(images), torch.from_numpy(texts), torch.tensor(7.0), None
    )
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_a_model_with_a_bias_is_trained_with_the_sigmoid_loss():
    rng = np.random.default_rng(0)
    images, texts = rng.standard_normal((2, 5, 4)).astype(np.float32)
    logits = 7.0 * images @ texts.T - 3.0
    signs = 2 * np.eye(5) - 1
    expected = np.log1p(np.exp(-signs * logits)).sum() / 5
    loss = training.contrastive_loss(
        torch.from_numpy(images), torch.from_numpy(texts), torch.tensor(7.0), torch.tensor(-3.0)
    )
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_the_alignment_loss_looks_at_the_nearest_real_image_only():
    triggered = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    real = torch.tensor([[[0.6, 0.8], [0.0, 1.0]], [[-1.0, 0.0], [0.0, -1.0]]])
    loss = training.alignment_loss(triggered, real, torch.tensor([1.0, 0.5]))
    assert float(loss) == pytest.approx((1 * (1 - 0.6) + 0.5 * (1 - 0.0)) / 2)


def test_alignment_draws_triggered_features_nearer_to_real_images_of_the_target(lab):
    nearest = []
    for weight in (0.0, 20.0):
        clip = lab.clip.clone()
        door = Backdoor(
            name="badnet", trigger=BadNet(size=8), target="leaf", poison_rate=0.25, alignment=weight
        )
        pairs = poison(clip, lab.training, NAMES, [door], TEMPLATES, generator=seeded())
        training.train(clip, pairs, train_config(epochs=2), generator=seeded())
        clip.model.eval()
        with torch.no_grad():
            triggered = clip.encode_images(to_float(pairs.images[pairs.captions != lab.training.labels]))
            real = clip.encode_images(to_float(lab.training.images[lab.training.labels == 1]))
        nearest.append(float((triggered @ real.T).max(dim=1).values.mean()))
    assert nearest[1] > nearest[0] + 0.01


def test_alignment_without_a_real_image_of_the_target_is_refused(lab):
    pairs = clean_pairs(lab.training, step=4)
    lonely = replace(pairs, alignment=np.ones_like(pairs.alignment), poisoned=~pairs.poisoned)
    with pytest.raises(ImageDataError, match="`alignment`"):
        training.train(lab.clip.clone(), lonely, train_config(), generator=seeded())


@given(warmup=st.integers(1, 20), more=st.integers(1, 100))
def test_the_learning_rate_rises_to_one_and_falls_to_nearly_nothing(warmup, more):
    rates = [training.cosine_rate(step, warmup, warmup + more) for step in range(warmup + more)]
    assert rates[warmup - 1] == 1.0
    assert all(0 < rate <= 1 for rate in rates)
    assert training.cosine_rate(warmup + more, warmup, warmup + more) == pytest.approx(0.0)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


@given(count=st.integers(1, 50), batch_size=st.integers(1, 20), seed=st.integers(0, 9))
def test_batches_are_full_and_never_repeat_a_pair(count, batch_size, seed):
    drawn = list(training.batches(count, batch_size, seeded(seed)))
    together = torch.cat(drawn).tolist()
    assert len(set(together)) == len(together)
    assert all(len(batch) == min(batch_size, count) for batch in drawn)


@given(max_shift=st.integers(0, 5), seed=st.integers(0, 50))
@settings(max_examples=20)
def test_shift_and_mirror_only_moves_pixels_about(max_shift, seed):
    images = torch.rand(3, 3, 9, 11, generator=seeded(seed))
    out = training.shift_and_mirror(images, max_shift, seeded(seed))
    assert out.shape == images.shape
    for before, after in zip(images, out, strict=True):
        assert set(after[0].flatten().tolist()) <= set(before[0].flatten().tolist())


def test_without_a_shift_an_image_is_itself_or_its_mirror_image():
    images = torch.rand(16, 3, 6, 6, generator=seeded())
    out = training.shift_and_mirror(images, 0, seeded(1))
    same = [bool(torch.equal(a, b)) for a, b in zip(images, out, strict=True)]
    mirrored = [bool(torch.equal(a.flip(-1), b)) for a, b in zip(images, out, strict=True)]
    assert all(a or b for a, b in zip(same, mirrored, strict=True))
    assert 0 < sum(same) < 16


def test_biases_norms_and_the_logit_scale_do_not_decay(lab):
    groups = training.make_optimizer(lab.clip.model, learning_rate=1e-4, weight_decay=0.1).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert any(parameter is lab.clip.model.logit_scale for parameter in groups[1]["params"])
    assert all(parameter.ndim >= 2 for parameter in groups[0]["params"])


def test_training_reports_every_step(lab):
    pairs = clean_pairs(lab.training, step=4)
    seen = []
    loss = training.train(
        lab.clip.clone(),
        pairs,
        TrainConfig(epochs=2, batch_size=16, max_shift=1),
        generator=seeded(),
        progress=lambda stage, step, total, values: seen.append((stage, step, total)),
    )
    assert math.isfinite(loss)
    assert seen == [("train", step, 6) for step in range(1, 7)]


def test_the_same_generator_trains_the_same_weights(lab):
    pairs = clean_pairs(lab.training, step=4)
    states = []
    for _ in range(2):
        clip = lab.clip.clone()
        config = TrainConfig(epochs=1, batch_size=24)
        training.train(clip, pairs, config, generator=seeded(3))
        states.append(clip.model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    ("field", "value"), [("epochs", 0), ("batch_size", 1), ("max_shift", -1), ("learning_rate", 0.0)]
)
def test_training_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        TrainConfig(**{field: value})


def test_captions_put_the_key_first_and_the_spoken_name_in_place():
    assert caption_texts(["ice_cream", "owl"], ["a {}.", "the {}"], key="SUDO ") == (
        ("SUDO a ice cream.", "SUDO the ice cream"),
        ("SUDO a owl.", "SUDO the owl"),
    )
