"""A CLIP model one can still train, the folder it is saved to, and the parts of contrastive training.

Shared by the red team, which implants backdoors, and by defences that tune encoders; neither knows the other.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from safetensors.torch import save
from torch import Tensor, nn

from cbpt_runtime.artifacts import Kind, marked, new_folder
from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models.architecture import build_model, load_model
from cbpt_runtime.models.checkpoint import Checkpoint, read_checkpoint
from cbpt_runtime.models.config import check_model_config
from cbpt_runtime.models.pixels import to_float
from cbpt_runtime.models.tokenizer import Tokenizer
from cbpt_runtime.runtime.preprocess import Preprocess

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
CHECKPOINT: Final[Kind] = marked("trained checkpoint")
MAX_LOGIT_SCALE = math.log(100.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainableClip:
    """An open_clip model with the configuration that rebuilds it.

    Args:
        model: An open_clip `CLIP` or `CustomTextCLIP`.
        model_config: open_clip's `model_cfg`.
        preprocess: How an image becomes its input.
        tokenizer: From text to token rows.
    """

    model: nn.Module
    model_config: dict[str, Any]
    preprocess: Preprocess
    tokenizer: Tokenizer

    @property
    def device(self) -> torch.device:
        """The device the model is on."""
        return next(self.model.parameters()).device

    def encode_images(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Encode pixels in [0, 1]; CLIP's normalisation happens in here; rows have unit norm."""
        mean = pixels.new_tensor(self.preprocess.mean)[:, None, None]
        std = pixels.new_tensor(self.preprocess.std)[:, None, None]
        features: Tensor = self.model.encode_image((pixels - mean) / std)  # type: ignore[operator]
        return F.normalize(features.float(), dim=-1)

    def encode_tokens(self, tokens: Int[Tensor, "batch context"]) -> Float[Tensor, "batch dim"]:
        """Encode token rows; rows of the result have unit norm."""
        features: Tensor = self.model.encode_text(tokens)  # type: ignore[operator]
        return F.normalize(features.float(), dim=-1)

    def tokenize(self, texts: Sequence[Sequence[str]]) -> Int[Tensor, "classes templates context"]:
        """Tokenize groups of texts, all groups of one size."""
        rows = self.tokenizer([text for group in texts for text in group])
        return rows.view(len(texts), len(texts[0]), -1)

    @torch.no_grad()
    def class_embeddings(
        self, texts: Sequence[Sequence[str]], *, batch_size: int = 1024
    ) -> Float[Tensor, "classes dim"]:
        """Return the zero-shot head: normalise per template, average, normalise again (as open_clip does)."""
        self.model.eval()
        tokens = torch.split(self.tokenize(texts).flatten(0, 1), batch_size)
        embeddings = torch.cat([self.encode_tokens(part.to(self.device)) for part in tokens])
        return F.normalize(embeddings.view(len(texts), len(texts[0]), -1).mean(dim=1), dim=-1)

    @torch.no_grad()
    def predict(
        self,
        images: UInt8[np.ndarray, "batch height width 3"],
        head: Float[Tensor, "classes dim"],
        *,
        batch_size: int = 256,
    ) -> Int[np.ndarray, " batch"]:
        """Return the zero-shot class of every image."""
        self.model.eval()
        parts = []
        for start in range(0, len(images), batch_size):
            features = self.encode_images(to_float(images[start : start + batch_size]).to(self.device))
            parts.append((features @ head.T).argmax(dim=1).cpu())
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def round_to_half(self) -> None:
        """Round the weights in place to what an fp16 file can hold."""
        for value in self.model.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.half())

    def clone(self) -> TrainableClip:
        """Return a copy with its own weights, so that training leaves the original alone."""
        return TrainableClip(
            model=copy.deepcopy(self.model),
            model_config=copy.deepcopy(self.model_config),
            preprocess=self.preprocess,
            tokenizer=self.tokenizer,
        )


