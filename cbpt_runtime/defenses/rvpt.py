"""RVPT: visual prompts that lead a frozen image tower another way than the backdoor's.

Source: "Repulsive visual prompt tuning", NeurIPS 2025. Prompts at the later layers are tuned on a few
labelled clean images with a cross-entropy against the fixed text features, plus a repulsion: the mean, over
the prompted layers, of the cosine between the class token with prompts and the class token without. Towers
without tokens, and their counterpart of the class token, are our reading: see `models.visual_prompts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from cbpt_runtime.config import Between, is_mixed
from cbpt_runtime.defenses.defense import Defense
from cbpt_runtime.defenses.finetuning import as_pixels, check_finite
from cbpt_runtime.models.clip import DualEncoder
from cbpt_runtime.models.data import CleanSplit
from cbpt_runtime.models.trainable import batches, cosine_rate, shift_and_mirror
from cbpt_runtime.models.visual_prompts import PromptedTower, initial_prompts, run_tower
from cbpt_runtime.progress import Progress
from cbpt_runtime.purification.method import SuspectModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Rvpt(Defense):
    """RVPT: visual prompts at the later layers of the frozen image tower, by SGD.

    Attributes:
        tokens: Prompt tokens per layer of a vision transformer; a ResNet has one map per stage.
        first_layer: Layers before it get no prompts; a quarter of the layers if None.
        repulsion_weight: Weight of the cosine between prompted and original features inside the tower.
        epochs: Passes over the images.
        learning_rate: Peak of the cosine schedule.
        momentum: Momentum of SGD.
        batch_size: Images per step.
        max_shift: Images are moved by up to so many pixels and mirrored half of the time.
    """

    name: ClassVar[str] = "rvpt"
    parameterization: ClassVar[str] = "visual-prompt"
    tower: ClassVar[str] = "prompted"

    tokens: Annotated[int, Between(1, 10_000)] = 50
    first_layer: Annotated[int | None, Between(0, 1_000)] = None
    repulsion_weight: Annotated[float, Between(0, 1_000)] = 2.0
    epochs: Annotated[int, Between(1, 10_000)] = 50
    learning_rate: Annotated[float, Between(1e-12, 10)] = 0.002
    momentum: Annotated[float, Between(0, 0.9999)] = 0.9
    batch_size: Annotated[int, Between(2, 100_000)] = 32
    max_shift: Annotated[int, Between(0, 1_000)] = 4

    def tune(
        self,
        suspect: SuspectModel,
        head: Float[Tensor, "classes dim"],
        split: CleanSplit,
        progress: Progress | None,
    ) -> tuple[DualEncoder, Float[Tensor, "classes dim"], int]:
        """Return the model with prompts in its image tower, the old head, and the size of the prompts."""
        tower = tune_visual_prompts(suspect.encoder, head, split, self, progress=progress)
        free = sum(prompt.numel() for prompt in tower.visual_prompts)
        return suspect.encoder.with_image_tower(tower), head, free


def tune_visual_prompts(
    encoder: DualEncoder,
    texts: Float[Tensor, "classes dim"],
    split: CleanSplit,
    config: Rvpt,
    *,
    progress: Progress | None = None,
) -> PromptedTower:
    """Tunes prompts by SGD with a cosine schedule; the tower itself stays as it is.

    Args:
        encoder: The suspect.
        texts: Its class embeddings.
        split: Its tune images.
        config: All numbers.
        progress: Told about the steps.

    Raises:
        ConfigError: A tower that prompts cannot be put into.
        PurificationError: The loss is no longer finite.
    """
    images = encoder.image_encoder
    tower = images.module
    start = initial_prompts(
        tower,
        images.preprocess.image_size,
        tokens=config.tokens,
        first_layer=config.first_layer,
        seed=config.seed,
    )
    prompts = [prompt.requires_grad_() for prompt in start]
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.SGD(prompts, lr=config.learning_rate, momentum=config.momentum)
    total = config.epochs * max(1, len(split.tune_labels) // config.batch_size)
    mixed, step = is_mixed(config.precision, encoder.device), 0
    for _ in range(config.epochs):
        for index in batches(len(split.tune_labels), config.batch_size, generator):
            optimizer.param_groups[0]["lr"] = config.learning_rate * cosine_rate(step, 0, total)
            pixels = as_pixels(split.tune_images[index.numpy()])
            if config.max_shift:
                pixels = shift_and_mirror(pixels, config.max_shift, generator)
            normalised = images.normalise(pixels)
            labels = torch.as_tensor(split.tune_labels[index.numpy()]).long().to(encoder.device)
            with torch.autocast(encoder.device.type, torch.bfloat16, enabled=mixed):
                features, seen = run_tower(tower, normalised, prompts, marks=len(prompts))
                with torch.no_grad():
                    _, original = run_tower(tower, normalised, [], marks=len(prompts))
            loss = prompt_loss(features.float(), texts, labels, encoder.logit_scale)
            loss = loss + config.repulsion_weight * repulsion(seen, original)
            check_finite(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if progress is not None:
                progress("tune visual prompts", step, total, {"loss": float(loss.detach())})
    return PromptedTower(tower, [prompt.detach() for prompt in prompts])


def prompt_loss(
    features: Float[Tensor, "batch dim"],
    texts: Float[Tensor, "classes dim"],
    labels: Int[Tensor, " batch"],
    scale: float,
) -> Float[Tensor, ""]:
    """Cross-entropy of scaled cosines to the fixed text features."""
    return cross_entropy(scale * normalize(features, dim=-1) @ texts.T, labels)


def repulsion(seen: list[Tensor], original: list[Tensor]) -> Float[Tensor, ""]:
    """Mean cosine, over layers and images, between what the tower sees with prompts and without."""
    pairs = zip(seen, original, strict=True)
    return torch.stack(
        [cosine_similarity(one.float(), other.float(), dim=-1).mean() for one, other in pairs]
    ).mean()
