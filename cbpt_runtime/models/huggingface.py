"""CLIP, SigLIP and SigLIP 2 folders as the transformers library writes them, in open_clip's terms.

`config.json` becomes a `model_cfg`, the folder's image processor a `preprocess_cfg`, and the weights get
open_clip's names and shapes. No code of the folder and none of transformers takes part.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models.config import read_json
from cbpt_runtime.runtime.preprocess import OPENAI_MEAN, OPENAI_STD

HF_CONFIG_NAME = "config.json"
_MODEL_TYPES = ("clip", "siglip", "siglip2")
_NATIVE_VOCABULARY = 49408
# What transformers takes for keys a configuration leaves out.
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": {
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
        "max_position_embeddings": 77, "vocab_size": 49408, "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "siglip": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "max_position_embeddings": 64, "vocab_size": 32000, "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}  # fmt: skip
VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 32, "num_channels": 3, "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "siglip": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 16, "num_channels": 3, "num_patches": 256,
        "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    },
}  # fmt: skip
# timm's names of SigLIP image towers, by width, layers, heads and patch size; the image size follows.
SIGLIP_TOWERS: dict[tuple[int, int, int, int], str] = {
    (768, 12, 12, 16): "vit_base_patch16_siglip",
    (768, 12, 12, 32): "vit_base_patch32_siglip",
    (1024, 24, 16, 16): "vit_large_patch16_siglip",
    (1152, 27, 16, 14): "vit_so400m_patch14_siglip",
    (1152, 27, 16, 16): "vit_so400m_patch16_siglip",
    (1536, 40, 16, 16): "vit_giantopt_patch16_siglip",
}
# open_clip's names of the tokenizers; the files are looked for in the folder first.
_SIGLIP_TOKENIZERS = {
    32000: "timm/ViT-B-16-SigLIP",
    250000: "timm/ViT-B-16-SigLIP-i18n-256",
    256000: "timm/ViT-B-16-SigLIP2",
}
_TIMM_EPS = 1e-6
_ACTIVATIONS: dict[str, dict[str, str] | None] = {
    "gelu": None,
    "gelu_new": {"approximate": "tanh"},
    "gelu_pytorch_tanh": {"approximate": "tanh"},
}
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}


def is_hugging_face(folder: Path) -> bool:
    """Whether the folder has the configuration of a transformers model."""
    path = folder / HF_CONFIG_NAME
    return path.is_file() and "model_type" in read_json(path)


def hugging_face_settings(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """`model_cfg` and `preprocess_cfg` of a transformers folder, and notes on what differs.

    Raises:
        CheckpointError: Another kind of model than CLIP or SigLIP, or one open_clip has no tower for.
    """
    content = read_json(folder / HF_CONFIG_NAME)
    kind = content.get("model_type")
    if kind not in _MODEL_TYPES:
        raise _config_error(f"model_type out of {', '.join(_MODEL_TYPES)}", f"{kind!r:.80}")
    family = "clip" if kind == "clip" else "siglip"
    text = _section(content, "text_config", TEXT_DEFAULTS[family])
    vision = _section(content, "vision_config", VISION_DEFAULTS[family])
    notes: tuple[str, ...] = ()
    if kind == "siglip2":  # any shape of image up to a number of patches; here the square one
        side = math.isqrt(vision["num_patches"])
        if side * side != vision["num_patches"]:
            raise _config_error("a square number of patches", str(vision["num_patches"]))
        vision["image_size"] = side * vision["patch_size"]
        notes = (f"images of any shape become square ones of {vision['image_size']} pixels",)
    config = _clip_config(content, text, vision) if family == "clip" else _siglip_config(text, vision)
    config["text_cfg"].update(_tokenizer(text["vocab_size"], family, folder))
    preprocess, more = _preprocess(folder, family, vision["image_size"])
    return {"model_cfg": config, "preprocess_cfg": preprocess}, (*notes, *more)


def _clip_config(content: Mapping[str, Any], text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    return {
        "embed_dim": content.get("projection_dim", 512),
        "quick_gelu": _is_quick(text, vision),
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            **_transformer(vision),
        },
        "text_cfg": {**_text_config(text), **_transformer(text)},
    }


def _siglip_config(text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    import timm

    shape = tuple(
        vision[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    )
    tower = f"{SIGLIP_TOWERS.get(shape)}_{vision['image_size']}"
    if not timm.is_model(tower):
        got = f"{shape[0]} wide, {shape[1]} layers, {shape[2]} heads, patches of {shape[3]}, images of"
        raise _config_error(
            "an image tower out of the published SigLIP ones", f"{got} {vision['image_size']}"
        )
    if vision["layer_norm_eps"] != _TIMM_EPS:
        raise _config_error(f"layer_norm_eps {_TIMM_EPS} in vision_config", str(vision["layer_norm_eps"]))
    projection = text.get("projection_size", text["hidden_size"])
    if projection != vision["hidden_size"]:
        raise _config_error(f"text features of length {vision['hidden_size']}", f"{projection!r:.80}")
    return {
        "embed_dim": vision["hidden_size"],
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": vision["image_size"],
            "timm_model_name": tower,
            "timm_pool": "map",
            "timm_proj": "none",
            "act_kwargs": _activation(vision),
        },
        "text_cfg": {
            **_text_config(text),
            **_transformer(text),
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
        },
    }


def _transformer(section: Mapping[str, Any]) -> dict[str, Any]:
    width, inner = section["hidden_size"], section["intermediate_size"]
    # open_clip multiplies and cuts off: half a unit more, where the ratio is not whole, hits the width.
    ratio = inner // width if inner % width == 0 else (inner + 0.5) / width
    settings: dict[str, Any] = {"width": width, "layers": section["num_hidden_layers"], "mlp_ratio": ratio}
    if section["layer_norm_eps"] != 1e-5:
        settings["norm_kwargs"] = {"eps": section["layer_norm_eps"]}
    if section["hidden_act"] != "quick_gelu" and (activation := _activation(section)):
        settings["act_kwargs"] = activation
    return settings


def _text_config(text: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "heads": text["num_attention_heads"],
    }


def _activation(section: Mapping[str, Any]) -> dict[str, str] | None:
    name = section["hidden_act"]
    if name not in _ACTIVATIONS:
        raise _config_error(f"hidden_act out of quick_gelu, {', '.join(_ACTIVATIONS)}", f"{name!r:.80}")
    return _ACTIVATIONS[name]


def _is_quick(text: Mapping[str, Any], vision: Mapping[str, Any]) -> bool:
    are_quick = [str(section["hidden_act"]) == "quick_gelu" for section in (text, vision)]
    if are_quick[0] != are_quick[1]:
        raise _config_error("quick_gelu in both towers or in none", "in one of them")
    return are_quick[0]


def _tokenizer(vocabulary: int, family: str, folder: Path) -> dict[str, Any]:
    if vocabulary == _NATIVE_VOCABULARY:
        return {}
    if family == "clip":
        return {"hf_tokenizer_name": folder.resolve().name}
    name = _SIGLIP_TOKENIZERS.get(vocabulary, folder.resolve().name)
    return {"hf_tokenizer_name": name, "tokenizer_kwargs": {"clean": "canonicalize"}}


def _preprocess(folder: Path, family: str, image_size: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    is_clip = family == "clip"
    usual: dict[str, Any] = {
        "mean": OPENAI_MEAN if is_clip else (0.5,) * 3,
        "std": OPENAI_STD if is_clip else (0.5,) * 3,
        "interpolation": "bicubic",
        "resize_mode": "shortest" if is_clip else "squash",
    }
    settings = _image_processor(folder)
    if settings is None:
        return usual, ("no preprocessor_config.json: preprocessing as usual for this kind of model",)
    if settings.get("do_normalize") is False:
        usual["mean"], usual["std"] = (0.0,) * 3, (1.0,) * 3
    else:
        usual["mean"] = settings.get("image_mean") or usual["mean"]
        usual["std"] = settings.get("image_std") or usual["std"]
    if "resample" in settings:
        code = settings["resample"]
        usual["interpolation"] = (
            _INTERPOLATIONS.get(code, f"resample {code!r:.40}") if type(code) is int else ""
        )
    shortest, sides = _sizes(settings.get("size"))
    crop = _sizes(settings.get("crop_size"))[1] if settings.get("do_center_crop", is_clip) else None
    usual["resize_mode"] = "shortest" if crop or shortest else "squash"
    asked = {side for side in (shortest, *(sides or ()), *(crop or ())) if side is not None}
    if asked - {image_size}:
        listed = ", ".join(str(side) for side in sorted(asked))
        return usual, (f"the image processor names sizes ({listed}); here images become {image_size} pixels",)
    return usual, ()


def _image_processor(folder: Path) -> dict[str, Any] | None:
    """Return the settings of the image processor: a file of their own, or a part of a newer combined one."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            content = read_json(folder / name)
            inner = content.get("image_processor", content)
            return inner if isinstance(inner, dict) else content
    return None


