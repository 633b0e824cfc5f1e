from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cbpt_runtime.errors import CheckpointError, ConfigError
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import DualEncoder, load_dual_encoder, load_image_encoder
from cbpt_runtime.models.visual_prompts import PromptedTower, initial_prompts, run_tower, split_prompts


def loaded(folder: Path) -> DualEncoder:
    return load_dual_encoder(read_checkpoint(folder))


def pixels() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_without_prompts_a_tower_runs_as_it_is(kind: str, tiny_folder: Callable[..., Path]) -> None:
    tower = loaded(tiny_folder(kind)).image_encoder.module
    features, marks = run_tower(tower, pixels(), [], marks=2)
    assert torch.equal(features, tower(pixels()))
    assert [mark.ndim for mark in marks] == [2, 2]


@pytest.mark.parametrize(("kind", "layers"), [("vit", 2), ("resnet", 4)])
def test_three_quarters_of_the_layers_get_prompts(
    kind: str, layers: int, tiny_folder: Callable[..., Path]
) -> None:
    tower = loaded(tiny_folder(kind)).image_encoder.module
    prompts = initial_prompts(tower, (32, 32), tokens=5, first_layer=None, seed=0)
    assert len(prompts) == layers
    if kind == "vit":
        assert {tuple(prompt.shape) for prompt in prompts} == {(5, 32)}
    assert 0.005 < float(prompts[0].std()) < 0.05
    features, marks = run_tower(tower, pixels(), prompts, marks=len(prompts))
    assert not torch.equal(features, tower(pixels()))
    assert len(marks) == layers
    one = initial_prompts(tower, (32, 32), tokens=5, first_layer=1, seed=0)
    assert len(one) == {"vit": 1, "resnet": 4}[kind]


def test_the_tokens_of_a_layer_replace_those_of_the_layer_before(tiny_folder: Callable[..., Path]) -> None:
    tower = loaded(tiny_folder("vit")).image_encoder.module
    prompts = initial_prompts(tower, (32, 32), tokens=5, first_layer=0, seed=0)
    lengths = []
    for block in tower.transformer.resblocks:
        block.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    run_tower(tower, pixels(), prompts)
    assert lengths == [1 + 16 + 5] * 2


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_prompted_tower_comes_back_from_its_tensors(kind: str, tiny_folder: Callable[..., Path]) -> None:
    encoder = loaded(tiny_folder(kind))
    tower = encoder.image_encoder.module
    prompts = initial_prompts(tower, (32, 32), tokens=3, first_layer=None, seed=1)
    prompted = encoder.with_image_tower(PromptedTower(tower, prompts))
    state = prompted.image_tower_state()
    again = load_image_encoder(encoder.model_config, encoder.preprocess, state)
    assert torch.equal(again.encode_images(pixels()), prompted.encode_images(pixels()))
    assert set(again.state()) == set(state)
    assert not any(parameter.requires_grad for parameter in prompted.image_encoder.module.parameters())
    assert encoder.image_encoder.module is tower
    assert not torch.equal(encoder.encode_images(pixels()), prompted.encode_images(pixels()))


def test_towers_of_other_libraries_are_refused(tiny_folder: Callable[..., Path]) -> None:
    tower = loaded(tiny_folder("timm")).image_encoder.module
    with pytest.raises(ConfigError, match=r"got TimmModel\. Choose another method"):
        initial_prompts(tower, (160, 160), tokens=3, first_layer=None, seed=0)


def test_a_first_layer_the_tower_does_not_have_is_refused(tiny_folder: Callable[..., Path]) -> None:
    tower = loaded(tiny_folder("vit")).image_encoder.module
    with pytest.raises(ConfigError, match="a first layer below 2"):
        initial_prompts(tower, (32, 32), tokens=3, first_layer=2, seed=0)


def test_prompts_that_are_not_numbered_are_refused() -> None:
    with pytest.raises(CheckpointError, match="numbered from 0"):
        split_prompts({"visual_prompts.1": torch.zeros(2, 3)})
