"""Folders as transformers writes them, by hand: its names and shapes, weights in closed form.

The features expected here are those that transformers 5.24 (CLIPModel, SiglipModel, Siglip2Model) gives for
the very same folders.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models import huggingface
from cbpt_runtime.models.architecture import build_model, load_image_tower, load_model
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import load_dual_encoder
from cbpt_runtime.models.config import check_model_config
from cbpt_runtime.models.huggingface import open_clip_names

pytestmark = pytest.mark.usefixtures("no_network")
WIDTH, INNER, LAYERS, HEADS, SIDE, PATCH, CONTEXT = 32, 48, 2, 2, 32, 8, 16
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
VOCABULARY = {"clip": 49408, "siglip": 500, "siglip2": 500}
PROCESSORS: dict[str, dict[str, Any]] = {
    "clip": {
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_center_crop": True,
        "do_normalize": True,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.25, 0.25, 0.25],
        "image_processor_type": "CLIPImageProcessor",
        "resample": 3,
        "size": {"shortest_edge": SIDE},
    },
    "siglip": {
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "size": {"height": SIDE, "width": SIDE},
    },
}


def hf_config(kind: str) -> dict[str, Any]:
    vision = {**TOWER, "patch_size": PATCH}
    vision.update({"num_patches": (SIDE // PATCH) ** 2} if kind == "siglip2" else {"image_size": SIDE})
    text = {**TOWER, "vocab_size": VOCABULARY[kind], "max_position_embeddings": CONTEXT}
    if kind != "clip":
        text["projection_size"] = WIDTH
    return {"model_type": kind, "projection_dim": 16, "text_config": text, "vision_config": vision}


def layer_shapes(prefix: str, *, width: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part in ("layer_norm1", "layer_norm2"):
        yield from ((f"{prefix}.{part}.{kind}", (width,)) for kind in ("weight", "bias"))
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield f"{prefix}.self_attn.{part}.weight", (width, width)
        yield f"{prefix}.self_attn.{part}.bias", (width,)
    for part, shape in {"fc1": (inner, width), "fc2": (width, inner)}.items():
        yield f"{prefix}.mlp.{part}.weight", shape
        yield f"{prefix}.mlp.{part}.bias", shape[:1]


def shapes(kind: str, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of transformers' weights, for a configuration without left-out keys."""
    text, vision = config["text_config"], config["vision_config"]
    for name, tower in (("text", text), ("vision", vision)):
        width, inner = tower["hidden_size"], tower["intermediate_size"]
        for layer in range(tower["num_hidden_layers"]):
            yield from layer_shapes(f"{name}_model.encoder.layers.{layer}", width=width, inner=inner)
    words, seen, patch = text["hidden_size"], vision["hidden_size"], vision["patch_size"]
    patches = vision.get("num_patches") or (vision["image_size"] // patch) ** 2
    yield "text_model.embeddings.token_embedding.weight", (text["vocab_size"], words)
    yield "text_model.embeddings.position_embedding.weight", (text["max_position_embeddings"], words)
    yield from ((f"text_model.final_layer_norm.{part}", (words,)) for part in ("weight", "bias"))
    yield from ((f"vision_model.post_layernorm.{part}", (seen,)) for part in ("weight", "bias"))
    is_flat = kind == "siglip2"
    convolution = (seen, 3 * patch * patch) if is_flat else (seen, 3, patch, patch)
    yield "vision_model.embeddings.patch_embedding.weight", convolution
    positions = patches + (kind == "clip")
    yield "vision_model.embeddings.position_embedding.weight", (positions, seen)
    if kind == "clip":
        yield "logit_scale", ()
        yield "vision_model.embeddings.class_embedding", (seen,)
        yield from ((f"vision_model.pre_layrnorm.{part}", (seen,)) for part in ("weight", "bias"))
        yield "visual_projection.weight", (config["projection_dim"], seen)
        yield "text_projection.weight", (config["projection_dim"], words)
        return
    yield from ((name, (1,)) for name in ("logit_scale", "logit_bias"))
    yield "vision_model.embeddings.patch_embedding.bias", (seen,)
    yield "text_model.head.weight", (text["projection_size"], words)
    yield "text_model.head.bias", (text["projection_size"],)
    head, inner = "vision_model.head", vision["intermediate_size"]
    yield f"{head}.probe", (1, 1, seen)
    yield f"{head}.attention.in_proj_weight", (3 * seen, seen)
    yield f"{head}.attention.in_proj_bias", (3 * seen,)
    for part, shape in {
        "attention.out_proj": (seen, seen),
        "mlp.fc1": (inner, seen),
        "mlp.fc2": (seen, inner),
    }.items():
        yield f"{head}.{part}.weight", shape
        yield f"{head}.{part}.bias", shape[:1]
    yield from ((f"{head}.layernorm.{part}", (seen,)) for part in ("weight", "bias"))


def noise(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers in [-0.5, 0.5) that anyone can compute again; the name is the seed."""
    count, seed = torch.Size(shape).numel(), zlib.crc32(name.encode()) % 1000
    values = torch.sin(torch.arange(count, dtype=torch.float64) * 12.9898 + seed) * 43758.5453
    return (values - values.floor() - 0.5).float().reshape(shape)


def inputs() -> tuple[Tensor, Tensor]:
    """Normalised pixels and token rows; 499 is the highest token of the small vocabulary."""
    tokens = torch.tensor([[1, 5, 320, 499, *[0] * (CONTEXT - 4)], [7, 499, *[0] * (CONTEXT - 2)]])
    return noise("pixels", (2, 3, SIDE, SIDE)) * 4, tokens


def write_folder(folder: Path, kind: str) -> Path:
    folder.mkdir()
    config = hf_config(kind)
    (folder / "config.json").write_text(json.dumps(config))
    processor = PROCESSORS["clip" if kind == "clip" else "siglip"]
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    save_file(
        {name: noise(name, shape) for name, shape in shapes(kind, config)}, folder / "model.safetensors"
    )
    return folder


@pytest.fixture(autouse=True)
def tiny_siglip_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image tower of SigLIP's kind, small enough for a test, where timm and the table can find it."""
    shape = (WIDTH, LAYERS, HEADS, PATCH)
    monkeypatch.setitem(huggingface.SIGLIP_TOWERS, shape, "tiny_patch8_siglip")  # type: ignore[arg-type]
    if not timm.is_model("tiny_patch8_siglip_32"):

        def tiny_patch8_siglip_32(pretrained: bool = False, **options: Any) -> VisionTransformer:
            kept = {key: value for key, value in options.items() if key in ("num_classes", "global_pool")}
            kept.update(embed_dim=WIDTH, depth=LAYERS, num_heads=HEADS, mlp_ratio=INNER / WIDTH)
            return VisionTransformer(img_size=SIDE, patch_size=PATCH, class_token=False, **kept)

        register_model(tiny_patch8_siglip_32)


# The first features of two images and two texts, of unit length, as transformers 5.24 gives them.
IMAGES = {
    "clip": [
        [-0.053255, 0.300144, 0.535019, 0.219797, -0.29733, -0.066763],
        [-0.083281, 0.28013, 0.523522, 0.182867, -0.299665, -0.080606],
    ],
    "siglip": [
        [0.006089, -0.150355, 0.179294, 0.288165, -0.156737, 0.128612],
        [-0.005849, -0.120904, 0.181207, 0.247609, -0.1636, 0.100535],
    ],
    "siglip2": [
        [0.008316, -0.125196, 0.198304, 0.270967, -0.165198, 0.092998],
        [0.010017, -0.114842, 0.184564, 0.278271, -0.139196, 0.10899],
    ],
}
SIGLIP_TEXTS = [
    [0.185648, 0.030883, -0.003861, -0.170682, -0.009176, -0.07169],
    [0.18674, 0.023811, 0.005877, -0.1545, -0.011323, -0.06579],
]
TEXTS = {
    "clip": [
        [0.275722, 0.201634, -0.227915, 0.017905, -0.209391, -0.292776],
        [0.441078, 0.192329, -0.082059, -0.133483, -0.094752, -0.170339],
    ],
    "siglip": SIGLIP_TEXTS,
    "siglip2": SIGLIP_TEXTS,
}


@pytest.fixture(params=["clip", "siglip", "siglip2"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@torch.no_grad()
def test_features_of_a_folder_are_those_transformers_gives(tmp_path: Path, kind: str) -> None:
    checkpoint = read_checkpoint(write_folder(tmp_path / "model", kind))
    assert checkpoint.format == "huggingface-folder"
    assert checkpoint.anomalies == ()
    assert "names and shapes of transformers brought to open_clip's" in checkpoint.notes
    model: Any = load_model(checkpoint.model_config, checkpoint.state_dict).eval()
    pixels, tokens = inputs()
    images, texts = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(images[:, :6], torch.tensor(IMAGES[kind]), atol=1e-5, rtol=0)
    torch.testing.assert_close(texts[:, :6], torch.tensor(TEXTS[kind]), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_image_tower_alone_keeps_its_activation(tmp_path: Path, kind: str) -> None:
    checkpoint = read_checkpoint(write_folder(tmp_path / "model", kind))
    prefix = "visual."
    tensors = {
        key.removeprefix(prefix): value for key, value in checkpoint.state_dict.items() if prefix in key
    }
    features = load_image_tower(checkpoint.model_config, tensors).eval()(inputs()[0])
    expected = torch.tensor(IMAGES[kind])
    torch.testing.assert_close(
        (features / features.norm(dim=-1, keepdim=True))[:, :6], expected, atol=1e-5, rtol=0
    )


def test_a_clip_folder_becomes_a_dual_encoder_with_the_folders_preprocessing(tmp_path: Path) -> None:
    encoder = load_dual_encoder(read_checkpoint(write_folder(tmp_path / "model", "clip")))
    assert encoder.encode_texts(["a dog"]).shape == (1, 16)
    assert encoder.preprocess.to_dict() == {
        "image_size": [SIDE, SIDE],
        "mean": [0.4, 0.5, 0.6],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }
    assert encoder.model_config["quick_gelu"] is True


def test_siglip_images_are_squashed_as_its_processor_says(tmp_path: Path) -> None:
    preprocess = read_checkpoint(write_folder(tmp_path / "model", "siglip")).preprocess
    assert (preprocess.resize_mode, preprocess.interpolation) == ("squash", "bilinear")


def test_the_combined_processor_file_of_newer_versions_is_read_too(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "siglip")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    combined = {"image_processor": {**settings, "do_normalize": False}, "processor_class": "SiglipProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(combined))
    preprocess = read_checkpoint(folder).preprocess
    assert (preprocess.mean, preprocess.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_a_folder_without_a_processor_says_that_the_usual_one_is_taken(tmp_path: Path, kind: str) -> None:
    folder = write_folder(tmp_path / "model", kind)
    (folder / "preprocessor_config.json").unlink()
    checkpoint = read_checkpoint(folder)
    assert checkpoint.preprocess.resize_mode == ("shortest" if kind == "clip" else "squash")
    assert any(note.startswith("no preprocessor_config.json") for note in checkpoint.notes)


def test_other_sizes_in_the_processor_are_noted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "clip")
    settings = {**PROCESSORS["clip"], "size": 40, "crop_size": SIDE}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    notes = read_checkpoint(folder).notes
    assert "the image processor names sizes (32, 40); here images become 32 pixels" in notes


def test_weights_alone_are_converted_too(tmp_path: Path, tiny_configs: dict[str, Any]) -> None:
    folder = write_folder(tmp_path / "model", "clip")
    wrapped = {f"module.{key}": value for key, value in load_file(folder / "model.safetensors").items()}
    path, config = tmp_path / "epoch_1.pt", tmp_path / "open_clip.json"
    torch.save({"state_dict": wrapped}, path)
    settings = read_checkpoint(folder).model_config
    config.write_text(json.dumps({"model_cfg": settings}))
    checkpoint = read_checkpoint(path, model=config)
    assert checkpoint.anomalies == ()
    assert checkpoint.format == "training-checkpoint"


def test_a_file_inside_the_folder_takes_the_folders_configuration(tmp_path: Path, kind: str) -> None:
    folder = write_folder(tmp_path / "model", kind)
    assert read_checkpoint(folder / "model.safetensors").anomalies == ()


# Shards -------------------------------------------------------------------------------------------


def split(folder: Path, *, torch_files: bool = False) -> list[Path]:
    """Three shards in the place of the one file."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, suffix = ("pytorch_model", "bin") if torch_files else ("model", "safetensors")
    names = sorted(tensors)
    paths = []
    for index in range(3):
        path = folder / f"{stem}-{index + 1:05}-of-00003.{suffix}"
        part = {name: tensors[name] for name in names[index::3]}
        torch.save(part, path) if torch_files else save_file(part, path)
        paths.append(path)
    weight_map = {name: paths[place % 3].name for place, name in enumerate(names)}
    index_file = folder / f"{stem}.{suffix}.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return paths


@pytest.mark.parametrize("torch_files", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
def test_shards_are_read_with_and_without_their_index(
    tmp_path: Path, torch_files: bool, indexed: bool
) -> None:
    folder = write_folder(tmp_path / "model", "clip")
    whole = read_checkpoint(folder)
    paths = split(folder, torch_files=torch_files)
    if not indexed:
        next(folder.glob("*.index.json")).unlink()
    checkpoint = read_checkpoint(folder)
    assert checkpoint.anomalies == ()
    assert checkpoint.size_bytes == sum(path.stat().st_size for path in paths)
    assert checkpoint.sha256 != whole.sha256
    assert all(torch.equal(checkpoint.state_dict[key], value) for key, value in whole.state_dict.items())


@pytest.mark.parametrize("indexed", [False, True])
def test_a_missing_shard_is_named(tmp_path: Path, indexed: bool) -> None:
    folder = write_folder(tmp_path / "model", "clip")
    split(folder)[1].unlink()
    if not indexed:
        next(folder.glob("*.index.json")).unlink()
    with pytest.raises(CheckpointError, match=r"all 3 shards .*; got 2, without model-00002-of-00003"):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "model", ""])
def test_an_index_reaches_no_file_outside_the_folder(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "model", "clip")
    split(folder)
    next(folder.glob("*.index.json")).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="names of files beside it under weight_map"):
        read_checkpoint(folder)


# Every published size -----------------------------------------------------------------------------

PUBLISHED = {
    "siglip-base-patch16-224": ("siglip", {}, {}),
    "siglip2-base-patch32-256": ("siglip", {"vocab_size": 256000}, {"image_size": 256, "patch_size": 32}),
    "siglip2-base-patch16-naflex": ("siglip2", {"vocab_size": 256000}, {}),
    "siglip-so400m-patch14-384": (
        "siglip",
        {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16},
        {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
    ),
    "siglip2-giant-opt-patch16-256": (
        "siglip",
        {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "projection_size": 1536,
            "vocab_size": 256000,
        },
        {
            "hidden_size": 1536,
            "intermediate_size": 6144,
            "num_hidden_layers": 40,
            "num_attention_heads": 16,
            "image_size": 256,
        },
    ),
    "clip-vit-base-patch32": ("clip", {}, {}),
    "clip-vit-large-patch14-336": (
        "clip",
        {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_every_weight_in_its_shape(tmp_path: Path, name: str) -> None:
    kind, text, vision = PUBLISHED[name]
    config = {"model_type": kind, "text_config": text, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings, _ = huggingface.hugging_face_settings(tmp_path)
    family = "clip" if kind == "clip" else "siglip"
    words = {**huggingface.TEXT_DEFAULTS[family], **text}
    full = {
        "projection_dim": 512,
        "text_config": {"projection_size": words["hidden_size"], **words},
        "vision_config": {**huggingface.VISION_DEFAULTS[family], **vision},
    }
    if kind == "siglip":
        del full["vision_config"]["num_patches"]
    given = {key: torch.empty(shape, device="meta") for key, shape in shapes(kind, full)}
    converted = {key: value.shape for key, value in open_clip_names(given).items()}
    checked = check_model_config(settings["model_cfg"])
    expected = {key: value.shape for key, value in build_model(checked, device="meta").state_dict().items()}
    scalars = ("logit_scale", "logit_bias")
    assert {key: shape for key, shape in converted.items() if key not in scalars} == {
        key: shape for key, shape in expected.items() if key not in scalars
    }


# What is refused ----------------------------------------------------------------------------------


def changed(part: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config[part].update(values)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("clip", lambda config: config.update(model_type="bert"), "model_type out of clip, siglip"),
        ("clip", lambda config: config.update(text_config=[1]), "an object under text_config"),
        ("clip", changed("text_config", hidden_size="32"), r"text_config\.hidden_size as int above 0"),
        ("clip", changed("vision_config", num_attention_heads=0), "num_attention_heads as int above 0"),
        ("clip", changed("vision_config", hidden_act="relu"), "quick_gelu in both towers"),
        ("siglip", changed("vision_config", hidden_act="relu"), "hidden_act out of"),
        ("siglip", changed("vision_config", hidden_size=33), "out of the published SigLIP ones.*33 wide"),
        ("siglip", changed("vision_config", layer_norm_eps=1e-3), "layer_norm_eps 1e-06"),
        ("siglip", changed("text_config", projection_size=5), "text features of length 32"),
        ("siglip2", changed("vision_config", num_patches=15), "a square number of patches"),
        ("clip", changed("vision_config", num_channels=4), "images of 3 channels"),
        ("clip", changed("text_config", num_hidden_layers=10**6), "layers above 0 and at most 256"),
    ],
)
def test_configurations_of_other_models_are_refused(
    tmp_path: Path, kind: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    folder = write_folder(tmp_path / "model", kind)
    config = hf_config(kind)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(folder)


def test_weights_that_are_missing_or_odd_are_anomalies(tmp_path: Path, kind: str) -> None:
    folder = write_folder(tmp_path / "model", kind)
    tensors = load_file(folder / "model.safetensors")
    del tensors["text_model.encoder.layers.0.self_attn.q_proj.weight"]
    tensors["text_model.encoder.layers.1.self_attn.q_proj.weight"] = torch.ones(3)
    tensors["text_model.encoder.layers.1.mlp.gate.weight"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors")
    missing, unexpected, *_ = read_checkpoint(folder).anomalies
    assert "in_proj_weight" in missing
    assert "mlp.gate.weight" in unexpected
