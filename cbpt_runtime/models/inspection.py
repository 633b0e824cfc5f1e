"""What a suspect checkpoint is, and what is odd about it; built only where prompts are to be looked at.

And the same checkpoint as an open_clip folder: what `cbpt-runtime convert` writes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from safetensors.torch import save
from torch import Tensor

from cbpt_runtime.artifacts import Kind, marked, new_folder, reserved
from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models.architecture import value_problems
from cbpt_runtime.models.checkpoint import Checkpoint, read_checkpoint
from cbpt_runtime.models.class_lists import read_class_list
from cbpt_runtime.models.clip import load_dual_encoder
from cbpt_runtime.models.config import is_custom_text
from cbpt_runtime.models.locations import CONFIG_NAME, locate
from cbpt_runtime.models.prompt_words import check_prompts
from cbpt_runtime.models.tokenizer import prompt_notes
from cbpt_runtime.models.weights import file_digest, files_digest, read_weights

_DEFAULTS = {"context_length": 77, "vocab_size": 49408}
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "position_ids")
WEIGHTS_NAME = "open_clip_model.safetensors"
CONVERTED: Final[Kind] = marked("converted checkpoint")
# What a tokenizer of transformers may consist of; data, no code.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)


def inspect_checkpoint(
    source: str | Path, model: str | Path | None = None, *, image_size: int | None = None
) -> dict[str, Any]:
    """Describe a checkpoint; everything in the answer can be written as JSON.

    Args:
        source: As `read_checkpoint` takes it.
        model: As `read_checkpoint` takes it; without it a bare weights file is described by its tensors
            alone.
        image_size: As `read_checkpoint` takes it.

    Returns:
        `source`, `format`, `sha256`, `size_bytes`, `parameters` (total, image, text), `dtypes` (name to
        number of tensors), `anomalies`, `notes`, and, where the architecture is known, `architecture` (model,
        image_tower, text_tower), `embed_dim`, `image_size` (height, width), `preprocess`, `tokenizer`,
        `context_length` and `vocab_size`; these are None otherwise.

    Raises:
        CheckpointError: There is nothing to describe: missing, damaged, or a file that wants to run code.
    """
    located = locate(source, model=model)
    if located.settings is None:
        weights = read_weights(*located.weights, name=located.weights_name)
        if weights.is_openai:
            return describe_checkpoint(read_checkpoint(source, image_size=image_size))
        return {
            "source": located.source,
            "format": weights.format,
            "sha256": files_digest(located.weights),
            "size_bytes": sum(path.stat().st_size for path in located.weights),
            **_describe_config(None),
            "preprocess": None,
            **_describe_tensors(weights.tensors),
            "anomalies": list(value_problems(weights.tensors)),
            "notes": [
                *weights.notes,
                "the architecture is unknown: name it with --model to compare the weights with it",
            ],
        }
    return describe_checkpoint(read_checkpoint(source, model=model, image_size=image_size))


def inspect_prompts(
    source: str | Path,
    classes: str | Path,
    *,
    model: str | Path | None = None,
    image_size: int | None = None,
    templates: Sequence[str] | None = None,
) -> dict[str, Any]:
    """As `inspect_checkpoint`, with `prompts`: what the words in a class list's prompts do to the classes.

    The text tower is built and asked for it; that takes seconds to minutes.

    Args:
        source: As `read_checkpoint` takes it.
        classes: The class list.
        model: As `read_checkpoint` takes it.
        image_size: As `read_checkpoint` takes it.
        templates: For classes without their own; the 80 ImageNet templates if None.

    Raises:
        CheckpointError: The checkpoint cannot be read or its model not be built.
        ClassListError: Missing or malformed class list, or prompts that do not tell the classes apart.
    """
    listed = read_class_list(classes, templates=templates)
    checkpoint = read_checkpoint(source, model=model, image_size=image_size)
    encoder = load_dual_encoder(checkpoint)
    notes = prompt_notes(listed, encoder.tokenizer)
    found = check_prompts(encoder, listed)
    described = describe_checkpoint(checkpoint)
    described["notes"] += [*notes, *found.notes()]
    return {**described, "prompts": found.to_dict()}


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what `inspect_checkpoint` answers, of a checkpoint that was read."""
    return {
        "source": checkpoint.source,
        "format": checkpoint.format,
        "sha256": checkpoint.sha256,
        "size_bytes": checkpoint.size_bytes,
        **_describe_config(checkpoint.model_config),
        "image_size": list(checkpoint.preprocess.image_size),
        "preprocess": checkpoint.preprocess.to_dict(),
        **_describe_tensors(checkpoint.state_dict),
        "anomalies": list(checkpoint.anomalies),
        "notes": list(checkpoint.notes),
    }


