"""What a model configuration may say, and the open_clip modules it builds.

A configuration comes with the suspect checkpoint and is as little trusted as its weights: every key and value
is checked, sizes are bounded, and whatever would make open_clip, timm or transformers load other weights is
switched off.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models.hub import find_local_files

# Everything a hostile or mistaken configuration can make a model constructor raise.
_BUILD_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
_TOP_LEVEL = {
    "embed_dim": int,
    "vision_cfg": dict,
    "text_cfg": dict,
    "custom_text": bool,
    "quick_gelu": bool,
    "nonscalar_logit_scale": bool,
    "init_logit_scale": float,
    "init_logit_bias": float,
}
_UPPER_BOUNDS = {
    "embed_dim": 16_384,
    "width": 16_384,
    "layers": 256,
    "heads": 1_024,
    "head_width": 1_024,
    "mlp_ratio": 64,
    "patch_size": 1_024,
    "image_size": 4_096,
    "context_length": 4_096,
    "vocab_size": 2_000_000,
    "attn_pooler_queries": 4_096,
    "attn_pooler_heads": 1_024,
}
# Keys that are passed on as keyword arguments, and what they may hold.
_KWARGS = {
    "norm_kwargs": ("eps",),
    "act_kwargs": ("approximate",),
    "tokenizer_kwargs": ("clean", "strip_sep_token"),
}


def read_json(path: Path, *, max_bytes: int = 1_000_000) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: Missing, unreadable, too large, truncated, or not a JSON object.
    """
    try:
        if path.stat().st_size > max_bytes:
            raise _config_error(f"{path} as a configuration of at most {max_bytes:,} bytes", "a larger file")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _config_error(f"a readable file {path}", error.strerror or type(error).__name__) from error
    except (ValueError, RecursionError) as error:  # ValueError covers JSON and UTF-8 decoding
        raise _config_error(f"valid JSON in {path}", str(error) or "a file nested too deeply") from error
    if not isinstance(content, dict):
        raise _config_error(f"a JSON object in {path}", type(content).__name__)
    return content


