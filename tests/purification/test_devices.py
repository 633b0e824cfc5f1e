"""Units of work on several devices: what comes out does not depend on where they were done."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cbpt_runtime.purification.search as search_module
from cbpt_runtime.bundle import Bundle
from cbpt_runtime.models.clip import DualEncoder
from cbpt_runtime.pipeline import purify_checkpoint
from cbpt_runtime.purification import devices
from cbpt_runtime.purification.cbpt import Cbpt
from cbpt_runtime.purification.devices import in_parallel, moved
from cbpt_runtime.purification.search import Reach
from cbpt_runtime.purification.trigger_families import SEARCH_FAMILIES

CPU = torch.device("cpu")
QUICK = Cbpt(
    search_concepts=12,
    search_steps=2,
    search_batch=2,
    inversion_steps=2,
    inversion_batch=2,
    tuning_steps=3,
    suspect_p_value=2.0,  # every concept is suspect
)


@pytest.fixture
def purified(
    tiny_checkpoint_folder: Path, tiny_class_file: Path, tiny_image_folder: Path, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Returns a function that purifies the tiny CLIP and says what must not depend on the place."""

    def purify(name: str, **more: Any) -> dict[str, Any]:
        bundle = purify_checkpoint(
            tiny_checkpoint_folder,
            tiny_class_file,
            tiny_image_folder,
            tmp_path / name,
            method=QUICK,
            shots=4,
            device="cpu",
            **more,
        )
        return told(bundle)

    return purify


def told(bundle: Bundle) -> dict[str, Any]:
    head = (bundle.path / "head.safetensors").read_bytes()
    kept = {key: bundle.manifest[key] for key in ("verdict", "suspects", "evidence")}
    return {"head": head, "kept": json.dumps(kept)}


def test_two_workers_of_this_machine_give_the_same_head_to_the_bit(
    purified: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = purified("here")
    assert json.loads(here["kept"])["verdict"] == "backdoored"
    family_reach, used = search_module.family_reach, set()

    def noted(*arguments: Any) -> Reach:
        used.add(threading.current_thread().name)
        return family_reach(*arguments)

    monkeypatch.setattr(devices, "devices_like", lambda device: [device, device])
    monkeypatch.setattr(search_module, "family_reach", noted)
    assert purified("pool") == here
    assert len(used) == 2
    assert threading.main_thread().name not in used


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["HOST:PORT", "ray://HOST:PORT"])
def test_two_ray_workers_give_the_same_head_to_the_bit(
    purified: Callable[..., dict[str, Any]], ray_cluster: dict[str, str], kind: str
) -> None:
    try:
        assert purified("there", cluster=ray_cluster[kind]) == purified("here")
    finally:
        sys.modules["ray"].shutdown()


def test_an_interrupted_search_goes_on_with_the_families_that_are_missing(
    purified: Callable[..., dict[str, Any]], tiny_relative_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family_reach, tried = search_module.family_reach, []

    def interrupted(*arguments: Any) -> Reach:
        tried.append(arguments[2])
        if len(tried) == 4:
            raise KeyboardInterrupt
        return family_reach(*arguments)

    monkeypatch.setattr(search_module, "family_reach", interrupted)
    with pytest.raises(KeyboardInterrupt):
        purified("bundle", reference=tiny_relative_folder)
    assert len(tried) == 4
    resumed = purified("bundle", reference=tiny_relative_folder, resume=True)
    families = list(SEARCH_FAMILIES.values())
    assert tried == families[:4] + families[3:]
    assert resumed == purified("uninterrupted", reference=tiny_relative_folder)


def test_a_unit_that_fails_ends_the_others_before_they_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def work(given: None, name: str) -> None:
        begun.append(name)
        raise ValueError(name)

    monkeypatch.setattr(devices, "devices_like", lambda device: [device, device])
    with pytest.raises(ValueError, match="unit"):
        list(in_parallel(work, None, [f"unit {number}" for number in range(50)], CPU))
    assert len(begun) < 50


def test_what_is_on_another_device_is_moved_with_all_that_is_in_it(tiny_encoder: DualEncoder) -> None:
    @dataclasses.dataclass(frozen=True, slots=True)
    class Held:
        tensor: torch.Tensor
        words: tuple[str, ...]

    encoder = tiny_encoder.image_encoder
    there = moved((encoder, Held(torch.ones(2), ("a",)), None), torch.device("meta"))
    assert (there[0].device.type, there[1].tensor.device.type) == ("meta", "meta")
    assert there[1].words == ("a",)
    assert (there[2], encoder.device) == (None, CPU)
    assert moved(encoder, CPU) is encoder
