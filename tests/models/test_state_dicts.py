"""Training checkpoints as programs write them: where the weights lie, and what is no weights at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models.weights import read_weights

PLAIN = {f"layer.{index}.weight": torch.full((2,), float(index)) for index in range(6)}
AVERAGED = {name: value + 100 for name, value in PLAIN.items()}


def saved(content: object, folder: Path) -> Path:
    path = folder / "epoch.pt"
    torch.save(content, path)
    return path


def is_plain(tensors: dict[str, Tensor]) -> bool:
    return tensors.keys() == PLAIN.keys() and all(torch.equal(tensors[name], PLAIN[name]) for name in PLAIN)


def adam_state() -> dict[str, Any]:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    return optimizer.state_dict()


LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "open_clip": ({"epoch": 1, "name": "run", "state_dict": PLAIN, "optimizer": adam_state()}, "state_dict"),
    "PyTorch tutorial": (
        {"epoch": 1, "model_state_dict": PLAIN, "optimizer_state_dict": adam_state(), "loss": torch.ones(())},
        "model_state_dict",
    ),
    "timm": ({"arch": "vit", "state_dict": PLAIN, "state_dict_ema": AVERAGED, "metric": 0.5}, "state_dict"),
    "detection": ({"model": PLAIN, "ema": AVERAGED, "lr_scheduler": {"last_epoch": 3}}, "model"),
    "DeepSpeed": ({"module": PLAIN, "optimizer": None, "global_steps": 7}, "module"),
    "weights": ({"weights": PLAIN, "config": {"lr": 0.1}}, "weights"),
    "net": ({"net": PLAIN, "acc": 0.9, "step": torch.tensor(3)}, "net"),
    "nested": ({"ema": {"model": AVERAGED}, "net": {"state_dict": PLAIN}}, "net.state_dict"),
    "unusual": ({"my_weights": PLAIN, "notes": "x"}, "my_weights"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_are_found_where_programs_put_them(tmp_path: Path, layout: str) -> None:
    content, name = LAYOUTS[layout]
    weights = read_weights(saved(content, tmp_path))
    assert is_plain(weights.tensors)
    assert f"weights read from {name}" in weights.notes


def test_a_lightning_checkpoint_loses_the_name_of_its_attribute(tmp_path: Path) -> None:
    content = {
        "state_dict": {f"model.{name}": value for name, value in PLAIN.items()},
        "pytorch-lightning_version": "2.5",
        "hyper_parameters": {"lr": 0.1},
        "callbacks": {"ModelCheckpoint": {"best": torch.ones(())}},
        "optimizer_states": [adam_state()],
    }
    weights = read_weights(saved(content, tmp_path))
    assert is_plain(weights.tensors)
    assert weights.notes[-1] == "prefix model. removed from every name"


@pytest.mark.parametrize(
    ("layout", "name"), [("timm", "state_dict_ema"), ("detection", "ema"), ("nested", "ema.model")]
)
def test_averaged_weights_are_noted_and_can_be_chosen(tmp_path: Path, layout: str, name: str) -> None:
    path = saved(LAYOUTS[layout][0], tmp_path)
    assert f"averaged weights are there too: name them as epoch.pt#{name}" in read_weights(path).notes
    weights = read_weights(path, name=name)
    assert all(torch.equal(weights.tensors[key], AVERAGED[key]) for key in AVERAGED)


def test_averaged_weights_alone_are_taken(tmp_path: Path) -> None:
    weights = read_weights(saved({"ema": AVERAGED}, tmp_path))
    assert weights.notes == ("weights read from ema",)


def test_a_name_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"weights called emma in .*; got model, ema"):
        read_weights(saved(LAYOUTS["detection"][0], tmp_path), name="emma")
    with pytest.raises(CheckpointError, match="only weights without a name"):
        read_weights(saved(PLAIN, tmp_path), name="emma")


def test_safetensors_hold_one_set_of_weights(tmp_path: Path) -> None:
    save_file(PLAIN, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="the wish for #ema"):
        read_weights(tmp_path / "weights.safetensors", name="ema")


def test_several_sets_of_unusual_names_must_be_chosen_from(tmp_path: Path) -> None:
    path = saved({"generator": PLAIN, "critic": AVERAGED}, tmp_path)
    with pytest.raises(CheckpointError, match=r"got several: generator, critic\. .* epoch\.pt#generator"):
        read_weights(path)
    assert is_plain(read_weights(path, name="generator").tensors)


# What is no weights -------------------------------------------------------------------------------


class ShardedTensor:
    """By its name what distributed training stores for a part of a tensor."""


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (adam_state(), "the state of an optimizer, without weights"),
        (
            {"optimizer": adam_state(), "optimizer2": adam_state()},
            "the state of an optimizer, without weights",
        ),
        ({"layer.weight": ShardedTensor()}, "one process's part of a distributed checkpoint"),
        (
            {"layer.lora_A.weight": torch.ones(2, 2), "layer.lora_B.weight": torch.ones(2, 2)},
            r"adapter \(LoRA\)",
        ),
        ({"epoch": 3, "name": "run"}, "no tensors, but epoch, name"),
        (ShardedTensor(), "ShardedTensor"),
    ],
)
def test_files_without_weights_are_named_for_what_they_are(tmp_path: Path, content: object, got: str) -> None:
    with pytest.raises(CheckpointError, match=rf"a state dict .*; got .*{got}"):
        read_weights(saved(content, tmp_path))


def test_an_adapter_as_safetensors_is_named_too(tmp_path: Path) -> None:
    save_file({"base.layer.lora_A.weight": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"an adapter \(LoRA\)"):
        read_weights(tmp_path / "adapter_model.safetensors")


# Files made to be slow ----------------------------------------------------------------------------


def test_one_mapping_under_many_names_is_looked_at_once(tmp_path: Path) -> None:
    shared = {f"name {index}": index for index in range(20_000)}
    path = saved({f"copy {index}": shared for index in range(20_000)}, tmp_path)
    with pytest.raises(CheckpointError, match="no tensors, but copy 0"):
        read_weights(path)


def test_one_long_name_under_many_names_is_not_read_over_and_over(tmp_path: Path) -> None:
    name = "x" * 4_000_000
    content = {f"part {index}": {name: {}} for index in range(20_000)}
    with pytest.raises(CheckpointError, match="no tensors, but part 0"):
        read_weights(saved(content, tmp_path))


def test_a_model_of_parts_shared_over_and_over_is_refused(tmp_path: Path) -> None:
    part: nn.Module = nn.Linear(1, 1)
    for _ in range(40):
        part = nn.ModuleDict({"left": part, "right": part})
    with pytest.raises(CheckpointError, match="a model of more than 1,000,000 parts"):
        read_weights(saved(part, tmp_path))
