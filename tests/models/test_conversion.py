from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from cbpt_runtime.artifacts import MARKER
from cbpt_runtime.errors import CheckpointError, OutputError
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.inspection import convert_checkpoint

KINDS = ("vit", "resnet", "custom-text", "timm", "siglip")


def training_checkpoint(folder: Path, to: Path) -> Path:
    """The weights of a folder as people's training loops save them, beside other things."""
    weights = load_file(folder / "open_clip_model.safetensors")
    state = {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, to)
    return to


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_checkpoint_becomes_a_folder_with_the_same_weights(
    run: Callable, tiny_folder: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    folder = tiny_folder(kind, torch.float16)
    source = training_checkpoint(folder, tmp_path / "epoch_3.pt")
    output = tmp_path / "two words"
    done = run("convert", source, "--output", output, "--model", folder / "open_clip_config.json", "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["notes"][:2] == ["weights read from state_dict", "not used, beside them: epoch, optimizer"]
    before, after = read_checkpoint(folder), read_checkpoint(output)
    assert (after.format, after.sha256, after.notes) == ("open_clip-folder", said["output_sha256"], ())
    assert (after.model_config, after.preprocess) == (before.model_config, before.preprocess)
    assert before.state_dict.keys() == after.state_dict.keys()
    for name, tensor in before.state_dict.items():
        assert torch.equal(tensor, after.state_dict[name])
        assert tensor.dtype == after.state_dict[name].dtype


def test_open_clip_itself_reads_the_folder(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    convert_checkpoint(tiny_folder("vit"), tmp_path / "out")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    given = read_checkpoint(tiny_folder("vit")).state_dict
    assert all(torch.equal(tensor, given[name]) for name, tensor in model.state_dict().items())


def test_the_image_size_may_be_another(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    said = convert_checkpoint(tiny_folder("vit"), tmp_path / "out", image_size=64)
    assert read_checkpoint(tmp_path / "out").preprocess.image_size == (64, 64)
    assert any("resized from 4×4 to 8×8 patches" in note for note in said["notes"])


def test_what_is_there_is_replaced_only_when_asked_for_and_only_by_its_kind(
    run: Callable, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    convert_checkpoint(tiny_folder("vit"), output)
    with pytest.raises(OutputError, match="does not exist yet"):
        convert_checkpoint(tiny_folder("vit"), output)
    assert run("convert", tiny_folder("custom-text"), "--output", output, "--force").code == 0
    assert read_checkpoint(output).model_config["custom_text"]
    (output / MARKER).unlink()  # as somebody else's open_clip folder
    with pytest.raises(OutputError, match="which is something else"):
        convert_checkpoint(tiny_folder("vit"), output, force=True)


def test_weights_that_do_not_fit_make_no_folder(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    weights = tiny_folder("resnet") / "open_clip_model.safetensors"
    with pytest.raises(CheckpointError, match="weights missing"):
        convert_checkpoint(weights, tmp_path / "out", model=tiny_folder("vit") / "open_clip_config.json")
    assert list(tmp_path.iterdir()) == []
