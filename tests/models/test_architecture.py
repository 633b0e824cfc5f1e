from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models.architecture import (
    POSITIONS,
    build_model,
    load_image_tower,
    load_model,
    trained_image_size,
    without_prefixes,
)
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import load_dual_encoder
from cbpt_runtime.models.config import check_model_config
from cbpt_runtime.models.weights import read_weights

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


pytestmark = pytest.mark.usefixtures("no_network")
WEIGHTS = "open_clip_model.safetensors"
EXPECTED = {
    name: torch.empty(1) for name in ("visual.proj", "visual.conv.weight", "text.proj", "logit_scale")
}


@pytest.mark.parametrize(
    ("names", "removed"),
    [
        (["visual.proj", "visual.conv.weight", "text.proj", "logit_scale"], {}),
        (["a.b.visual.proj", "a.b.visual.conv.weight", "a.b.text.proj", "a.b.logit_scale"], {"a.b.": 4}),
        (
            ["visual._orig_mod.proj", "visual._orig_mod.conv.weight", "text.proj", "logit_scale"],
            {"_orig_mod.": 2},
        ),
        (["visual.module.proj", "visual.module.conv.weight", "text.proj", "logit_scale"], {"module.": 2}),
        (
            ["backbone.visual.proj", "backbone.visual.conv.weight", "text.proj", "logit_scale"],
            {"backbone.": 2},
        ),
        (
            ["module.visual._orig_mod.proj", "module.visual._orig_mod.conv.weight"],
            {"_orig_mod.": 2, "module.": 2},
        ),
    ],
)
def test_prefixes_of_all_names_or_of_one_tower_go(names: list[str], removed: dict[str, int]) -> None:
    tensors, found = without_prefixes({name: torch.empty(1) for name in names}, EXPECTED)
    assert set(tensors) <= set(EXPECTED)
    assert len(tensors) == len(names)
    assert found == removed


@pytest.mark.parametrize(
    "names",
    [
        ["visual.proj", "ema.visual.proj"],  # two weights would get one name
        ["other.proj", "other.bias"],  # not the architecture's
        ["text.visual.other", "text.proj"],  # a prefix the architecture has itself
    ],
)
def test_names_that_no_prefix_explains_stay(names: list[str]) -> None:
    tensors, removed = without_prefixes({name: torch.empty(1) for name in names}, EXPECTED)
    assert list(tensors) == names
    assert removed == {}


def rename(folder: Path, to: Path, change: Callable[[str], str]) -> Path:
    copy = Path(shutil.copytree(folder, to / "model"))
    tensors = load_file(copy / WEIGHTS)
    save_file({change(name): value for name, value in tensors.items()}, copy / WEIGHTS)
    return copy


def test_a_compiled_image_tower_reads_as_the_plain_one(tiny_checkpoint_folder: Path, tmp_path: Path) -> None:
    folder = rename(
        tiny_checkpoint_folder, tmp_path, lambda name: name.replace("visual.", "visual._orig_mod.")
    )
    checkpoint = read_checkpoint(folder)
    assert checkpoint.anomalies == ()
    assert checkpoint.notes[0].startswith("prefix _orig_mod. removed from ")
    assert checkpoint.state_dict.keys() == read_checkpoint(tiny_checkpoint_folder).state_dict.keys()


@pytest.mark.parametrize("prefix", ["student.encoder.", "clip.", "net.module."])
def test_any_prefix_of_all_names_goes_and_is_noted(
    tiny_checkpoint_folder: Path, tmp_path: Path, prefix: str
) -> None:
    checkpoint = read_checkpoint(rename(tiny_checkpoint_folder, tmp_path, lambda name: prefix + name))
    assert checkpoint.anomalies == ()
    assert any(f"prefix {prefix} removed" in note for note in checkpoint.notes)


def test_a_name_of_wrappers_without_end_is_cut_a_few_times(tmp_path: Path) -> None:
    save_file({"net." * 1_000_000 + "weight": torch.ones(1)}, tmp_path / "weights.safetensors")
    weights = read_weights(tmp_path / "weights.safetensors")
    assert weights.notes == ("prefix net.net.net.net.net.net.net.net. removed from every name",)