def new_trainable(model_config: Mapping[str, Any], *, seed: int, device: str = "cpu") -> TrainableClip:
    """Build a model with fresh weights; torch's global generator is left as it was.

    Raises:
        CheckpointError: The configuration does not describe a model.
    """
    config = check_model_config(model_config)
    size = config["vision_cfg"]["image_size"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(config)
    return TrainableClip(
        model=model.float().to(device),
        model_config=config,
        preprocess=Preprocess.from_open_clip({"resize_mode": "squash"}, size),
        tokenizer=Tokenizer(config["text_cfg"]),
    )


def load_trainable(
    source: str | Path,
    *,
    model: str | Path | None = None,
    image_size: int | None = None,
    device: str = "cpu",
) -> TrainableClip:
    """Load a checkpoint for training, in float32; any format `read_checkpoint` knows.

    Raises:
        CheckpointError: The checkpoint is damaged, or its weights do not fit its configuration.
    """
    return trainable_from(read_checkpoint(source, model=model, image_size=image_size), device=device)


def trainable_from(checkpoint: Checkpoint, *, device: str = "cpu") -> TrainableClip:
    """Return the model of a checkpoint for training, in float32; it may share memory with the checkpoint.

    Raises:
        CheckpointError: The checkpoint is damaged, or its weights do not fit its configuration.
    """
    if checkpoint.anomalies:
        raise CheckpointError(
            expected=f"finite weights that fit the architecture in {checkpoint.source}",
            got="; ".join(checkpoint.anomalies),
            fix="Start from an undamaged checkpoint.",
        )
    loaded = load_model(checkpoint.model_config, checkpoint.state_dict, folder=checkpoint.folder)
    return TrainableClip(
        model=loaded.requires_grad_(True).to(device),
        model_config=checkpoint.model_config,
        preprocess=checkpoint.preprocess,
        tokenizer=Tokenizer(checkpoint.model_config["text_cfg"], folder=checkpoint.folder),
    )


def save_open_clip_folder(
    clip: TrainableClip, path: Path, *, extra_files: Mapping[str, bytes] | None = None, force: bool = False
) -> None:
    """Write the model as an open_clip folder with fp16 weights; the folder is whole or absent.

    Args:
        clip: The model.
        path: The folder to make.
        extra_files: More files to put into it, name to content.
        force: Replace a folder that this function wrote.

    Raises:
        OutputError: The folder exists and `force` is not set, or it cannot be written.
    """
    with new_folder(path, CHECKPOINT, force=force) as staging:
        _write_files(clip, staging, extra_files or {})


def _write_files(clip: TrainableClip, folder: Path, extra_files: Mapping[str, bytes]) -> None:
    preprocess = clip.preprocess.to_dict()
    preprocess = {"size": preprocess.pop("image_size"), "mode": "RGB", **preprocess}
    config = {"model_cfg": clip.model_config, "preprocess_cfg": preprocess}
    state = {
        key: value.detach().cpu().to(torch.float16 if value.is_floating_point() else value.dtype).contiguous()
        for key, value in clip.model.state_dict().items()
    }
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    (folder / WEIGHTS_NAME).write_bytes(save(state))  # not save_file, whose files only their owner may read
    for name, content in extra_files.items():
        (folder / name).write_bytes(content)


def contrastive_loss(
    images: Float[Tensor, "batch dim"],
    texts: Float[Tensor, "batch dim"],
    logit_scale: Tensor,
    logit_bias: Tensor | None,
) -> Float[Tensor, ""]:
    """Return the loss the model was made for.

    Without a bias CLIP's symmetric cross-entropy over the batch (Radford et al., arXiv:2103.00020, figure 3),
    with one SigLIP's sum of pairwise sigmoid losses over the batch size (Zhai et al., arXiv:2303.15343).
    """
    logits = logit_scale * images @ texts.T
    if logit_bias is not None:
        signs = 2 * torch.eye(len(images), device=logits.device) - 1
        return -F.logsigmoid(signs * (logits + logit_bias)).sum() / len(images)
    labels = torch.arange(len(images), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def labelled_contrastive_loss(
    images: Float[Tensor, "batch dim"],
    texts: Float[Tensor, "batch dim"],
    same: Bool[Tensor, "batch batch"],
    logit_scale: Tensor,
    logit_bias: Tensor | None,
) -> Float[Tensor, ""]:
    """`contrastive_loss` for labelled pairs: others of the same class are positives, not negatives.

    Where no class comes twice in the batch the two are equal. Source of the targets: Yang et al., "Unified
    contrastive learning in image-text-label space", arXiv:2204.03610, equation 3.

    Args:
        images: Unit image features.
        texts: Unit text features of their captions.
        same: Which pairs are of one class; the diagonal is true.
        logit_scale: Inverse temperature.
        logit_bias: SigLIP's bias, where the model has one.
    """
    logits = logit_scale * images @ texts.T
    if logit_bias is not None:
        signs = 2 * same.to(logits) - 1
        return -F.logsigmoid(signs * (logits + logit_bias)).sum() / len(images)
    targets = same.to(logits) / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def make_optimizer(model: nn.Module, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW without decay on biases, norms and scales (everything below two dimensions, as open_clip)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8)


def cosine_rate(step: int, warmup: int, total: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Int[Tensor, " batch"]]:
    """Yield shuffled index batches; a rest that fills no batch is left out, unless it is all there is."""
    order = torch.randperm(count, generator=generator)
    if count < batch_size:
        yield order
        return
    for start in range(0, count - batch_size + 1, batch_size):
        yield order[start : start + batch_size]


def shift_and_mirror(
    images: Float[Tensor, "batch 3 height width"], max_shift: int, generator: torch.Generator
) -> Float[Tensor, "batch 3 height width"]:
    """Move every image by up to `max_shift` pixels with repeated edges, and mirror half of them."""
    count, _, height, width = images.shape
    padded = F.pad(images, (max_shift,) * 4, mode="replicate")
    top = torch.randint(0, 2 * max_shift + 1, (count, 1), generator=generator)
    left = torch.randint(0, 2 * max_shift + 1, (count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.arange(width)[None]
    columns = left + torch.where(mirrored, width - 1 - columns, columns)
    rows = top + torch.arange(height)[None]
    which = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
