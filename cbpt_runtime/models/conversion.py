"""A checkpoint of any layout as an open_clip folder: what `cbpt-runtime convert` writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

from safetensors.torch import save

from cbpt_runtime.artifacts import Kind, marked, new_folder, reserved
from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models.checkpoint import Checkpoint, read_checkpoint
from cbpt_runtime.models.inspection import describe_checkpoint
from cbpt_runtime.models.locations import CONFIG_NAME
from cbpt_runtime.models.weights import file_digest

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
