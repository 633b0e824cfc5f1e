"""The parts of contrastive training: loss, optimiser, learning rate, batches, and moved images."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

MAX_LOGIT_SCALE = math.log(100.0)


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
