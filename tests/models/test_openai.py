"""Archives as OpenAI published them: TorchScript programs with the weights and three settings in them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import load_dual_encoder
from cbpt_runtime.models.inspection import inspect_checkpoint

pytestmark = pytest.mark.usefixtures("no_network")
SETTINGS = {"input_resolution": 32, "context_length": 16, "vocab_size": 49408}
MARKS = {name: torch.tensor(value) for name, value in SETTINGS.items()}


class Nothing(nn.Module):
    """Holds weights under their names; as a program it returns its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def as_module(tensors: dict[str, Tensor]) -> nn.Module:
    """A module whose parts carry the names of the weights."""
    root = Nothing()
    for name, value in tensors.items():
        *path, last = name.split(".")
        part: nn.Module = root
        for step in path:
            if not hasattr(part, step):
                part.add_module(step, Nothing())
            part = getattr(part, step)
        part.register_buffer(last, value)
    return root


@pytest.fixture(params=["vit", "resnet"])
def state(request: pytest.FixtureRequest, tiny_folder: Callable[..., Path]) -> dict[str, Tensor]:
    return load_file(tiny_folder(request.param) / "open_clip_model.safetensors")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def archive(state: dict[str, Tensor], path: Path) -> Path:
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    program = torch.jit.trace(as_module({**half, **MARKS}), torch.ones(1))  # type: ignore[no-untyped-call]
    torch.jit.save(program, path)
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_archive_gives_its_weights_and_its_shapes_the_architecture(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    checkpoint = read_checkpoint(archive(state, tmp_path / "RN50.pt"))
    assert checkpoint.format == "torchscript"
    assert checkpoint.anomalies == ()
    assert checkpoint.notes == (
        "a TorchScript program: only its weights were read, its code was not looked at",
    )
    assert checkpoint.state_dict.keys() == state.keys()
    assert all(
        torch.equal(checkpoint.state_dict[key], value.half()) for key, value in state.items() if value.ndim
    )
    assert checkpoint.model_config["quick_gelu"] is True
    assert checkpoint.preprocess.image_size == (32, 32)
    encoder = load_dual_encoder(checkpoint)
    assert encoder.encode_texts(["a dog"]).shape == (1, 16)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_inspecting_an_archive_needs_no_model(tmp_path: Path, state: dict[str, Tensor]) -> None:
    answer = inspect_checkpoint(archive(state, tmp_path / "RN50.pt"))
    assert answer["architecture"]["model"] == "CLIP"
    assert answer["anomalies"] == []


def test_the_architectures_of_openai_are_told_from_their_shapes() -> None:
    from cbpt_runtime.models.architecture import build_model
    from cbpt_runtime.models.checkpoint import openai_settings
    from cbpt_runtime.models.config import check_model_config

    for name in ("RN50", "RN101", "RN50x4", "ViT-B-32", "ViT-L-14-336"):
        import open_clip

        config = check_model_config(open_clip.get_model_config(name))
        published = build_model(config, device="meta").state_dict()
        told = check_model_config(openai_settings(published)["model_cfg"])
        shapes = {key: value.shape for key, value in build_model(told, device="meta").state_dict().items()}
        assert shapes == {key: value.shape for key, value in published.items()}


def config_file(folder: Path, config: dict[str, Any], **more: Any) -> Path:
    import json

    path = folder / "config.json"
    path.write_text(json.dumps({**copy.deepcopy(config), **more}))
    return path


def test_a_configuration_that_does_not_say_gets_quick_gelu(
    tmp_path: Path, tiny_configs: dict[str, Any], tiny_checkpoint_folder: Path
) -> None:
    path = tmp_path / "weights.pt"
    torch.save({**load_file(tiny_checkpoint_folder / "open_clip_model.safetensors"), **SETTINGS}, path)
    checkpoint = read_checkpoint(path, model=config_file(tmp_path, tiny_configs["vit"]))
    assert checkpoint.model_config["quick_gelu"] is True
    assert "quick_gelu set to True, as OpenAI trained these weights" in checkpoint.notes


def test_a_configuration_that_says_otherwise_is_kept_and_noted(
    tmp_path: Path, tiny_configs: dict[str, Any], tiny_checkpoint_folder: Path
) -> None:
    path = tmp_path / "weights.pt"
    torch.save({**load_file(tiny_checkpoint_folder / "open_clip_model.safetensors"), **MARKS}, path)
    checkpoint = read_checkpoint(path, model=config_file(tmp_path, tiny_configs["vit"], quick_gelu=False))
    assert checkpoint.model_config["quick_gelu"] is False
    assert any("the configuration says quick_gelu false" in note for note in checkpoint.notes)


def test_an_architecture_by_name_gets_quick_gelu(tmp_path: Path, tiny_checkpoint_folder: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({**load_file(tiny_checkpoint_folder / "open_clip_model.safetensors"), **MARKS}, path)
    assert read_checkpoint(path, model="ViT-B-32").model_config["quick_gelu"] is True


def test_weights_without_the_marks_keep_the_configurations_activation(
    tmp_path: Path, tiny_configs: dict[str, Any], tiny_checkpoint_folder: Path
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(load_file(tiny_checkpoint_folder / "open_clip_model.safetensors"), path)
    checkpoint = read_checkpoint(path, model=config_file(tmp_path, tiny_configs["vit"]))
    assert not checkpoint.model_config.get("quick_gelu")


def test_marks_without_the_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), **MARKS}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="all weights of a CLIP as OpenAI published it; got others"):
        read_checkpoint(tmp_path / "weights.pt")
