"""A suspect checkpoint: where it came from, what it says it is, and its weights.

Reading decides nothing about trust and runs nothing from the file. What is wrong with the weights (keys that
do not fit the architecture, NaN) is collected in `anomalies`: inspection shows them, building an encoder
refuses them. The archives that OpenAI published name no architecture, but shapes do; all use QuickGELU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from torch import Tensor, nn

from cbpt_runtime.errors import CheckpointError, ConfigError
from cbpt_runtime.models.architecture import (
    build_model,
    key_problems,
    resize_positions,
    value_problems,
    with_image_size,
    without_prefixes,
)
from cbpt_runtime.models.config import check_model_config
from cbpt_runtime.models.huggingface import has_hugging_face_names, open_clip_names
from cbpt_runtime.models.locations import CONFIG_NAME, Located, locate
from cbpt_runtime.models.weights import Weights, files_digest, read_weights
from cbpt_runtime.runtime.preprocess import OPENAI_MEAN, OPENAI_STD, Preprocess

_HEAD_WIDTH = 64
_RESNET_STRIDE = 32


def openai_settings(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """`model_cfg` and `preprocess_cfg` of OpenAI's weights, from their shapes.

    Raises:
        CheckpointError: Weights are missing without which the shapes say too little.
    """
    try:
        vision = _vit(tensors) if "visual.proj" in tensors else _resnet(tensors)
        width = tensors["ln_final.weight"].shape[0]
        config = {
            "embed_dim": tensors["text_projection"].shape[1],
            "quick_gelu": True,
            "vision_cfg": vision,
            "text_cfg": {
                "context_length": tensors["positional_embedding"].shape[0],
                "vocab_size": tensors["token_embedding.weight"].shape[0],
                "width": width,
                "heads": max(1, width // _HEAD_WIDTH),
                "layers": _count(tensors, "transformer.resblocks."),
            },
        }
    except (LookupError, ArithmeticError) as error:
        raise CheckpointError(
            expected="all weights of a CLIP as OpenAI published it",
            got=f"others ({type(error).__name__}: {error})",
            fix="Name the architecture the weights were trained with (--model).",
        ) from error
    return {"model_cfg": config, "preprocess_cfg": {"mean": OPENAI_MEAN, "std": OPENAI_STD}}


def _vit(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    width, _, _, patch_size = tensors["visual.conv1.weight"].shape
    grid = math.isqrt(tensors["visual.positional_embedding"].shape[0] - 1)
    return {
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "width": width,
        "head_width": min(width, _HEAD_WIDTH),
        "layers": _count(tensors, "visual.transformer.resblocks."),
    }


def _resnet(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    grid = math.isqrt(tensors["visual.attnpool.positional_embedding"].shape[0] - 1)
    return {
        "image_size": grid * _RESNET_STRIDE,
        "width": tensors["visual.layer1.0.conv1.weight"].shape[0],
        "layers": [_count(tensors, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)],
    }


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered parts there are under a prefix."""
    return len({name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Weights and what is known about them.

    Attributes:
        source: What the user named.
        format: 'open_clip-folder', 'huggingface-folder', 'pretrained', or what kind of file the weights are
            (`Weights.format`).
        sha256: Of the weights file; of shards, of the lines `digest  name` that sha256sum writes for them.
        size_bytes: Of the weights file, or of all its shards.
        model_config: open_clip's `model_cfg`, checked, with every download switched off.
        preprocess: How images become input.
        state_dict: Named as open_clip names them, on the CPU, in the dtype of the file.
        anomalies: Reasons not to use the weights: missing, unexpected or mis-shaped keys, NaN or infinite
            values.
        notes: What was adapted while reading.
        folder: Where further files of the model lie (a local tokenizer), if anywhere.
        weights_name: Which of several sets of weights in the file these are, where one was asked for.
        activation_is_guessed: Whether nothing but the user's `model` says if it is GELU or QuickGELU.
    """

    source: str
    format: str
    sha256: str
    size_bytes: int
    model_config: dict[str, Any]
    preprocess: Preprocess
    state_dict: dict[str, Tensor]
    anomalies: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    folder: Path | None = None
    weights_name: str | None = None
    activation_is_guessed: bool = False


def read_checkpoint(
    source: str | Path, *, model: str | Path | None = None, image_size: int | None = None
) -> Checkpoint:
    """Read a suspect checkpoint without executing anything from it.

    Args:
        source: An open_clip folder; a CLIP, SigLIP or SigLIP 2 folder of transformers; a file of weights in
            any form docs/checkpoints.md lists, where `PATH#NAME` chooses among several sets; an open_clip
            pretrained tag (with `model`); or 'hf-hub:owner/name'. A path never uses the network.
        model: An open_clip architecture name or a JSON configuration file. Needed for a bare weights file.
        image_size: Height and width of the input, instead of the configuration's; position embeddings trained
            for another size are resized.

    Raises:
        CheckpointError: The source is missing, damaged, in no known format, wants to run code, or its
            configuration is not one of a dual encoder.
    """
    located = locate(source, model=model)
    weights = read_weights(*located.weights, name=located.weights_name)
    settings = located.settings
    if settings is None and weights.is_openai:
        settings = openai_settings(weights.tensors)
    if settings is None:
        raise CheckpointError(
            expected=f"the architecture of {located.source}",
            got=f"a weights file without {CONFIG_NAME} beside it",
            fix="Name it: --model ViT-B-32 (any open_clip architecture) or --model config.json.",
        )
    given, activation_notes = _with_activation(settings["model_cfg"], weights)
    if image_size is not None:
        check_model_config(given)
        given = with_image_size(given, image_size)
    config = check_model_config(given)
    preprocess = _preprocess(settings.get("preprocess_cfg"), config)
    sha256 = files_digest(located.weights)
    size_bytes = sum(path.stat().st_size for path in located.weights)
    skeleton = build_model(config, device="meta", folder=located.folder)
    tensors, notes = _adapted(weights.tensors, skeleton)
    expected = skeleton.state_dict()
    if image_size is not None:
        tensors, more = resize_positions(tensors, expected)
        notes += more
    return Checkpoint(
        source=located.source,
        format=located.format or weights.format,
        sha256=sha256,
        size_bytes=size_bytes,
        model_config=config,
        preprocess=preprocess,
        state_dict=tensors,
        anomalies=(*key_problems(tensors, expected, preprocess.image_size), *value_problems(tensors)),
        notes=(*located.notes, *weights.notes, *activation_notes, *notes),
        folder=located.folder,
        weights_name=located.weights_name,
        activation_is_guessed=_is_guess(model, located, weights, settings["model_cfg"]),
    )


def _is_guess(
    model: str | Path | None, located: Located, weights: Weights, config: Mapping[str, Any]
) -> bool:
    """Whether GELU or QuickGELU is up to what the user named, and matters to a tower of open_clip's own."""
    is_named = model is not None and not (Path(model).suffix == ".json" or Path(model).is_file())
    is_said = located.format == "pretrained" or weights.is_openai or (not is_named and "quick_gelu" in config)
    vision, text = config.get("vision_cfg") or {}, config.get("text_cfg") or {}
    has_own_tower = not (vision.get("timm_model_name") and text.get("hf_model_name"))
    return model is not None and not is_said and has_own_tower


def _with_activation(
    config: Mapping[str, Any], weights: Weights
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """OpenAI trained with QuickGELU; a configuration that does not say is corrected, one that does is not."""
    if not weights.is_openai or config.get("quick_gelu"):
        return config, ()
    if "quick_gelu" in config:
        return config, (
            "OpenAI trained these weights with QuickGELU, the configuration says quick_gelu false",
        )
    return {**config, "quick_gelu": True}, ("quick_gelu set to True, as OpenAI trained these weights",)


def _preprocess(settings: Mapping[str, Any] | None, config: Mapping[str, Any]) -> Preprocess:
    try:
        return Preprocess.from_open_clip(settings or {}, config["vision_cfg"].get("image_size", 224))
    except ConfigError as error:
        raise CheckpointError(
            expected=error.expected, got=error.got, fix=f"Correct {CONFIG_NAME}."
        ) from error


def _adapted(tensors: dict[str, Tensor], skeleton: nn.Module) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Older and third-party names and shapes brought to the present ones, as open_clip's own loader does.

    Nothing is interpolated here: position embeddings of another length are another architecture.
    """
    notes = []
    if has_hugging_face_names(tensors):
        tensors = open_clip_names(tensors)
        notes.append("names and shapes of transformers brought to open_clip's")
    try:
        tensors = dict(convert_state_dict(skeleton, tensors))
    except (LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            expected="the weights of a MobileCLIP, as some of their names say",
            got=f"others ({type(error).__name__}: {error})",
            fix="Name the architecture the weights were trained with (--model).",
        ) from error
    if "positional_embedding" in tensors and not hasattr(skeleton, "positional_embedding"):
        tensors = convert_to_custom_text_state_dict(tensors)
    tensors, removed = without_prefixes(tensors, skeleton.state_dict())
    notes.extend(f"prefix {prefix:.80} removed from {count} names" for prefix, count in removed.items())
    for mask in ("attn_mask", "text.attn_mask"):
        tensors.pop(mask, None)  # computed; whole models saved as objects or programs hold it
    tensors.pop("text.transformer.embeddings.position_ids", None)  # written by transformers before 4.31
    for key in ("logit_scale", "logit_bias"):
        parameter = getattr(skeleton, key, None)
        if parameter is not None and key in tensors and tensors[key].numel() == 1:
            tensors[key] = tensors[key].reshape(parameter.shape)
    if skeleton.logit_bias is not None and "logit_scale" in tensors and "logit_bias" not in tensors:
        tensors["logit_bias"] = torch.zeros_like(tensors["logit_scale"])
        notes.append("logit_bias, which the weights lack, set to 0")
    return tensors, tuple(notes)
