from __future__ import annotations

from typing import Any

import pytest
import torch

from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models.architecture import build_model, load_image_tower, load_model
from cbpt_runtime.models.config import check_model_config

KINDS = ("vit", "resnet", "custom-text", "timm", "siglip", "timm with computed tensors")


@pytest.fixture(params=KINDS)
def config(request: pytest.FixtureRequest, tiny_configs: dict[str, Any]) -> dict[str, Any]:
    config = tiny_configs[request.param.split(" ")[0]]
    if request.param.endswith("computed tensors"):
        config = {**config, "vision_cfg": {**config["vision_cfg"], "timm_model_name": "test_vit_relpos"}}
    return check_model_config(config)


def outputs(model: Any, config: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    size = config["vision_cfg"]["image_size"]
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[49406, 320, 1929, 49407, *([0] * 12)]])
    with torch.no_grad():
        return model.encode_image(images), model.encode_text(tokens)


def test_building_on_meta_takes_no_memory_and_knows_all_shapes(config: dict[str, Any]) -> None:
    on_cpu, on_meta = (build_model(config, device=device).state_dict() for device in ("cpu", "meta"))
    assert all(tensor.is_meta for tensor in on_meta.values())
    assert {name: tensor.shape for name, tensor in on_meta.items()} == {
        name: tensor.shape for name, tensor in on_cpu.items()
    }


def test_a_loaded_model_computes_what_the_original_computes(config: dict[str, Any]) -> None:
    model = build_model(config).eval()
    loaded = load_model(config, model.state_dict()).eval()
    for mine, theirs in zip(outputs(loaded, config), outputs(model, config), strict=True):
        torch.testing.assert_close(mine, theirs, atol=0, rtol=0)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))


def test_a_loaded_image_tower_computes_what_the_original_computes(config: dict[str, Any]) -> None:
    model: Any = build_model(config).eval()
    tower = load_image_tower(config, model.visual.state_dict()).eval()
    size = config["vision_cfg"]["image_size"]
    with torch.no_grad():
        images = torch.rand(2, 3, size, size)
        torch.testing.assert_close(tower(images), model.visual(images), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_become_float32(config: dict[str, Any], dtype: torch.dtype) -> None:
    state = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in build_model(config).state_dict().items()
    }
    loaded = load_model(config, state)
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.float32}
    found = loaded.state_dict()
    assert all(torch.equal(found[name], value.float()) for name, value in state.items() if value.ndim > 1)


def test_weights_that_do_not_fit_are_refused(config: dict[str, Any]) -> None:
    state = build_model(config).state_dict()
    del state["logit_scale"]
    with pytest.raises(
        CheckpointError, match=r"weights that fit their model configuration; got .*logit_scale"
    ):
        load_model(config, state)


def test_a_configuration_no_model_can_be_built_from_is_refused(tiny_configs: dict[str, Any]) -> None:
    config = check_model_config(tiny_configs["vit"])
    config["text_cfg"]["heads"] = 3
    with pytest.raises(CheckpointError, match=r"open_clip can build a model from; got AssertionError"):
        build_model(config)
