"""From a suspect and a few clean images to an encoder tuned by one of the methods."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from cbpt_runtime.defenses.abd import adversarial_loss, adversarial_patch
from cbpt_runtime.defenses.cleanclip import self_supervised_loss
from cbpt_runtime.defenses.config import AbdConfig, CleanClipConfig, DefenseConfig, FinetuneConfig, RvptConfig
from cbpt_runtime.defenses.finetuning import BatchLoss, as_pixels, caption_loss, tune_both_towers
from cbpt_runtime.defenses.rvpt import tune_visual_prompts
from cbpt_runtime.errors import ConfigError
from cbpt_runtime.models.checkpoint import Checkpoint
from cbpt_runtime.models.clip import DualEncoder
from cbpt_runtime.models.data import ClassList, CleanSplit
from cbpt_runtime.progress import Progress
from cbpt_runtime.training.trainable import trainable_from

_BATCH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """What a method made of a suspect.

    Attributes:
        encoder: The tuned model, frozen again.
        class_embeddings: Its zero-shot head.
        changed: 'tuned' where weights of the image tower changed, 'prompted' where it got prompts.
        trainable_parameters: How many numbers were free.
        metrics: Clean accuracy before and after, in [0, 1], on held-out images or else the tune images.
        stage_seconds: Wall time.
    """

    encoder: DualEncoder
    class_embeddings: Tensor
    changed: str
    trainable_parameters: int
    metrics: dict[str, float]
    stage_seconds: dict[str, float]


def repair(
    checkpoint: Checkpoint,
    suspect: DualEncoder,
    classes: ClassList,
    split: CleanSplit,
    config: DefenseConfig,
    *,
    progress: Progress | None = None,
) -> Repair:
    """Tunes the image tower of a suspect; neither target nor trigger is looked for.

    Args:
        checkpoint: The suspect as it was read.
        suspect: Its frozen model; stays as it is.
        classes: Names and templates; captions are made from the templates.
        split: Clean images: some to tune on, others to measure on.
        config: The method and its numbers.
        progress: Told how far the work is.

    Raises:
        ConfigError: The method does not work with this architecture.
        PurificationError: Tuning failed.
    """
    start = time.perf_counter()
    head = suspect.class_embeddings(classes)
    if isinstance(config, RvptConfig):
        tower = tune_visual_prompts(suspect, head, split, config, progress=progress)
        encoder, changed = suspect.with_image_tower(tower), "prompted"
        free = sum(prompt.numel() for prompt in tower.visual_prompts)
        tuned_head = head
    elif isinstance(config, FinetuneConfig):
        encoder, free = _tuned(checkpoint, suspect, head, classes, split, config, progress)
        changed, tuned_head = "tuned", encoder.class_embeddings(classes)
    else:
        raise ConfigError(
            expected="the configuration of a method", got=type(config).__name__, fix="See defenses.config."
        )
    seconds = time.perf_counter() - start
    return Repair(
        encoder=encoder,
        class_embeddings=tuned_head,
        changed=changed,
        trainable_parameters=free,
        metrics={
            "heldout_images": float(len(split.heldout_labels) or len(split.tune_labels)),
            "heldout_ca_before": _accuracy(suspect, head, split),
            "heldout_ca_after": _accuracy(encoder, tuned_head, split),
        },
        stage_seconds={config.method: seconds},
    )


def _tuned(
    checkpoint: Checkpoint,
    suspect: DualEncoder,
    head: Tensor,
    classes: ClassList,
    split: CleanSplit,
    config: FinetuneConfig,
    progress: Progress | None,
) -> tuple[DualEncoder, int]:
    """Both towers tuned, and how many parameters they have."""
    loss: BatchLoss
    match config:
        case AbdConfig():
            patch = adversarial_patch(suspect, head, split, config, progress=progress)
            loss = adversarial_loss(patch, config)
        case CleanClipConfig():
            loss = self_supervised_loss(config)
        case _:
            loss = caption_loss
    clip = trainable_from(checkpoint, device=str(suspect.device)).clone()  # the suspect keeps its weights
    tune_both_towers(clip, split, classes.texts(), config, loss, progress=progress)
    free = sum(parameter.numel() for parameter in clip.model.parameters())
    clip.model.to(memory_format=torch.contiguous_format)
    tuned = DualEncoder(clip.model, suspect.model_config, suspect.preprocess, suspect.tokenizer)
    return tuned, free


@torch.no_grad()
def _accuracy(encoder: DualEncoder, head: Tensor, split: CleanSplit) -> float:
    has_heldout = len(split.heldout_labels) > 0
    images = split.heldout_images if has_heldout else split.tune_images
    labels = torch.as_tensor(split.heldout_labels if has_heldout else split.tune_labels).to(head.device)
    called = [
        (encoder.encode_images(as_pixels(images[start : start + _BATCH])) @ head.T).argmax(dim=1)
        for start in range(0, len(images), _BATCH)
    ]
    return float((torch.cat(called) == labels).float().mean())
