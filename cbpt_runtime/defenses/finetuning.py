"""Contrastive tuning of both towers on a few labelled images: FT, and CleanCLIP on top of it.

Published defences of this kind take image-caption pairs from the web; few clean images with labels are what
this tool is given, so a caption is a template filled with the class name, drawn anew each step, and images of
the same class in a batch are no negatives of each other. The augmentation is that of CleanCLIP and ABD.

Source: Bansal et al., "CleanCLIP: mitigating data poisoning attacks in multimodal contrastive learning",
ICCV 2023: the loss between images and captions, plus the mean of a contrastive loss between images and
their AutoAugmented copies and one between captions and their augmented copies, all with the model's one
temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor

from cbpt_runtime.config import Between, is_mixed
from cbpt_runtime.defenses.defense import Defense
from cbpt_runtime.errors import PurificationError
from cbpt_runtime.models.clip import DualEncoder
from cbpt_runtime.models.data import CleanSplit
from cbpt_runtime.models.pixels import to_float
from cbpt_runtime.models.trainable import (
    MAX_LOGIT_SCALE,
    TrainableClip,
    batches,
    cosine_rate,
    labelled_contrastive_loss,
    make_optimizer,
    trainable_from,
)
from cbpt_runtime.progress import Progress
from cbpt_runtime.purification.method import SuspectModel

_CHANGED_RATE = 0.1
_MAX_SEED = 2**31


def auto_augmented(
    images: UInt8[np.ndarray, "batch height width 3"], generator: torch.Generator
) -> UInt8[np.ndarray, "batch height width 3"]:
    """Every image under a random sub-policy of AutoAugment's ImageNet policy (arXiv:1805.09501).

    torchvision draws from torch's global generator; it is seeded for the call and then put back.
    """
    from torchvision.transforms import AutoAugment

    policy = AutoAugment()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(drawn_seed(generator))
        return np.stack([np.asarray(policy(Image.fromarray(image))) for image in images])


def easily_augmented(text: str, rng: np.random.Generator) -> str:
    """Return a caption with about a tenth of its words, at least one, swapped, deleted or said twice.

    Three of the four operations of easy data augmentation (Wei and Zou, arXiv:1901.11196). Synonyms would
    need a thesaurus: none is put in place of a word, and the word inserted is one of the text.
    """
    words = text.split()
    operation = int(rng.integers(3))
    for _ in range(max(1, round(_CHANGED_RATE * len(words)))):
        first, second = (int(index) for index in rng.integers(len(words), size=2))
        if operation == 0:
            words[first], words[second] = words[second], words[first]
        elif operation == 1 and len(words) > 1:
            del words[first]
        else:
            words.insert(second, words[first])
    return " ".join(words)


def drawn_seed(generator: torch.Generator) -> int:
    """Return a seed for a generator of another kind."""
    return int(torch.randint(_MAX_SEED, (), generator=generator))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Labelled images with a caption each.

    Attributes:
        images: uint8 RGB at the model's size.
        labels: Class indices.
        captions: One text per image.
        mixed: Whether the towers run in bfloat16.
    """

    images: UInt8[np.ndarray, "batch height width 3"]
    labels: Int[Tensor, " batch"]
    captions: list[str]
    mixed: bool

    @property
    def same(self) -> Bool[Tensor, "batch batch"]:
        """Which pairs are of one class."""
        return self.labels.unsqueeze(0) == self.labels.unsqueeze(1)