def _sizes(size: object) -> tuple[int | None, tuple[int, int] | None]:
    """Return the shortest side, or height and width, out of the ways to write a size."""
    if type(size) is int:
        return size, (size, size)
    if isinstance(size, dict):
        shortest, height, width = (size.get(key) for key in ("shortest_edge", "height", "width"))
        if type(height) is int and type(width) is int:
            return None, (height, width)
        return shortest if type(shortest) is int else None, None
    return None, None


def _section(content: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    given = content.get(name) or {}
    if not isinstance(given, dict):
        raise _config_error(f"an object under {name}", type(given).__name__)
    section = {**defaults, **{key: value for key, value in given.items() if value is not None}}
    for key, default in defaults.items():
        value = section[key]
        fits = type(value) is type(default) and (isinstance(value, str) or 0 < value < 2**31)
        if not fits and not (type(default) is float and type(value) is int and value > 0):
            raise _config_error(f"{name}.{key} as {type(default).__name__} above 0", f"{value!r:.80}")
    if section.get("num_channels", 3) != 3:
        raise _config_error("images of 3 channels", str(section["num_channels"]))
    return section


def _config_error(expected: str, got: str) -> CheckpointError:
    return CheckpointError(
        expected=f"{expected} in {HF_CONFIG_NAME}",
        got=got,
        fix="Name a folder of a CLIP, SigLIP or SigLIP 2 model, or give the architecture with --model.",
    )


_MARKS = ("text_model.embeddings.token_embedding.weight", "vision_model.post_layernorm.weight")
_LAYER = re.compile(r"(text|vision)_model\.encoder\.layers\.(\d+)\.(.+)")
_QUERY = re.compile(r"(.*\.self_attn\.)q_proj\.(weight|bias)")
# Inside one layer: open_clip's own transformers, and timm's.
_NATIVE_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_TIMM_LAYER = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}
# Matrices that open_clip multiplies from the other side.
_TRANSPOSED = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
_TRUNK = "visual.trunk."
_SIGLIP = {
    "text_model.embeddings.token_embedding.weight": "text.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
    "text_model.final_layer_norm.weight": "text.ln_final.weight",
    "text_model.final_layer_norm.bias": "text.ln_final.bias",
    "text_model.head.weight": "text.text_projection.weight",
    "text_model.head.bias": "text.text_projection.bias",
    "vision_model.embeddings.patch_embedding.bias": f"{_TRUNK}patch_embed.proj.bias",
    "vision_model.post_layernorm.weight": f"{_TRUNK}norm.weight",
    "vision_model.post_layernorm.bias": f"{_TRUNK}norm.bias",
    "vision_model.head.probe": f"{_TRUNK}attn_pool.latent",
    **{
        f"vision_model.head.{theirs}.{kind}": f"{_TRUNK}attn_pool.{ours}.{kind}"
        for theirs, ours in {
            "attention.out_proj": "proj",
            "layernorm": "norm",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        }.items()
        for kind in ("weight", "bias")
    },
}


