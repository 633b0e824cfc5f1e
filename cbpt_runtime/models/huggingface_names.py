"""The names transformers gives to the weights of CLIP and SigLIP, brought to open_clip's."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

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
    """The same weights with open_clip's names and shapes; names that are not known stay as they are.

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
    """Queries, keys and values of each attention in one tensor, under the name of open_clip's."""
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