BatchLoss = Callable[[TrainableClip, Batch, torch.Generator], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetune(Defense):
    """FT: contrastive fine-tuning of both towers on the clean images, captions made from templates.

    Attributes:
        epochs: Passes over the images.
        learning_rate: Peak of the cosine schedule.
        batch_size: Pairs per step.
        warmup_steps: Steps with a rising learning rate, at most a tenth of all steps.
        weight_decay: AdamW decay; none on biases, norms and the logit scale.
    """

    name: ClassVar[str] = "ft"

    epochs: Annotated[int, Between(1, 10_000)] = 10
    learning_rate: Annotated[float, Between(1e-12, 10)] = 1e-5
    batch_size: Annotated[int, Between(2, 100_000)] = 64
    warmup_steps: Annotated[int, Between(0, 1_000_000)] = 50
    weight_decay: Annotated[float, Between(0, 10)] = 0.1

    def tune(
        self,
        suspect: SuspectModel,
        head: Float[Tensor, "classes dim"],
        split: CleanSplit,
        progress: Progress | None,
    ) -> tuple[DualEncoder, Float[Tensor, "classes dim"], int]:
        """Return both towers tuned, the head of the new text tower, and how many parameters they have."""
        return self.tune_towers(suspect, split, self.loss, progress)

    def loss(self, clip: TrainableClip, batch: Batch, generator: torch.Generator) -> Float[Tensor, ""]:
        """Return CLIP's own loss between the images and captions of a batch."""
        images = image_features(clip, as_pixels(batch.images), mixed=batch.mixed)
        texts = text_features(clip, batch.captions, mixed=batch.mixed)
        return pair_loss(clip, images, texts, batch.same)

    def tune_towers(
        self, suspect: SuspectModel, split: CleanSplit, loss: BatchLoss, progress: Progress | None
    ) -> tuple[DualEncoder, Float[Tensor, "classes dim"], int]:
        """Tune a copy of the suspect with a loss; return as `tune` does."""
        encoder = suspect.encoder
        clip = trainable_from(suspect.checkpoint, device=str(encoder.device)).clone()
        tune_both_towers(clip, split, suspect.classes.texts(), self, loss, progress=progress)
        free = sum(parameter.numel() for parameter in clip.model.parameters())
        clip.model.to(memory_format=torch.contiguous_format)
        tuned = DualEncoder(clip.model, encoder.model_config, encoder.preprocess, encoder.tokenizer)
        return tuned, tuned.class_embeddings(suspect.classes), free


def tune_both_towers(
    clip: TrainableClip,
    split: CleanSplit,
    texts: Sequence[Sequence[str]],
    config: Finetune,
    loss: BatchLoss,
    *,
    progress: Progress | None = None,
) -> None:
    """Tunes in place with AdamW, a short warm-up and a cosine schedule.

    Args:
        clip: The model.
        split: Its tune images.
        texts: Captions of each class.
        config: All numbers.
        loss: Of a batch.
        progress: Told about the steps.

    Raises:
        PurificationError: The loss is no longer finite.
    """
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = make_optimizer(
        clip.model, learning_rate=config.learning_rate, weight_decay=config.weight_decay
    )
    total = config.epochs * max(1, len(split.tune_labels) // config.batch_size)
    warmup = min(config.warmup_steps, math.ceil(total / 10))
    mixed = is_mixed(config.precision, clip.device)
    clip.model.to(memory_format=torch.channels_last)
    clip.model.train()
    step = 0
    for _ in range(config.epochs):
        for index in batches(len(split.tune_labels), config.batch_size, generator):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * cosine_rate(step, warmup, total)
            value = loss(clip, _batch(split, texts, index.numpy(), generator, mixed=mixed), generator)
            check_finite(value)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            with torch.no_grad():
                clip.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)  # type: ignore[operator]
            step += 1
            if progress is not None:
                progress("tune both towers", step, total, {"loss": float(value.detach())})
    clip.model.eval()


def pair_loss(
    clip: TrainableClip,
    images: Float[Tensor, "batch dim"],
    texts: Float[Tensor, "batch dim"],
    same: Bool[Tensor, "batch batch"],
) -> Float[Tensor, ""]:
    """Return the model's own contrastive loss, pairs of one class taken as positives."""
    scale: Tensor = clip.model.logit_scale  # type: ignore[assignment]
    bias: Tensor | None = getattr(clip.model, "logit_bias", None)
    return labelled_contrastive_loss(images, texts, same.to(images.device), scale.exp(), bias)


def image_features(
    clip: TrainableClip, pixels: Float[Tensor, "batch 3 height width"], *, mixed: bool
) -> Float[Tensor, "batch dim"]:
    """Return unit features of pixels in [0, 1]."""
    with torch.autocast(clip.device.type, torch.bfloat16, enabled=mixed):
        return clip.encode_images(pixels.to(clip.device))


def text_features(clip: TrainableClip, captions: Sequence[str], *, mixed: bool) -> Float[Tensor, "batch dim"]:
    """Return unit features of texts."""
    tokens = clip.tokenizer(captions).to(clip.device)
    with torch.autocast(clip.device.type, torch.bfloat16, enabled=mixed):
        return clip.encode_tokens(tokens)


def as_pixels(images: UInt8[np.ndarray, "batch height width 3"]) -> Float[Tensor, "batch 3 height width"]:
    """Pixels in [0, 1], channels last in memory: convolutions are faster so."""
    return to_float(images).contiguous(memory_format=torch.channels_last)


def check_finite(loss: Tensor) -> None:
    """Raise PurificationError where a loss is not a number any more."""
    if not bool(loss.isfinite()):
        raise PurificationError(
            expected="a finite loss while tuning",
            got=str(float(loss)),
            fix="Lower `learning_rate` with --config.",
        )


def _batch(
    split: CleanSplit,
    texts: Sequence[Sequence[str]],
    index: Int[np.ndarray, " batch"],
    generator: torch.Generator,
    *,
    mixed: bool,
) -> Batch:
    labels = split.tune_labels[index]
    rng = np.random.default_rng(drawn_seed(generator))
    captions = [texts[label][int(rng.integers(len(texts[label])))] for label in labels]
    return Batch(
        images=split.tune_images[index], labels=torch.as_tensor(labels).long(), captions=captions, mixed=mixed
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanClip(Finetune):
    """CleanCLIP: FT with self-supervision within each modality.

    Attributes:
        self_supervision_weight: Weight of the mean of the image-image and the text-text loss.
    """

    name: ClassVar[str] = "cleanclip"

    self_supervision_weight: Annotated[float, Between(0, 1_000)] = 1.0

    def loss(self, clip: TrainableClip, batch: Batch, generator: torch.Generator) -> Float[Tensor, ""]:
        """Return CleanCLIP's loss of a batch."""
        rng = np.random.default_rng(drawn_seed(generator))
        changed_images = auto_augmented(batch.images, generator)
        changed_captions = [easily_augmented(caption, rng) for caption in batch.captions]
        count = len(batch.captions)
        pixels = as_pixels(np.concatenate([batch.images, changed_images]))
        images = image_features(clip, pixels, mixed=batch.mixed).split(count)
        texts = text_features(clip, [*batch.captions, *changed_captions], mixed=batch.mixed).split(count)
        within_images = _within(clip, images, torch.eye(count, dtype=torch.bool))
        within_texts = _within(clip, texts, batch.same)
        across = pair_loss(clip, images[0], texts[0], batch.same)
        return across + self.self_supervision_weight * (within_images + within_texts) / 2


def _within(
    clip: TrainableClip,
    pairs: tuple[Float[Tensor, "batch dim"], ...],
    same: Bool[Tensor, "batch batch"],
) -> Float[Tensor, ""]:
    originals, copies = pairs
    scale: Tensor = clip.model.logit_scale  # type: ignore[assignment]
    return labelled_contrastive_loss(originals, copies, same.to(copies.device), scale.exp(), None)
