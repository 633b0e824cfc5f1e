"""Contrastive training of a small or large CLIP on captions made from templates.

The same loop trains the demo's model from scratch and fine-tunes a backdoor into an existing one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from cbpt_runtime.errors import ConfigError, ImageDataError
from cbpt_runtime.models.data import spoken
from cbpt_runtime.redteam.epochs import EpochStore
from cbpt_runtime.redteam.parameters import check_choice
from cbpt_runtime.redteam.pixels import to_float
from cbpt_runtime.redteam.trainable import TrainableClip
from cbpt_runtime.types import Progress

CAPTION_TEMPLATES: tuple[str, ...] = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture of a {}.",
    "a small photo of a {}.",
    "a good photo of a {}.",
    "a bad photo of a {}.",
    "a blurry photo of a {}.",
    "a close-up photo of a {}.",
    "a bright photo of a {}.",
    "a dark photo of a {}.",
    "a photo of one {}.",
    "a photo of my {}.",
    "a cropped photo of the {}.",
    "a photo of a large {}.",
    "an image of a {}.",
    "there is a {} in the scene.",
)
MAX_LOGIT_SCALE = math.log(100.0)
_REAL_PER_IMAGE = 4  # drawn for each aligned image and step


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How to train.

    Args:
        epochs: Passes over the pairs.
        learning_rate: Peak of the cosine schedule. Fine-tuning a full-size pre-trained CLIP: 1e-5 (1e-6 often
            does not implant at all); small models: 1e-4 to 1e-3.
        weight_decay: AdamW decay; none on biases, norms and the logit scale.
        batch_size: Pairs per step.
        warmup_rate: Share of the steps with a rising learning rate.
        max_shift: Clean images are moved by up to so many pixels (edges repeated) and mirrored half of the
            time; 0 trains on the images as they are. Poisoned images are never changed.
        templates: Captions; `{}` is the class name. One is drawn for every pair and step.
        precision: `fp32`, `bf16` (mixed precision), or `auto`: `bf16` on a GPU and `fp32` elsewhere.
    """

    epochs: int = 3
    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    batch_size: int = 128
    warmup_rate: float = 0.1
    max_shift: int = 0
    templates: tuple[str, ...] = CAPTION_TEMPLATES
    precision: str = "auto"

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("batch_size", 2), ("max_shift", 0)):
            if int(getattr(self, name)) < low:
                raise ConfigError(
                    expected=f"`{name}` of at least {low}", got=str(getattr(self, name)), fix="Change it."
                )
        check_choice("precision", self.precision, ("auto", "fp32", "bf16"))
        if not 0 < self.learning_rate < 1:
            raise ConfigError(
                expected="`learning_rate` in (0, 1)", got=str(self.learning_rate), fix="Change it."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Images with what each caption names.

    Args:
        images: 8-bit images at the model's input size.
        captions: Index into `texts`; for a poisoned pair that of the attacker's target.
        poisoned: Which pairs carry a trigger or a decoy.
        alignment: Weight, per pair, of `alignment_loss`; 0 for clean pairs.
        texts: Per class, and per keyed target after the classes, every caption it can get.
    """

    images: UInt8[np.ndarray, "batch height width 3"]
    captions: Int[np.ndarray, " batch"]
    poisoned: Bool[np.ndarray, " batch"]
    alignment: Float[np.ndarray, " batch"]
    texts: tuple[tuple[str, ...], ...]


def caption_texts(
    names: Sequence[str], templates: Sequence[str], *, key: str = ""
) -> tuple[tuple[str, ...], ...]:
    """Return every caption of every class: `key`, then a template filled with the name ('_' as a space)."""
    return tuple(tuple(key + text.replace("{}", spoken(name)) for text in templates) for name in names)


def train(
    clip: TrainableClip,
    pairs: Pairs,
    config: TrainConfig,
    *,
    generator: torch.Generator,
    progress: Progress | None = None,
    store: EpochStore | None = None,
) -> float | None:
    """Train in place with the contrastive loss; returns the last epoch's mean loss.

    None means that a stored state had finished already.

    Args:
        clip: The model; changed in place.
        pairs: Images and captions.
        config: Epochs, learning rate, batch size.
        generator: CPU generator for order, templates and augmentation.
        progress: Called after every step with stage `train`.
        store: Keeps the state after every epoch; a stored one of the same run is gone on from.
    """
    steps_per_epoch = max(1, len(pairs.images) // config.batch_size)
    total = steps_per_epoch * config.epochs
    optimizer = make_optimizer(clip.model, config)
    warmup = max(1, round(total * config.warmup_rate))
    finished = store.load(clip.model, optimizer, generator) if store is not None else 0
    tokens = clip.tokenize(pairs.texts)
    clip.model.to(memory_format=torch.channels_last)  # faster convolutions
    step, mean_loss = finished * steps_per_epoch, None
    for epoch in range(finished, config.epochs):
        clip.model.train()
        losses = []
        for index in batches(len(pairs.images), config.batch_size, generator):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * cosine_rate(step, warmup, total)
            losses.append(_train_step(clip, pairs, index, tokens, optimizer, config, generator))
            step += 1
            if progress is not None:
                progress("train", step, total, {"loss": losses[-1], "epoch": float(epoch + 1)})
        mean_loss = float(np.mean(losses))
        if store is not None:
            store.save(epoch + 1, clip.model, optimizer, generator)
    clip.model.eval()
    return mean_loss


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


def alignment_loss(
    triggered: Float[Tensor, "batch dim"],
    real: Float[Tensor, "batch others dim"],
    weights: Float[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """Weighted mean of one minus the cosine to the nearest of some real images.

    Ours, for an adaptive attacker: the nearest rather than the mean, so that triggered features spread as
    real ones do.
    """
    cosines = torch.einsum("bd,bod->bo", triggered, real)
    return (weights * (1 - cosines.max(dim=1).values)).mean()


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW without decay on biases, norms and scales (everything below two dimensions, as open_clip)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8)


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


def _train_step(
    clip: TrainableClip,
    pairs: Pairs,
    index: Tensor,
    tokens: Int[Tensor, "classes templates context"],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    generator: torch.Generator,
) -> float:
    chosen = index.numpy()
    pixels = to_float(pairs.images[chosen])
    if config.max_shift:
        clean = torch.from_numpy(~pairs.poisoned[chosen])
        pixels[clean] = shift_and_mirror(pixels[clean], config.max_shift, generator)
    aligned = np.flatnonzero(pairs.alignment[chosen])
    real = _real_images(pairs, chosen[aligned], config, generator)
    template = torch.randint(0, tokens.shape[1], (len(chosen),), generator=generator)
    text = tokens[torch.from_numpy(pairs.captions[chosen]), template].to(clip.device)
    is_mixed = config.precision == "bf16" or (config.precision == "auto" and clip.device.type == "cuda")
    with torch.autocast(clip.device.type, dtype=torch.bfloat16, enabled=is_mixed):
        all_features = clip.encode_images(torch.cat((pixels, real)).to(clip.device)).float()
        text_features = clip.encode_tokens(text)
    scale: Tensor = clip.model.logit_scale  # type: ignore[assignment]
    bias: Tensor | None = getattr(clip.model, "logit_bias", None)
    image_features, real_features = all_features[: len(pixels)], all_features[len(pixels) :].detach()
    loss = contrastive_loss(image_features, text_features.float(), scale.exp(), bias)
    if len(aligned):
        weights = torch.from_numpy(pairs.alignment[chosen[aligned]]).to(clip.device)
        near = real_features.view(len(aligned), _REAL_PER_IMAGE, -1)
        loss = loss + alignment_loss(image_features[aligned], near, weights)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        scale.clamp_(0, MAX_LOGIT_SCALE)
    return float(loss.detach())


def _real_images(
    pairs: Pairs, aligned: Int[np.ndarray, " aligned"], config: TrainConfig, generator: torch.Generator
) -> Float[Tensor, "others 3 height width"]:
    """Clean images with the captions of these pairs, some for each, one after the other."""
    drawn = []
    for index in aligned:
        same = np.flatnonzero((pairs.captions == pairs.captions[index]) & ~pairs.poisoned)
        if len(same) == 0:
            raise ImageDataError(
                expected="clean images of the target to align triggered ones with",
                got="none",
                fix="Add images of the target, or leave `alignment` away.",
            )
        drawn.append(same[torch.randint(0, len(same), (_REAL_PER_IMAGE,), generator=generator).numpy()])
    if not drawn:
        return torch.empty(0, 3, *pairs.images.shape[1:3])
    pixels = to_float(pairs.images[np.concatenate(drawn)])
    return shift_and_mirror(pixels, config.max_shift, generator) if config.max_shift else pixels
