"""What a model configuration may say.

A configuration comes with the suspect checkpoint and is as little trusted as its weights: every key and value
is checked, sizes are bounded, and whatever would make open_clip, timm or transformers fetch other weights is
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

from cbpt_runtime.errors import CheckpointError

_TOP_LEVEL: dict[str, type] = {
    "embed_dim": int,
    "vision_cfg": dict,
    "text_cfg": dict,
    "custom_text": bool,
    "quick_gelu": bool,
    "nonscalar_logit_scale": bool,
    "init_logit_scale": float,
    "init_logit_bias": float,
}
# Far above any published model; a hostile configuration must not exhaust memory or time.
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
# Keyword arguments a configuration may hand on, with what they may be.
_KEYWORDS: dict[str, dict[str, type | tuple[str, ...]]] = {
    "norm_kwargs": {"eps": float},
    "act_kwargs": {"approximate": ("none", "tanh")},
    "tokenizer_kwargs": {"clean": ("lower", "canonicalize", "whitespace"), "strip_sep_token": bool},
}
_POOL_TYPES = ("first", "last", "argmax", "eos")


def read_json(path: Path, *, max_bytes: int = 1_000_000) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: Missing, unreadable, too large, truncated, or not a JSON object.
    """
    try:
        with path.open("rb") as stream:
            text = stream.read(max_bytes + 1)
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise config_error(f"a readable configuration file {path}", reason) from error
    if len(text) > max_bytes:
        raise config_error(f"a configuration of at most {max_bytes:,} bytes in {path}", "a larger file")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise config_error(f"valid JSON in {path}", str(error) if text else "an empty file") from error
    if not isinstance(content, dict):
        raise config_error(f"a JSON object in {path}", type(content).__name__)
    return content


def check_model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Check an open_clip `model_cfg` and return a copy with which nothing can be fetched or executed.

    Raises:
        CheckpointError: Unknown keys, wrong types, sizes out of bounds, or a part that is not supported.
    """
    if "multimodal_cfg" in config:
        raise config_error(
            "a dual encoder (CLIP, CustomTextCLIP)", "a CoCa captioning model (multimodal_cfg)"
        )
    _check_keys(config, set(_TOP_LEVEL), "model_cfg")
    for key, kind in _TOP_LEVEL.items():
        if key in ("embed_dim", "vision_cfg", "text_cfg") and config.get(key) is None:
            raise config_error(f"{key} in model_cfg", f"only {', '.join(sorted(config)) or 'nothing'}")
        _check_type(config.get(key), kind, key)
    checked: dict[str, Any] = deepcopy(dict(config))
    vision, text = checked["vision_cfg"], checked["text_cfg"]
    _check_bound(checked["embed_dim"], "embed_dim")
    _check_section(vision, open_clip.CLIPVisionCfg, "vision_cfg")
    _check_section(text, open_clip.CLIPTextCfg, "text_cfg")
    _check_timm_name(vision.get("timm_model_name"))
    if text.get("pool_type", "argmax") not in _POOL_TYPES:
        raise config_error(
            f"text_cfg.pool_type out of {', '.join(_POOL_TYPES)}", f"{text['pool_type']!r:.80}"
        )
    if text.get("embed_cls") and not checked.get("custom_text"):
        raise config_error("custom_text true beside embed_cls, as open_clip needs", "custom_text false")
    vision["timm_model_pretrained"] = False
    text["hf_model_pretrained"] = False
    vision["output_tokens"] = text["output_tokens"] = False
    return checked


def is_custom_text(config: Mapping[str, Any]) -> bool:
    """Whether open_clip builds `CustomTextCLIP` (text weights under `text.`) for this, rather than `CLIP`."""
    return bool(config.get("custom_text")) or bool(config["text_cfg"].get("hf_model_name"))


def config_error(expected: str, got: str) -> CheckpointError:
    """Return the error for a configuration that cannot be used."""
    return CheckpointError(
        expected=expected,
        got=got,
        fix="Correct open_clip_config.json, or name the right architecture with --model.",
    )


def _check_section(section: Mapping[str, Any], schema: type, name: str) -> None:
    """Check one tower's settings against open_clip's own dataclass for them."""
    defaults = {field.name: field.default for field in dataclasses.fields(schema)}
    _check_keys(section, set(defaults), name)
    for key, value in section.items():
        if value is None:
            continue
        if key in _KEYWORDS:
            _check_keywords(value, _KEYWORDS[key], f"{name}.{key}")
        elif key in _UPPER_BOUNDS:
            for number in value if isinstance(value, list | tuple) else [value]:
                _check_bound(number, f"{name}.{key}")
        elif defaults[key] is not None:
            _check_type(value, type(defaults[key]), f"{name}.{key}")
        elif not isinstance(value, str | int | float):
            raise config_error(f"a single value for {name}.{key}", type(value).__name__)
    layers = section.get("layers")
    if isinstance(layers, list | tuple) and len(layers) != 4:
        raise config_error(f"one or four numbers for {name}.layers", repr(layers))


def _check_keywords(value: object, allowed: Mapping[str, type | tuple[str, ...]], name: str) -> None:
    _check_type(value, dict, name)
    keywords: dict[str, object] = dict(value) if isinstance(value, dict) else {}
    _check_keys(keywords, set(allowed), name)
    for key, entry in keywords.items():
        kind = allowed[key]
        if isinstance(kind, type):
            _check_type(entry, kind, f"{name}.{key}")
        elif entry not in kind:
            raise config_error(f"{name}.{key} out of {', '.join(kind)}", f"{entry!r:.80}")


def _check_keys(section: Mapping[str, Any], known: set[str], name: str) -> None:
    unknown = sorted(set(section) - known)
    if unknown:
        listed = ", ".join(unknown[:5])
        raise config_error(f"only keys open_clip {open_clip.__version__} knows in {name}", f"{listed:.200}")


def _check_type(value: object, kind: type, key: str) -> None:
    accepted = (int, float) if kind is float else kind
    is_wrong = not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool))
    if value is not None and is_wrong:
        raise config_error(f"{key} of type {kind.__name__}", f"{value!r:.80}")


def _check_bound(value: object, key: str) -> None:
    name = key.rpartition(".")[2]
    bound, kind = _UPPER_BOUNDS[name], (int, float) if name == "mlp_ratio" else int
    if not (isinstance(value, kind) and not isinstance(value, bool) and 0 < value <= bound):
        number = "a number" if name == "mlp_ratio" else "a whole number"
        raise config_error(f"{key} above 0 and at most {bound:,}, {number}", f"{value!r:.80}")


def _check_timm_name(name: object) -> None:
    """Only architectures inside timm: a name such as 'hf-hub:…' would fetch another model."""
    if name is None:
        return
    import timm

    if not isinstance(name, str) or not timm.is_model(name.partition(".")[0]):
        known = f"timm_model_name out of the architectures built into timm {timm.__version__}"
        raise config_error(known, f"{name!r:.80}")
