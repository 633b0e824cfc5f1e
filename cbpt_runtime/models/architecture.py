"""The open_clip modules a checked configuration describes, empty or with given weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import _build_vision_tower
from torch import Tensor, nn

from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models.config import config_error, is_custom_text, read_json
from cbpt_runtime.models.hub import find_local_files
from cbpt_runtime.models.visual_prompts import PromptedTower, split_prompts

# What a configuration that passed the checks can still make a model constructor raise.
_BUILD_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def build_model(config: Mapping[str, Any], *, device: str = "cpu", folder: Path | None = None) -> nn.Module:
    """Build the dual encoder with random weights; on device 'meta' without memory.

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
    model = _build(lambda: model_class(**arguments), device)
    _with_activation(model.visual, config["vision_cfg"])
    return model


def load_model(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, folder: Path | None = None
) -> nn.Module:
    """Return the dual encoder with the given weights, in float32 on the CPU; it may share their memory.

    Args:
        config: A configuration that went through `check_model_config`.
        tensors: Weights by name, in any floating-point type.
        folder: Where the files of a transformers text tower may lie.

    Raises:
        CheckpointError: The configuration does not describe a model, or the weights are not its weights.
    """
    return _load(lambda device: build_model(config, device=device, folder=folder), tensors)


def load_image_tower(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Load the image tower alone; `tensors` have no prefix `visual.`; otherwise as `load_model`.

    Visual prompts among the tensors become part of the tower.
    """
    tensors, prompts = split_prompts(tensors)

    def build(device: str) -> nn.Module:
        vision, quick_gelu = deepcopy(config["vision_cfg"]), config.get("quick_gelu", False)
        tower = _build(lambda: _build_vision_tower(config["embed_dim"], vision, quick_gelu), device)
        return _with_activation(tower, vision)

    tower = _load(build, tensors)
    return PromptedTower(tower, prompts) if prompts else tower


def _build(build: Callable[[], nn.Module], device: str) -> nn.Module:
    try:
        with torch.device(device):
            return build()
    except _BUILD_FAILURES as error:
        reason = f"{type(error).__name__}: {str(error) or 'no details'}"
        raise config_error("a configuration open_clip can build a model from", f"{reason:.300}") from error


def _with_activation(tower: Any, vision: Mapping[str, Any]) -> nn.Module:
    """Give a timm tower the GELU its settings ask for, as open_clip does for its own towers only."""
    approximate = (vision.get("act_kwargs") or {}).get("approximate")
    if approximate is not None and vision.get("timm_model_name"):
        for part in tower.modules():
            if isinstance(part, nn.GELU):
                part.approximate = approximate
    module: nn.Module = tower
    return module


def _load(build: Callable[[str], nn.Module], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Build without memory and put the weights in place; nothing is initialised only to be overwritten."""
    module = build("meta")
    _restore_causal_mask(module)
    can_assign = not _computed_tensors(module)
    if not can_assign:
        module = build("cpu")
    try:
        module.load_state_dict(dict(tensors), assign=can_assign)
    except RuntimeError as error:
        raise CheckpointError(
            expected="weights that fit their model configuration",
            got=f"{' '.join(str(error).split()):.300}",
            fix="Name the architecture the weights were trained with.",
        ) from error
    return module.float()


def _restore_causal_mask(module: nn.Module) -> None:
    """Compute the one buffer of open_clip's own text transformers that is not among the weights."""
    for part in (module, getattr(module, "text", None)):
        mask = getattr(part, "attn_mask", None)
        if isinstance(part, nn.Module) and isinstance(mask, Tensor):
            causal = torch.full(mask.shape, float("-inf"), device="cpu").triu_(1)
            part.register_buffer("attn_mask", causal, persistent=False)


def _computed_tensors(module: nn.Module) -> list[str]:
    """Tensors some timm towers compute when they are built and keep outside their weights."""
    stored = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    return [
        f"{path}.{name}"
        for path, part in module.named_modules()
        for name, value in (*vars(part).items(), *part.named_buffers(recurse=False))
        if isinstance(value, Tensor) and value.is_meta and id(value) not in stored
    ]


def _local_text_model(name: str, folder: Path | None) -> Path:
    """Find the local folder of a transformers text tower; its configuration is read and no code run."""
    found = find_local_files(name, "config.json", folder)
    if found is None:
        raise config_error(
            f"the text tower {name:.80} beside the checkpoint or in the Hugging Face cache", "neither"
        )
    if "auto_map" in read_json(found / "config.json"):
        raise config_error(f"a text tower transformers knows in {found}", "one with its own code (auto_map)")
    return found