def check_model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Checks an open_clip `model_cfg` and returns a copy from which nothing can be downloaded or executed.

    Raises:
        CheckpointError: Unknown keys, wrong types, sizes out of bounds, or a part that is not supported.
    """
    if "multimodal_cfg" in config:
        raise _config_error(
            "a dual encoder (CLIP, CustomTextCLIP)", "a CoCa captioning model (multimodal_cfg)"
        )
    _check_keys(config, set(_TOP_LEVEL), "model_cfg")
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in config:
            raise _config_error(
                f"the key {key} in model_cfg", f"only {', '.join(sorted(config)) or 'nothing'}"
            )
    for key, kind in _TOP_LEVEL.items():
        _check_type(config.get(key), kind, key)
    checked: dict[str, Any] = deepcopy(dict(config))
    vision, text = checked["vision_cfg"], checked["text_cfg"]
    _check_section(vision, open_clip.CLIPVisionCfg, "vision_cfg")
    _check_section(text, open_clip.CLIPTextCfg, "text_cfg")
    _check_bound(checked["embed_dim"], "embed_dim")
    _check_timm_name(vision.get("timm_model_name"))
    vision["timm_model_pretrained"] = False
    text["hf_model_pretrained"] = False
    vision["output_tokens"] = text["output_tokens"] = False
    if text.get("pool_type") == "none":
        raise _config_error("a text tower that pools to one embedding", "pool_type none")
    if text.get("embed_cls") and not checked.get("custom_text"):
        raise _config_error("custom_text true beside embed_cls, as open_clip needs", "custom_text false")
    return checked


def build_model(config: Mapping[str, Any], *, device: str = "cpu", folder: Path | None = None) -> nn.Module:
    """Builds the dual encoder with random weights; on device 'meta' without memory.

    Args:
        config: A configuration that went through `check_model_config`.
        device: 'cpu' or 'meta'.
        folder: Where the files of a transformers text tower may lie.

    Raises:
        CheckpointError: The configuration does not describe a model.
    """
    arguments = {key: deepcopy(value) for key, value in config.items() if key != "custom_text"}
    model_class = open_clip.CustomTextCLIP if is_custom_text(config) else open_clip.CLIP
    text_model = config["text_cfg"].get("hf_model_name")
    if text_model is not None:
        arguments["text_cfg"]["hf_model_name"] = str(_local_text_model(text_model, folder))
    try:
        with torch.device(device):
            model: nn.Module = model_class(**arguments)
    except _BUILD_FAILURES as error:
        raise _build_error(error) from error
    return model


def build_image_tower(config: Mapping[str, Any]) -> nn.Module:
    """Builds the image tower alone, on the CPU, with random weights; otherwise as `build_model`."""
    from open_clip.model import _build_vision_tower

    try:
        tower: nn.Module = _build_vision_tower(
            config["embed_dim"], deepcopy(config["vision_cfg"]), config.get("quick_gelu", False)
        )
    except _BUILD_FAILURES as error:
        raise _build_error(error) from error
    return tower


def is_custom_text(config: Mapping[str, Any]) -> bool:
    """Whether open_clip builds `CustomTextCLIP` (text weights under `text.`) for this, rather than `CLIP`."""
    return bool(config.get("custom_text")) or bool(config["text_cfg"].get("hf_model_name"))


def _check_section(section: Mapping[str, Any], schema: type, name: str) -> None:
    known = {field.name: str(field.type) for field in dataclasses.fields(schema)}
    _check_keys(section, set(known), name)
    for key, value in section.items():
        if value is None:
            continue
        if key in _KWARGS:
            _check_type(value, dict, f"{name}.{key}")
            _check_keys(value, set(_KWARGS[key]), f"{name}.{key}")
        elif key in _UPPER_BOUNDS:
            for number in value if isinstance(value, list | tuple) else [value]:
                _check_bound(number, f"{name}.{key}")
        elif isinstance(value, dict | list):
            raise _config_error(f"a single value for {name}.{key}", type(value).__name__)
    layers = section.get("layers")
    if isinstance(layers, list | tuple) and len(layers) != 4:
        raise _config_error(f"one or four numbers for {name}.layers", repr(layers))


def _check_keys(section: Mapping[str, Any], known: set[str], name: str) -> None:
    unknown = sorted(set(section) - known)
    if unknown:
        raise _config_error(
            f"only keys open_clip {open_clip.__version__} knows in {name}", ", ".join(map(str, unknown[:5]))
        )


def _check_type(value: object, kind: type, key: str) -> None:
    if value is None:
        return
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
        raise _config_error(f"{key} of type {kind.__name__}", f"{value!r:.80}")


def _check_bound(value: object, key: str) -> None:
    bound = _UPPER_BOUNDS[key.rpartition(".")[2]]
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= bound
    if not fits:
        raise _config_error(f"{key} above 0 and at most {bound:,}", f"{value!r:.80}")


def _check_timm_name(name: object) -> None:
    if name is None:
        return
    import timm

    architecture = str(name).partition(".")[0]
    if not isinstance(name, str) or not timm.is_model(architecture):
        raise _config_error(
            f"timm_model_name out of the architectures built into timm {timm.__version__}", f"{name!r:.80}"
        )


def _local_text_model(name: str, folder: Path | None) -> Path:
    """The local folder of a transformers text tower; only its configuration is read and no code run."""
    found = find_local_files(name, "config.json", folder)
    if found is None:
        raise _config_error(
            f"the files of the text tower {name:.80} beside the checkpoint or in the Hugging Face cache",
            "neither",
        )
    if "auto_map" in read_json(found / "config.json"):
        raise _config_error(
            f"a text tower transformers knows in {found}", "one that brings its own code (auto_map)"
        )
    return found


def _build_error(error: BaseException) -> CheckpointError:
    return _config_error(
        "a configuration open_clip can build a model from", f"{type(error).__name__}: {error}"
    )


def _config_error(expected: str, got: str) -> CheckpointError:
    return CheckpointError(
        expected=expected,
        got=got,
        fix="Correct open_clip_config.json, or name the right architecture with --model.",
    )