def other_size(folder: Path, to: Path, image_size: int) -> Path:
    copy = Path(shutil.copytree(folder, to / "model"))
    config: dict[str, Any] = json.loads((copy / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["image_size"] = image_size
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("kind", ["vit", "resnet", "custom-text"])
@pytest.mark.parametrize("image_size", [64, 96])
def test_weights_for_another_image_size_say_so_and_what_to_do(
    tiny_folder: Callable[..., Path], tmp_path: Path, kind: str, image_size: int
) -> None:
    folder = other_size(tiny_folder(kind), tmp_path, image_size)
    anomalies = read_checkpoint(folder).anomalies
    assert anomalies[-1] == (
        f"the weights are for images of 32 pixels, the configuration says {image_size}:"
        f" --image-size 32 takes them as they are, --image-size {image_size} resizes their"
        " position embeddings"
    )
    with pytest.raises(CheckpointError, match="images of 32 pixels"):
        load_dual_encoder(read_checkpoint(folder))


@pytest.mark.parametrize("kind", ["vit", "resnet", "custom-text"])
def test_position_embeddings_are_resized_on_request(
    tiny_folder: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    folder = other_size(tiny_folder(kind), tmp_path, 96)
    as_trained = read_checkpoint(folder, image_size=32)
    assert (as_trained.anomalies, as_trained.notes) == ((), ())
    resized = read_checkpoint(folder, image_size=96)
    assert resized.anomalies == ()
    assert "resized from" in resized.notes[-1]
    assert resized.preprocess.image_size == (96, 96)
    encoder = load_dual_encoder(resized)
    assert encoder.encode_images(torch.rand(1, 3, 96, 96)).isfinite().all()
    key = next(key for key in POSITIONS if key in resized.state_dict)
    before, after = as_trained.state_dict[key], resized.state_dict[key]
    model = torch.nn.Module()
    model.visual = torch.nn.Module()  # what open_clip's own resizing looks at
    model.visual.grid_size = (math.isqrt(len(after) - 1),) * 2
    expected = {"visual.positional_embedding": before.clone()}
    open_clip.model.resize_pos_embed(expected, model)
    torch.testing.assert_close(after, expected["visual.positional_embedding"])


@pytest.mark.parametrize("image_size", [33, 0, 8192])
def test_sizes_that_patches_do_not_fill_are_refused(tiny_checkpoint_folder: Path, image_size: int) -> None:
    with pytest.raises(CheckpointError, match="in whole patches of 8; got"):
        read_checkpoint(tiny_checkpoint_folder, image_size=image_size)


def test_the_command_line_takes_the_size(run: Callable, tiny_checkpoint_folder: Path, tmp_path: Path) -> None:
    folder = other_size(tiny_checkpoint_folder, tmp_path, 64)
    assert "--image-size 64 resizes" in run("inspect", folder).out
    done = run("inspect", folder, "--image-size", 64, "--json")
    assert json.loads(done.out)["anomalies"] == []
    assert json.loads(done.out)["image_size"] == [64, 64]


def test_a_timm_tower_without_a_class_token_tells_its_size() -> None:
    key = "visual.trunk.pos_embed"
    given, wanted = {key: torch.empty(1, 196, 8)}, {key: torch.empty(1, 256, 8)}
    assert trained_image_size(given, wanted, (256, 256)) == 224
    assert trained_image_size(given, wanted, (256, 128)) is None
    assert trained_image_size({key: torch.empty(1, 195, 8)}, wanted, (256, 256)) is None
    assert trained_image_size({key: torch.empty(1, 196, 9)}, wanted, (256, 256)) is None


def test_another_patch_size_is_no_other_image_size(tiny_checkpoint_folder: Path, tmp_path: Path) -> None:
    folder = other_size(tiny_checkpoint_folder, tmp_path, 32)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["patch_size"] = 16
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert not any("pixels" in anomaly for anomaly in read_checkpoint(folder).anomalies)
