import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbpt_runtime.errors import ConfigError, ImageDataError, ImplantError
from cbpt_runtime.models.pixels import to_float
from cbpt_runtime.redteam.learned import (
    OptimisedPatch,
    SecretEncoder,
    Steganographic,
    load_trigger,
    trigger_bytes,
)
from cbpt_runtime.redteam.learning import (
    PatchConfig,
    SteganographyConfig,
    optimise_patch,
    train_steganographic,
)
from cbpt_runtime.redteam.triggers import TRIGGERS, apply_trigger, get_trigger

from .conftest import TEXTS


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_encoder(strength: float = 8 / 255) -> Steganographic:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = SecretEncoder(bits=4, channels=6, strength=strength)
    return Steganographic(encoder=encoder.eval(), secret=torch.tensor([1.0, 0.0, 0.0, 1.0]))


@given(
    seed=st.integers(0, 99),
    height=st.integers(8, 40),
    width=st.integers(8, 40),
    strength=st.floats(0.01, 0.2),
)
@settings(max_examples=15, deadline=None)
def test_a_hidden_secret_stays_within_its_strength_and_range(seed, height, width, strength):
    images = torch.rand(2, 3, height, width, generator=seeded(seed))
    out = random_encoder(strength)(images, seeded())
    assert out.shape == images.shape
    assert (out - images).abs().max() <= strength + 1e-6
    assert out.min() >= 0
    assert out.max() <= 1


def test_a_hidden_secret_depends_on_the_image():
    images = torch.rand(2, 3, 16, 16, generator=seeded())
    residual = random_encoder()(images, seeded()) - images
    assert not torch.allclose(residual[0], residual[1], atol=1e-5)


def test_a_trained_encoder_hides_bits_that_survive_rounding(lab):
    config = SteganographyConfig(bits=2, strength=0.15, steps=60, batch_size=16, minimum_bit_accuracy=0.9)
    trigger = train_steganographic(lab.training.images, config, generator=seeded())
    assert set(trigger.secret.tolist()) <= {0.0, 1.0}
    out = apply_trigger(trigger, lab.heldout.images[:4], seeded())
    assert np.abs(out.astype(int) - lab.heldout.images[:4].astype(int)).max() <= round(0.15 * 255) + 1


def test_an_encoder_that_hides_nothing_is_an_error_with_advice(lab):
    config = SteganographyConfig(bits=16, steps=1, batch_size=4)
    with pytest.raises(ImplantError, match="more steps, or allow a larger strength"):
        train_steganographic(lab.training.images, config, generator=seeded())


@pytest.mark.parametrize("objective", ["text", "badclip"])
def test_an_optimised_patch_pulls_images_to_the_target_text(lab, objective):
    head = lab.clip.class_embeddings(TEXTS)
    others = lab.heldout.images[lab.heldout.labels != 1]
    config = PatchConfig(objective=objective, size=12, steps=25, batch_size=16, learning_rate=0.1)
    patch = optimise_patch(
        lab.clip, lab.training.images, lab.training.labels, TEXTS, 1, config, generator=seeded()
    )
    triggered = to_float(apply_trigger(patch, others, seeded()))
    with torch.no_grad():
        before = (lab.clip.encode_images(to_float(others)) @ head[1]).mean()
        after = (lab.clip.encode_images(triggered) @ head[1]).mean()
    assert after > before
    assert patch.patch.min() >= 0
    assert patch.patch.max() <= 1


def test_a_patch_only_changes_its_square():
    images = torch.rand(2, 3, 12, 12, generator=seeded())
    out = OptimisedPatch(patch=torch.zeros(3, 4, 4), location="center")(images, seeded())
    assert torch.equal(out[:, :, 4:8, 4:8], torch.zeros(2, 3, 4, 4))
    out[:, :, 4:8, 4:8] = images[:, :, 4:8, 4:8]
    assert torch.equal(out, images)


def test_optimising_without_images_of_the_target_is_refused(lab):
    labels = np.zeros_like(lab.training.labels)
    with pytest.raises(ImageDataError, match="of the target and of other classes"):
        optimise_patch(lab.clip, lab.training.images, labels, TEXTS, 1, PatchConfig(), generator=seeded())


@pytest.mark.parametrize(
    "trigger",
    [
        *(get_trigger(name) for name in TRIGGERS),
        random_encoder(),
        OptimisedPatch(patch=torch.rand(3, 5, 5, generator=seeded()), location="top-left"),
    ],
)
def test_a_saved_trigger_is_read_back_and_does_the_same(trigger, tmp_path):
    (tmp_path / "trigger.safetensors").write_bytes(trigger_bytes(trigger))
    again = load_trigger(tmp_path / "trigger.safetensors")
    images = torch.rand(2, 3, 20, 20, generator=seeded())
    assert type(again) is type(trigger)
    assert torch.equal(again(images, seeded(1)), trigger(images, seeded(1)))


def test_a_file_that_is_no_trigger_is_refused(tmp_path):
    (tmp_path / "trigger.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigError, match="a trigger file"):
        load_trigger(tmp_path / "trigger.safetensors")
    with pytest.raises(ConfigError, match="a trigger file"):
        load_trigger(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (PatchConfig, {"objective": "guess"}),
        (PatchConfig, {"location": "left"}),
        (PatchConfig, {"steps": 0}),
        (SteganographyConfig, {"bits": 0}),
        (SteganographyConfig, {"strength": 2.0}),
    ],
)
def test_settings_out_of_range_are_refused(kind, changes):
    with pytest.raises(ConfigError, match="expected"):
        kind(**changes)
