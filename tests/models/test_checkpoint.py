from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models.checkpoint import CONFIG_NAME, Checkpoint, read_checkpoint
from cbpt_runtime.models.clip import load_dual_encoder
from cbpt_runtime.models.weights import file_digest

pytestmark = pytest.mark.usefixtures("no_network")
KINDS = ("vit", "resnet", "custom-text", "timm", "siglip")
WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture
def folder(tiny_checkpoint_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint_folder, tmp_path / "model"))


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "model"))


@pytest.fixture
def state(tiny_checkpoint_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(tiny_checkpoint_folder / WEIGHTS)


@pytest.fixture
def config_file(tmp_path: Path, tiny_configs: dict[str, Any]) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_configs["vit"]))
    return path


def same_weights(left: Checkpoint, right: Checkpoint) -> bool:
    return left.state_dict.keys() == right.state_dict.keys() and all(
        torch.equal(left.state_dict[key], right.state_dict[key]) for key in left.state_dict
    )


def test_an_open_clip_folder_is_read(folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    assert checkpoint.source == str(folder)
    assert checkpoint.format == "open_clip-folder"
    assert checkpoint.sha256 == file_digest(folder / WEIGHTS)
    assert checkpoint.size_bytes == (folder / WEIGHTS).stat().st_size
    assert checkpoint.model_config["embed_dim"] == 16
    assert checkpoint.preprocess.image_size == (32, 32)
    assert checkpoint.preprocess.resize_mode == "squash"
    assert (checkpoint.anomalies, checkpoint.notes) == ((), ())
    assert same_weights(read_checkpoint(f"local-dir:{folder}"), checkpoint)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_kind_of_model_reads_back_whole_in_every_precision(
    tiny_folder: Callable[..., Path], kind: str, dtype: torch.dtype
) -> None:
    checkpoint = read_checkpoint(tiny_folder(kind, dtype))
    assert checkpoint.anomalies == ()
    assert {tensor.dtype for tensor in checkpoint.state_dict.values()} <= {dtype, torch.int64}


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "weights.bin"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_bare_weights_are_read_with_a_configuration_file(
    folder: Path, state: dict[str, torch.Tensor], config_file: Path, tmp_path: Path, name: str, wrapped: bool
) -> None:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif wrapped:
        torch.save({"epoch": 1, "state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    else:
        torch.save(state, path)
    checkpoint = read_checkpoint(path, model=config_file)
    expected = {".safetensors": "safetensors"}.get(path.suffix, "training-checkpoint" if wrapped else "torch")
    assert checkpoint.format == expected
    assert same_weights(checkpoint, read_checkpoint(folder))
    assert checkpoint.anomalies == ()


def test_a_configuration_file_may_hold_preprocessing_too(folder: Path, tmp_path: Path) -> None:
    weights = shutil.copy(folder / WEIGHTS, tmp_path)
    checkpoint = read_checkpoint(weights, model=folder / CONFIG_NAME)
    assert checkpoint.preprocess == read_checkpoint(folder).preprocess


def test_weights_beside_their_configuration_need_no_model(folder: Path) -> None:
    checkpoint = read_checkpoint(folder / WEIGHTS)
    assert checkpoint.format == "safetensors"
    assert checkpoint.preprocess.resize_mode == "squash"


def test_bare_weights_without_a_model_say_what_to_do(folder: Path, tmp_path: Path) -> None:
    weights = shutil.copy(folder / WEIGHTS, tmp_path)
    with pytest.raises(CheckpointError, match=r"expected the architecture of .*--model ViT-B-32"):
        read_checkpoint(weights)


def test_an_architecture_name_brings_configuration_and_preprocessing(folder: Path, tmp_path: Path) -> None:
    weights = shutil.copy(folder / WEIGHTS, tmp_path)
    siglip = read_checkpoint(weights, model="ViT-B-16-SigLIP")
    assert siglip.model_config["custom_text"] is True
    assert siglip.preprocess.mean == (0.5, 0.5, 0.5)
    assert siglip.preprocess.resize_mode == "squash"
    clip = read_checkpoint(weights, model="ViT-B/32")
    assert clip.preprocess.mean == open_clip.OPENAI_DATASET_MEAN
    assert clip.preprocess.resize_mode == "shortest"
    assert read_checkpoint(folder, model="RN50").model_config["embed_dim"] == 1024


def test_an_unknown_architecture_suggests_close_names(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"got vit-b-3\..*Close: ViT-B-32,"):
        read_checkpoint(folder / WEIGHTS, model="vit-b-3")


@pytest.mark.parametrize("model", ["hf-hub:someone/model", "local-dir:/nowhere", "absent.json"])
def test_the_model_option_reaches_no_other_source(folder: Path, model: str) -> None:
    with pytest.raises(CheckpointError):
        read_checkpoint(folder / WEIGHTS, model=model)


# Weights that do not fit --------------------------------------------------------------------------


def test_the_wrong_architecture_lists_the_first_keys_and_counts(folder: Path) -> None:
    checkpoint = read_checkpoint(folder / WEIGHTS, model="RN50")
    missing, unexpected, misshaped = checkpoint.anomalies
    assert missing.startswith("403 weights missing: ")
    assert missing.endswith(" more")
    assert "weights unexpected: " in unexpected
    assert "positional_embedding [16, 32] instead of [77, 512]" in misshaped
    assert missing.count(",") == 4
    with pytest.raises(
        CheckpointError, match=r"weights missing: .*weights unexpected: .*weights mis-shaped: "
    ):
        load_dual_encoder(checkpoint)


def test_single_missing_unexpected_and_misshaped_keys_are_named(
    folder: Path, state: dict[str, torch.Tensor]
) -> None:
    del state["ln_final.bias"]
    state["extra"] = torch.ones(1)
    state["visual.proj"] = torch.ones(3, 3)
    state["text_projection"] = torch.ones(32, 16, dtype=torch.int32)
    save_file(state, folder / WEIGHTS)
    assert read_checkpoint(folder).anomalies == (
        "1 weights missing: ln_final.bias",
        "1 weights unexpected: extra",
        "1 weights mis-shaped: visual.proj [3, 3] instead of [32, 16]",
        "1 weights of integers: text_projection",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_that_are_not_finite_are_an_anomaly_and_do_not_load(
    folder: Path, state: dict[str, torch.Tensor], value: float, dtype: torch.dtype
) -> None:
    state["visual.proj"] = state["visual.proj"].to(dtype)
    state["visual.proj"][0, 0] = value
    save_file(state, folder / WEIGHTS)
    checkpoint = read_checkpoint(folder)
    assert checkpoint.anomalies == ("1 weights with NaN or infinite values: visual.proj",)
    with pytest.raises(CheckpointError, match=r"NaN or infinite values: visual\.proj"):
        load_dual_encoder(checkpoint)


def test_batch_norm_counters_may_be_missing(tiny_resnet_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_resnet_folder, tmp_path)
    state = load_file(folder / WEIGHTS)
    before = load_dual_encoder(read_checkpoint(folder)).encode_images(torch.ones(1, 3, 32, 32))
    save_file({key: value for key, value in state.items() if "num_batches" not in key}, folder / WEIGHTS)
    checkpoint = read_checkpoint(folder)
    assert checkpoint.anomalies == ()
    torch.testing.assert_close(load_dual_encoder(checkpoint).encode_images(torch.ones(1, 3, 32, 32)), before)


def test_clip_weights_are_renamed_for_a_custom_text_model(
    folder: Path, tmp_path: Path, tiny_configs: dict[str, Any]
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_configs["custom-text"]))
    checkpoint = read_checkpoint(folder / WEIGHTS, model=config)
    assert checkpoint.anomalies == ()
    assert "text.positional_embedding" in checkpoint.state_dict


@pytest.mark.parametrize("shape", [(), (1,)])
def test_logit_scale_may_be_a_number_or_a_vector_of_one(
    folder: Path, state: dict[str, torch.Tensor], shape: tuple[int, ...]
) -> None:
    state["logit_scale"] = torch.full(shape, 2.0)
    save_file(state, folder / WEIGHTS)
    assert load_dual_encoder(read_checkpoint(folder)).logit_scale == pytest.approx(7.389, abs=1e-3)


def test_a_missing_logit_bias_is_filled_in_and_noted(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copy_of(tiny_folder("siglip"), tmp_path)
    state = load_file(folder / WEIGHTS)
    del state["logit_bias"]
    save_file(state, folder / WEIGHTS)
    checkpoint = read_checkpoint(folder)
    assert checkpoint.anomalies == ()
    assert checkpoint.notes == ("logit_bias, which the weights lack, set to 0",)
    assert load_dual_encoder(checkpoint).logit_bias == 0


def test_names_of_mobileclip_on_other_weights_are_refused(
    folder: Path, state: dict[str, torch.Tensor]
) -> None:
    state["image_encoder.model.patch_emb.0.block.conv.weight"] = torch.ones(1)
    save_file(state, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="the weights of a MobileCLIP"):
        read_checkpoint(folder)


# Bad sources --------------------------------------------------------------------------------------


def test_a_name_that_is_nothing_says_what_is_possible() -> None:
    with pytest.raises(
        CheckpointError, match=r"or a tag with its --model; got absent, which is none of them\."
    ):
        read_checkpoint("absent")


def test_an_unknown_tag_lists_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=r"tags of RN50 are openai, yfcc15m, cc12m"):
        read_checkpoint("absent", model="RN50")


def test_a_folder_without_configuration_or_weights_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="no weights file"):
        read_checkpoint(folder)
    (folder / CONFIG_NAME).unlink()
    with pytest.raises(CheckpointError, match=f"expected {CONFIG_NAME} or a transformers config.json in"):
        read_checkpoint(folder)


def test_a_folder_takes_its_only_weights_file_and_refuses_to_choose_between_two(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "epoch_1.safetensors")
    assert read_checkpoint(folder).anomalies == ()
    shutil.copy(folder / "epoch_1.safetensors", folder / "epoch_2.safetensors")
    with pytest.raises(CheckpointError, match=r"got epoch_1\.safetensors, epoch_2\.safetensors"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "an empty file"),
        ('{"model_cfg": {"embed_dim"', "valid JSON"),
        ("{}", "embed_dim in model_cfg; got only nothing"),
        ('{"model_cfg": 3}', "an object under model_cfg"),
        ('{"model_cfg": {}, "preprocess_cfg": []}', "an object under preprocess_cfg"),
        ('{"model_cfg": {"run": "rm"}}', "got run"),
    ],
)
def test_a_damaged_configuration_is_refused(folder: Path, content: str, message: str) -> None:
    (folder / CONFIG_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(folder)


def test_unknown_preprocessing_is_refused(folder: Path, tiny_configs: dict[str, Any]) -> None:
    content = {"model_cfg": tiny_configs["vit"], "preprocess_cfg": {"crop": 0.9}}
    (folder / CONFIG_NAME).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"preprocess_cfg keys out of .*got \['crop'\]"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("vision_cfg", "width", 33),
        ("vision_cfg", "image_size", 4),
        ("text_cfg", "heads", 3),
        ("text_cfg", "width", 1),
    ],
)
def test_a_configuration_that_describes_no_model_is_refused(
    folder: Path, section: str, key: str, value: int
) -> None:
    config: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_text())
    config["model_cfg"][section][key] = value
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        load_dual_encoder(read_checkpoint(folder))


@pytest.mark.parametrize("content", [b"", b"damaged", (10**6).to_bytes(8, "little") + b"{}"])
def test_damaged_weights_are_refused(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError):
        read_checkpoint(folder)


def test_a_hostile_pickle_in_a_folder_does_not_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    (folder / WEIGHTS).unlink()
    payload = b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    (folder / "open_clip_pytorch_model.bin").write_bytes(payload)
    with pytest.raises(CheckpointError, match=r"wants to run code \(os\.system\)"):
        read_checkpoint(folder)
    assert not marker.exists()
    pickle.loads(payload)
    assert marker.exists()


def test_no_permission_is_an_input_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(CheckpointError, match="got permission denied"):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", ["", "x" * 5000, "with\0zero"])
def test_strange_names_are_input_errors(name: str) -> None:
    with pytest.raises(CheckpointError):
        read_checkpoint(name)


def test_a_checkpoint_is_frozen(folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    with pytest.raises(dataclasses.FrozenInstanceError):
        checkpoint.source = "other"  # type: ignore[misc]
