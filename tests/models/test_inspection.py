from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models import architecture
from cbpt_runtime.models import checkpoint as checkpoint_module
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import load_dual_encoder
from cbpt_runtime.models.inspection import inspect_checkpoint

pytestmark = pytest.mark.usefixtures("no_network")
WEIGHTS = "open_clip_model.safetensors"
KINDS = {
    "vit": ("CLIP", "VisionTransformer"),
    "resnet": ("CLIP", "ModifiedResNet"),
    "custom-text": ("CustomTextCLIP", "VisionTransformer"),
    "timm": ("CustomTextCLIP", "test_vit"),
    "siglip": ("CustomTextCLIP", "VisionTransformer"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_described(tiny_folder: Callable[..., Path], kind: str) -> None:
    folder = tiny_folder(kind, torch.float16)
    found = inspect_checkpoint(folder)
    checkpoint = read_checkpoint(folder)
    model = load_dual_encoder(checkpoint).text_tower.model
    assert json.loads(json.dumps(found)) == found
    assert found["source"] == str(folder)
    assert found["sha256"] == checkpoint.sha256
    assert found["size_bytes"] == (folder / WEIGHTS).stat().st_size
    assert (found["architecture"]["model"], found["architecture"]["image_tower"]) == KINDS[kind]
    assert found["architecture"]["text_tower"] == "TextTransformer"
    assert found["parameters"]["total"] == sum(parameter.numel() for parameter in model.parameters())
    image = sum(
        parameter.numel() for name, parameter in model.named_parameters() if name.startswith("visual.")
    )
    assert found["parameters"]["image"] == image
    assert next(iter(found["dtypes"])) == "float16"
    assert (found["embed_dim"], found["context_length"], found["vocab_size"]) == (16, 16, 49408)
    assert found["image_size"] == list(checkpoint.preprocess.image_size)
    assert found["preprocess"] == checkpoint.preprocess.to_dict()
    assert found["tokenizer"] == "open_clip BPE"
    assert (found["anomalies"], found["notes"]) == ([], [])


def test_oddities_are_reported_instead_of_raised(tiny_checkpoint_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint_folder, tmp_path / "model"))
    state = load_file(folder / WEIGHTS)
    del state["ln_final.bias"]
    state["extra"] = torch.ones(1)
    state["visual.proj"][0, 0] = float("nan")
    save_file(state, folder / WEIGHTS)
    assert inspect_checkpoint(folder)["anomalies"] == [
        "1 weights missing: ln_final.bias",
        "1 weights unexpected: extra",
        "1 weights with NaN or infinite values: visual.proj",
    ]


def test_bare_weights_are_described_by_their_tensors(tiny_checkpoint_folder: Path, tmp_path: Path) -> None:
    weights = Path(shutil.copy(tiny_checkpoint_folder / WEIGHTS, tmp_path))
    found, whole = inspect_checkpoint(weights), inspect_checkpoint(tiny_checkpoint_folder)
    assert found.keys() == whole.keys()
    assert found["architecture"] is None
    assert found["parameters"] == whole["parameters"]
    assert found["anomalies"] == []
    assert "--model" in found["notes"][0]
    state = load_file(weights)
    state["visual.proj"][0, 0] = float("inf")
    save_file(state, weights)
    assert inspect_checkpoint(weights)["anomalies"] == ["1 weights with NaN or infinite values: visual.proj"]


def test_bare_weights_can_be_compared_with_an_architecture(
    tiny_checkpoint_folder: Path, tmp_path: Path
) -> None:
    weights = shutil.copy(tiny_checkpoint_folder / WEIGHTS, tmp_path)
    anomalies = inspect_checkpoint(weights, "RN50")["anomalies"]
    assert ["missing" in anomalies[0], "unexpected" in anomalies[1], "mis-shaped" in anomalies[2]] == [
        True
    ] * 3


def test_inspecting_runs_nothing_from_the_file(tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"

    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {marker}",)

    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Payload()}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="wants to run code"):
        inspect_checkpoint(tmp_path / "weights.pt")
    assert not marker.exists()


def test_inspecting_builds_no_weights(tiny_checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = architecture.build_model

    def build(*arguments: object, device: str = "cpu", **options: object) -> object:
        assert device == "meta"
        return original(*arguments, device=device, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint_module, "build_model", build)
    inspect_checkpoint(tiny_checkpoint_folder)


def test_a_missing_source_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none of them"):
        inspect_checkpoint(tmp_path / "absent")