def _describe_config(config: Mapping[str, Any] | None) -> dict[str, Any]:
    if config is None:
        names = ("architecture", "embed_dim", "image_size", "tokenizer", "context_length", "vocab_size")
        return dict.fromkeys(names)
    vision, text = config["vision_cfg"], config["text_cfg"]
    native = "ModifiedResNet" if isinstance(vision.get("layers"), list | tuple) else "VisionTransformer"
    return {
        "architecture": {
            "model": "CustomTextCLIP" if is_custom_text(config) else "CLIP",
            "image_tower": vision.get("timm_model_name") or native,
            "text_tower": text.get("hf_model_name") or "TextTransformer",
        },
        "embed_dim": config["embed_dim"],
        "image_size": None,
        "tokenizer": text.get("hf_tokenizer_name") or "open_clip BPE",
        "context_length": text.get("context_length", _DEFAULTS["context_length"]),
        "vocab_size": text.get("vocab_size", _DEFAULTS["vocab_size"]),
    }


def _describe_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    sizes = {name: math.prod(tensor.shape) for name, tensor in tensors.items() if not name.endswith(_BUFFERS)}
    image = sum(size for name, size in sizes.items() if name.startswith("visual."))
    head = sum(size for name, size in sizes.items() if name in ("logit_scale", "logit_bias"))
    total = sum(sizes.values())
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    return {
        "parameters": {"total": total, "image": image, "text": total - image - head},
        "dtypes": dict(dtypes.most_common()),
    }


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    model: str | Path | None = None,
    image_size: int | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint as an open_clip folder; whole or not at all, and nothing of it is executed.

    Weights keep their numbers and their type, unless position embeddings are resized. A tokenizer that lies
    beside the checkpoint comes along.

    Args:
        source: In any form `read_checkpoint` takes.
        output: The folder to make; its parents are made too.
        model: Architecture or configuration file, for checkpoints that do not say.
        image_size: Side of the input, instead of the configuration's; position embeddings are resized.
        force: Replace a folder that this function wrote.

    Returns:
        What `inspect_checkpoint` says of the source, with `output`, and `output_sha256` of its weights.

    Raises:
        CheckpointError: It cannot be read, or its weights do not fit its architecture.
        OutputError: The output exists, or cannot be written.
    """
    output = Path(output)
    with reserved(output, CONVERTED, force=force):
        checkpoint = read_checkpoint(source, model=model, image_size=image_size)
        if checkpoint.anomalies:
            raise CheckpointError(
                expected=f"finite weights that fit the architecture in {checkpoint.source}",
                got="; ".join(checkpoint.anomalies),
                fix="Name the architecture the weights are for (--model), or get an undamaged file.",
            )
        with new_folder(output, CONVERTED, force=force) as staging:
            _write(checkpoint, staging)
    return {
        **describe_checkpoint(checkpoint),
        "output": str(output),
        "output_sha256": file_digest(output / WEIGHTS_NAME),
    }


def _write(checkpoint: Checkpoint, folder: Path) -> None:
    preprocess = checkpoint.preprocess.to_dict()
    preprocess = {"size": preprocess.pop("image_size"), "mode": "RGB", **preprocess}
    config = {"model_cfg": checkpoint.model_config, "preprocess_cfg": preprocess}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    tensors = {name: tensor.contiguous().clone() for name, tensor in checkpoint.state_dict.items()}
    (folder / WEIGHTS_NAME).write_bytes(save(tensors))
    text = checkpoint.model_config["text_cfg"]
    wanted = [*(_TOKENIZER_FILES if text.get("hf_tokenizer_name") else ())]
    wanted += ["config.json"] if text.get("hf_model_name") else []
    for name in wanted:
        if checkpoint.folder is not None and (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
