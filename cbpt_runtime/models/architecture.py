"""The open_clip modules a checked configuration describes, empty or with weights; what weights lack for them.

They differ in names, shapes, kinds of numbers and image size. Prefixes that wrappers left can be removed, and
position embeddings resized.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import _build_vision_tower
from torch import Tensor, nn

from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models.config import config_error, is_custom_text, read_json
from cbpt_runtime.models.hub import find_local_files
from cbpt_runtime.models.visual_prompts import PromptedTower, split_prompts
from cbpt_runtime.models.weights import first_few

# Parts of a name that wrappers add in the middle of it, around one tower or block.
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_MAX_PREFIX_PARTS = 4
POSITIONS = (
    "visual.positional_embedding",
    "visual.attnpool.positional_embedding",
    "visual.trunk.pos_embed",
)
"""Where image towers keep one embedding per patch."""
_MOST_PIXELS = 4096
_RESNET_STRIDE = 32
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


def without_prefixes(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Remove what wrappers and larger models put before the names of all weights, or of those of one tower.

    A prefix goes where the architecture does not know it, all names that have it are known without it, and no
    two weights get one name.

    Returns:
        The weights, and the prefixes that were removed with the number of names they were removed from.
    """
    renamed, removed = _without_wrappers(tensors, expected)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in renamed:
        parts = name.split(".")
        for length in range(1, min(len(parts), _MAX_PREFIX_PARTS + 1)):
            groups[".".join(parts[:length]) + "."].append(name)
    for prefix, names in groups.items():
        held = {name: name.removeprefix(prefix) for name in names if name in renamed}
        is_foreign = not any(name in expected for name in held)
        is_common = len(held) == len(renamed) and any(name in expected for name in held.values())
        fits = bool(held) and all(name in expected and name not in renamed for name in held.values())
        if is_foreign and (is_common or fits):
            renamed = {held.get(name, name): value for name, value in renamed.items()}
            removed[prefix] = len(held)
    return renamed, removed


def key_problems(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], image_size: Sequence[int] = ()
) -> Iterator[str]:
    """Says which weights are missing, unknown to the architecture, or of another shape or kind of number.

    Args:
        tensors: The weights.
        expected: Those of the architecture.
        image_size: Height and width the architecture takes, to say more where only these differ.
    """
    # torch fills in this counter of batch norm; some converters leave it out.
    missing = [key for key in expected if key not in tensors and not key.endswith(".num_batches_tracked")]
    unexpected = [key for key in tensors if key not in expected]
    misshaped = [
        f"{key} {list(tensors[key].shape)} instead of {list(weight.shape)}"
        for key, weight in expected.items()
        if key in tensors and tensors[key].shape != weight.shape
    ]
    integers = [
        key
        for key, weight in expected.items()
        if key in tensors and weight.is_floating_point() and not tensors[key].is_floating_point()
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped, "of integers": integers}
    for kind, keys in kinds.items():
        if keys:
            yield f"{len(keys)} weights {kind}: {first_few(keys)}"
    trained = trained_image_size(tensors, expected, image_size)
    if trained is not None and len(misshaped) == 1 and not missing:
        yield (
            f"the weights are for images of {trained} pixels, the configuration says {image_size[0]}:"
            f" --image-size {trained} takes them as they are, --image-size {image_size[0]} resizes their"
            " position embeddings"
        )


def trained_image_size(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], image_size: Sequence[int]
) -> int | None:
    """Return the image size of the position embeddings, where it is not the configuration's.

    Both square; None where they agree or it cannot be told.
    """
    if len(set(image_size)) != 1:
        return None
    for key in POSITIONS:
        if key in tensors and key in expected and tensors[key].shape != expected[key].shape:
            given, wanted = tensors[key].shape, expected[key].shape
            if len(given) < 2 or given[-1] != wanted[-1]:
                return None
            side = math.isqrt(wanted[-2])  # besides the patches there may be a class token
            extra = wanted[-2] - side * side
            trained = math.isqrt(max(0, given[-2] - extra))
            is_square = trained * trained + extra == given[-2] and side > 0 and extra < 2
            return trained * (image_size[0] // side) if is_square and trained != side else None
    return None


def value_problems(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Says which weights hold NaN or infinite values."""
    broken = [key for key, tensor in tensors.items() if not _is_finite(tensor)]
    if broken:
        yield f"{len(broken)} weights with NaN or infinite values: {first_few(broken)}"


def _without_wrappers(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    renamed, removed = dict(tensors), {}
    for wrapper in _WRAPPERS:
        inside = {
            name: f".{name}".replace(f".{wrapper}", ".")[1:] for name in renamed if name not in expected
        }
        inside = {name: short for name, short in inside.items() if short != name}
        shortened = {inside.get(name, name): value for name, value in renamed.items()}
        if inside and len(shortened) == len(renamed):
            renamed, removed[wrapper] = shortened, len(inside)
    return renamed, removed


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    wide = tensor if tensor.element_size() > 1 else tensor.float()  # 8-bit floats have no isfinite
    return bool(torch.isfinite(wide).all())


def with_image_size(config: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Return a model configuration with another image size.

    Raises:
        CheckpointError: A size that the patches of the image tower do not fill.
    """
    vision = dict(config.get("vision_cfg") or {})
    is_resnet = isinstance(vision.get("layers"), list | tuple)
    patch = (
        _RESNET_STRIDE if is_resnet else vision.get("patch_size", 1 if vision.get("timm_model_name") else 16)
    )
    if not isinstance(patch, int) or not 0 < image_size <= _MOST_PIXELS or image_size % patch:
        raise CheckpointError(
            expected=f"an image size of up to {_MOST_PIXELS} pixels in whole patches of {patch}",
            got=str(image_size),
            fix="Choose another --image-size.",
        )
    return {**config, "vision_cfg": {**vision, "image_size": image_size}}


def resize_positions(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Position embeddings brought to the architecture's grid of patches, bicubically as open_clip does it.

    Those of a class token stay as they are. Where no square grids are to be seen nothing is changed.

    Returns:
        The weights, and remarks on what was resized.
    """
    resized, notes = dict(tensors), []
    for key in POSITIONS:
        if key not in tensors or key not in expected or tensors[key].shape == expected[key].shape:
            continue
        given, wanted = tensors[key], expected[key]
        side = math.isqrt(wanted.shape[-2])
        extra = wanted.shape[-2] - side * side
        trained = math.isqrt(max(0, given.shape[-2] - extra))
        if extra > 1 or not trained or trained * trained + extra != given.shape[-2]:
            continue
        rows = given.reshape(given.shape[-2:]).float()
        grid = rows[extra:].reshape(1, trained, trained, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
        patches = grid.permute(0, 2, 3, 1).reshape(side * side, -1)
        both = F.pad(patches, (0, 0, extra, 0))
        both[:extra] = rows[:extra]
        resized[key] = both.reshape((*given.shape[:-2], *both.shape)).to(given.dtype)
        notes.append(f"{key} resized from {trained}×{trained} to {side}×{side} patches, as asked for")
    return resized, tuple(notes)
