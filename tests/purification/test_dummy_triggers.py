from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cbpt_runtime.bundle import BundleContent, write_bundle
from cbpt_runtime.errors import BundleError
from cbpt_runtime.purification.dummy_triggers import (
    DummyTrigger,
    from_tensors,
    paint_dummy_triggers,
    to_tensors,
)
from cbpt_runtime.purification.trigger_families import INVERSION_FAMILIES

MakeContent = Callable[..., BundleContent]
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)


def test_dummy_triggers_are_painted_as_their_family_does(tmp_path: Path, make_content: MakeContent) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = {name: family.initial(1, (32, 32), generator) for name, family in INVERSION_FAMILIES.items()}
    triggers = {
        f"{name}.2.{key}": value[0].numpy()
        for name, values in parameters.items()
        for key, value in values.items()
    }
    bundle = write_bundle(tmp_path / "bundle", content=make_content(triggers=triggers))
    painted = paint_dummy_triggers(bundle, IMAGES)
    assert [(dummy.family, dummy.target) for dummy in painted] == [(name, 2) for name in INVERSION_FAMILIES]
    pixels = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)[None] / 255
    for (name, family), dummy in zip(INVERSION_FAMILIES.items(), painted, strict=True):
        expected = family.apply(parameters[name], pixels)[0].permute(0, 2, 3, 1).numpy() * 255
        np.testing.assert_allclose(dummy.images, expected, atol=0.51)


def test_triggers_of_an_unknown_family_are_refused(tmp_path: Path, make_content: MakeContent) -> None:
    content = make_content(triggers={"warp.2.field": np.zeros((2, 8, 8), np.float32)})
    with pytest.raises(BundleError, match=r"warp\.2\.field"):
        paint_dummy_triggers(write_bundle(tmp_path / "bundle", content=content), IMAGES)


def test_a_clean_bundle_has_nothing_to_paint(tmp_path: Path, make_content: MakeContent) -> None:
    content = make_content(verdict="clean", suspects=(), triggers={})
    assert paint_dummy_triggers(write_bundle(tmp_path / "bundle", content=content), IMAGES) == []


def test_strength_goes_from_the_clean_to_the_triggered_image() -> None:
    mask = torch.zeros(1, 8, 8)
    mask[:, 0, 0] = 1.0
    trigger = DummyTrigger(
        family="patch", target=2, parameters={"mask": mask, "pattern": torch.ones(3, 8, 8)}
    )
    dark = torch.zeros(1, 3, 8, 8)
    for strength in (0.0, 0.25, 1.0):
        assert trigger.apply(dark, strength=strength)[0, :, 0, 0].tolist() == [strength] * 3
        assert trigger.apply(dark, strength=strength)[0, :, 1:].abs().sum() == 0


def test_dummy_triggers_survive_being_stored() -> None:
    one = DummyTrigger(
        family="patch", target=11, parameters={"mask": torch.ones(2), "pattern": torch.ones(3)}
    )
    two = DummyTrigger(family="blend", target=2, parameters={"pattern": torch.zeros(1)})
    again = from_tensors(to_tensors([one, two]))
    assert [(trigger.family, trigger.target) for trigger in again] == [("blend", 2), ("patch", 11)]
    assert again[1].parameters.keys() == one.parameters.keys()
    assert torch.equal(again[1].parameters["mask"], torch.ones(2))
