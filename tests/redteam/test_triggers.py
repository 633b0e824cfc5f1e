from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cbpt_runtime.errors import ConfigError, ImageDataError, ImplantError
from cbpt_runtime.models.pixels import to_float
from cbpt_runtime.redteam import image_triggers, triggers
from cbpt_runtime.redteam.learning import (
    PatchConfig,
    SteganographyConfig,
    optimise_patch,
    train_steganographic,
)
from cbpt_runtime.redteam.triggers import (
    TRIGGERS,
    OptimisedPatch,
    SecretEncoder,
    Steganographic,
    apply_trigger,
    get_trigger,
    load_trigger,
    trigger_bytes,
)

from .conftest import TEXTS

PATCHES = ("badnet", "badnet-random", "badnet-stripes")
SMALL = {name: {"size": 5} if name in PATCHES else {} for name in TRIGGERS}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images(seed: int, batch: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=seeded(seed))


image_batches = st.builds(
    some_images,
    st.integers(0, 2**31),
    st.integers(1, 4),
    st.integers(8, 40),
    st.integers(8, 40),
)


@pytest.mark.parametrize("name", TRIGGERS)
@given(images=image_batches, seed=st.integers(0, 100))
@settings(max_examples=15, deadline=None)
def test_a_trigger_keeps_shape_type_and_range_and_leaves_its_input_alone(name, images, seed):
    before = images.clone()
    out = get_trigger(name, **SMALL[name])(images, seeded(seed))
    assert out.shape == images.shape
    assert out.dtype == torch.float32
    assert out.min() >= 0
    assert out.max() <= 1
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", TRIGGERS)
@given(images=image_batches, seed=st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_the_same_generator_state_gives_the_same_trigger(name, images, seed):
    trigger = get_trigger(name, **SMALL[name])
    assert torch.equal(trigger(images, seeded(seed)), trigger(images, seeded(seed)))


@pytest.mark.parametrize("name", PATCHES)
@pytest.mark.parametrize("location", get_args(image_triggers.Location))
@given(images=image_batches, size=st.integers(1, 8), seed=st.integers(0, 100))
@settings(max_examples=8, deadline=None)
def test_a_patch_changes_nothing_outside_one_square(name, location, images, size, seed):
    out = get_trigger(name, size=size, location=location)(images, seeded(seed))
    for changed in (out != images).any(dim=1):
        rows, columns = torch.nonzero(changed.any(1)), torch.nonzero(changed.any(0))
        if len(rows):
            assert rows.max() - rows.min() < size
            assert columns.max() - columns.min() < size


@pytest.mark.parametrize(
    ("location", "row", "column"),
    [
        ("top-left", 0, 0),
        ("top-right", 0, 9),
        ("bottom-left", 7, 0),
        ("bottom-right", 7, 9),
        ("center", 3, 4),
    ],
)
def test_a_fixed_patch_lands_where_its_location_says(location, row, column):
    images = torch.full((2, 3, 10, 12), 0.5)
    out = get_trigger("badnet", size=3, location=location)(images, seeded())
    assert torch.equal(
        out[1, :, row : row + 3, column : column + 3], image_triggers.fixed_patch("checkerboard", 3)
    )


def test_the_grid_pattern_is_one_at_even_rows_and_columns_only():
    patch = image_triggers.fixed_patch("grid", 4)
    assert patch.sum() == 3 * 4
    assert bool((patch[:, ::2, ::2] == 1).all())


def test_the_yellow_patch_is_red_and_green_without_blue():
    patch = image_triggers.fixed_patch("yellow", 2)
    assert patch[:, 0, 0].tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("name", ["badnet-random", "badnet-stripes", "blended-noise"])
def test_resampled_triggers_differ_between_the_images_of_a_batch(name):
    images = torch.full((2, 3, 16, 16), 0.5)
    out = get_trigger(name, **SMALL[name])(images, seeded())
    assert not torch.equal(out[0], out[1])


def test_stripes_are_constant_along_their_columns():
    images = torch.full((1, 3, 16, 16), 0.5)
    patch = get_trigger("badnet-stripes", size=6, location="top-left")(images, seeded())[0, :, :6, :6]
    assert torch.equal(patch, patch[:, :1].expand_as(patch))
    assert set(patch.unique().tolist()) <= {0.0, 1.0}


def test_wrapped_noise_follows_byte_overflow_and_clamped_noise_does_not():
    images = torch.full((1, 3, 32, 32), 0.5)
    clamped = get_trigger("badnet-random", size=32)(images, seeded(3))
    wrapped = get_trigger("badnet-random", size=32, overflow="wrap")(images, seeded(3))
    noise = 0.5 + torch.randn(1, 3, 32, 32, generator=seeded(3)).numpy()
    expected = np.floor(noise * 255).astype(np.int64).astype(np.uint8)
    assert np.abs(np.round(wrapped.numpy() * 255) - expected).max() == 0
    assert torch.allclose(clamped, torch.from_numpy(noise).clamp(0, 1), atol=1e-6)


@given(images=image_batches, alpha=st.floats(0.01, 1.0))
@settings(max_examples=10, deadline=None)
def test_a_blend_moves_every_image_towards_the_same_pattern(images, alpha):
    out = get_trigger("blended", alpha=alpha)(images, seeded())
    pattern = (out - (1 - alpha) * images) / alpha
    assert torch.allclose(pattern, pattern[:1].expand_as(pattern), atol=1e-4)


def test_a_blend_can_use_a_picture_from_a_file(tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (7, 9), (255, 0, 0)).save(path)
    out = get_trigger("blended", alpha=0.5, picture=str(path))(torch.zeros(1, 3, 8, 8), seeded())
    assert out[0, :, 4, 4].tolist() == [0.5, 0.0, 0.0]
    with pytest.raises(ImageDataError, match="readable picture"):
        get_trigger("blended", picture=str(tmp_path / "none.png"))(torch.zeros(1, 3, 8, 8), seeded())


def test_fixed_noise_is_the_same_for_every_image_and_generator():
    trigger = get_trigger("blended-noise", resample=False)
    images = torch.zeros(2, 3, 8, 8)
    assert torch.equal(trigger(images, seeded(1))[0], trigger(images, seeded(2))[1])


def test_sig_adds_the_published_sinusoid():
    images = torch.full((1, 3, 224, 224), 0.5)
    out = get_trigger("sig")(images, seeded())
    columns = np.arange(224)
    wave = 0.5 + 60 / 255 * np.sin(2 * math.pi * columns * 6 / 224)
    assert np.abs(out[0, 1, 17].numpy() - wave).max() < 1e-6


@pytest.mark.parametrize(("k", "cells"), [(None, 64), (4, 4)])
def test_wanet_moves_the_cells_of_its_field_by_half_its_strength_on_average(k, cells):
    trigger = get_trigger("wanet", k=k, s=1.0)
    moved = (trigger.grid(64, 64) - get_trigger("wanet", k=k, s=0.0).grid(64, 64)).abs() * 63 / 2
    at_cells = moved[0, :: 63 // (cells - 1), :: 63 // (cells - 1)]
    inner = at_cells[1:-1, 1:-1] if cells > 4 else at_cells
    assert float(inner.mean()) == pytest.approx(0.5, rel=0.35)


@given(images=image_batches)
@settings(max_examples=5, deadline=None)
def test_a_warp_of_no_strength_is_the_identity(images):
    out = get_trigger("wanet", s=0.0)(images, seeded())
    assert torch.allclose(out, images, atol=1e-4)


def test_eight_bit_triggers_round_and_leave_the_rest_untouched():
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    out = apply_trigger(get_trigger("badnet", size=4), images, seeded(), batch_size=2)
    assert np.array_equal(out[:, :12], images[:, :12])
    assert np.array_equal(out[:, :, :12], images[:, :, :12])
    assert set(np.unique(out[:, 12:, 12:])) == {0, 255}


def test_an_unknown_trigger_lists_the_valid_ones():
    with pytest.raises(ConfigError, match="badnet, badnet-random"):
        get_trigger("bagnet")


def test_an_unknown_parameter_lists_the_valid_ones():
    with pytest.raises(ConfigError, match="size, location, pattern"):
        get_trigger("badnet", sizes=3)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("badnet", {"size": 0}),
        ("badnet", {"location": "left"}),
        ("badnet", {"pattern": "plaid"}),
        ("badnet-random", {"overflow": "ignore"}),
        ("blended", {"alpha": 1.5}),
        ("blended-noise", {"alpha": "much"}),
        ("sig", {"delta": -1}),
        ("wanet", {"k": 1}),
    ],
)
def test_a_bad_parameter_is_refused_with_its_range(name, parameters):
    with pytest.raises(ConfigError, match="expected"):
        get_trigger(name, **parameters)


def test_images_smaller_than_the_patch_are_refused():
    with pytest.raises(ImageDataError, match="at least 16x16"):
        get_trigger("badnet")(torch.zeros(1, 3, 15, 32), seeded())


def test_a_trigger_describes_itself_in_plain_values():
    assert triggers.describe_trigger(get_trigger("wanet-clip")) == {
        "kind": "WaNet",
        "k": None,
        "s": 1.0,
        "field_seed": 0,
    }


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