def has_hugging_face_names(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a whole CLIP or SigLIP model in transformers."""
    return all(mark in tensors for mark in _MARKS)


def open_clip_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same weights with open_clip's names and shapes; names that are not known stay as they are.

    Queries, keys and values, apart in transformers, become one matrix. Positions, which older versions
    stored, are left out.
    """
    tensors = {name: value for name, value in tensors.items() if not name.endswith(".position_ids")}
    is_siglip = "vision_model.head.probe" in tensors
    converted: dict[str, Tensor] = {}
    for name, value in _joined(tensors).items():
        if is_siglip:
            converted.update(_siglip(name, value))
        elif name in _TRANSPOSED and value.ndim == 2:
            converted[_TRANSPOSED[name]] = value.T.contiguous()
        else:
            converted[_CLIP.get(name) or _layer(name, is_timm=False) or name] = value
    return converted


def _joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join queries, keys and values of each attention in one tensor, under the name of open_clip's."""
    joined = dict(tensors)
    for name in tensors:
        match = _QUERY.fullmatch(name)
        parts = [f"{match[1]}{part}_proj.{match[2]}" for part in "qkv"] if match else []
        if match and all(part in joined and joined[part].ndim for part in parts):
            values = [joined.pop(part) for part in parts]
            if len({value.shape[1:] for value in values}) == 1:
                joined[f"{match[1]}in_proj_{match[2]}"] = torch.cat(values)
    return joined


def _layer(name: str, *, is_timm: bool) -> str | None:
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    tower, number, rest = match[1], match[2], match[3]
    part, _, kind = rest.rpartition(".")
    if tower == "vision" and is_timm:
        inside = _TIMM_LAYER.get(part)
        if rest.startswith("self_attn.in_proj_"):
            return f"{_TRUNK}blocks.{number}.attn.qkv.{rest.removeprefix('self_attn.in_proj_')}"
        return f"{_TRUNK}blocks.{number}.{inside}.{kind}" if inside else None
    prefix = "visual." if tower == "vision" else ("text." if is_timm else "")
    if rest.startswith("self_attn.in_proj_"):
        return f"{prefix}transformer.resblocks.{number}.attn.{rest.removeprefix('self_attn.')}"
    inside = _NATIVE_LAYER.get(part)
    return f"{prefix}transformer.resblocks.{number}.{inside}.{kind}" if inside else None


def _siglip(name: str, value: Tensor) -> dict[str, Tensor]:
    if name == "vision_model.embeddings.position_embedding.weight":
        return {f"{_TRUNK}pos_embed": value.unsqueeze(0)}
    if name == "vision_model.embeddings.patch_embedding.weight":
        return {f"{_TRUNK}patch_embed.proj.weight": _convolution(value)}
    if name.startswith("vision_model.head.attention.in_proj_"):
        kind = name.rpartition("_")[2]
        width = len(value) // 3
        return {
            f"{_TRUNK}attn_pool.q.{kind}": value[:width].clone(),
            f"{_TRUNK}attn_pool.kv.{kind}": value[width:].clone(),
        }
    return {_SIGLIP.get(name) or _layer(name, is_timm=True) or name: value}


def _convolution(weight: Tensor) -> Tensor:
    """SigLIP 2 cuts images into rows of pixels first and multiplies: the same as a convolution."""
    if weight.ndim != 2:
        return weight
    side = round((weight.shape[1] / 3) ** 0.5)
    if side * side * 3 != weight.shape[1]:
        return weight
    return weight.reshape(-1, side, side, 3).permute(0, 3, 1, 2).contiguous()
