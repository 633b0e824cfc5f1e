"""The numbers of each method, checked on construction and saved in the bundle.

Defaults are the published values, for CLIP models of the usual size; `docs/defenses.md` has their sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from cbpt_runtime.config import Between, Config, Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class DefenseConfig(Config):
    """What all methods have.

    Attributes:
        seed: Of every random choice.
        precision: Of the towers while they are tuned; `auto` is bfloat16 where the processor has instructions
            for it. Accuracy is always measured in float32.
    """

    method: ClassVar[str]
    seed: Annotated[int, Between(0, 2**63 - 1)] = 0
    precision: Precision = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig(DefenseConfig):
    """FT: contrastive fine-tuning of both towers on the clean images, captions made from templates.

    Attributes:
        epochs: Passes over the images.
        learning_rate: Peak of the cosine schedule.
        batch_size: Pairs per step.
        warmup_steps: Steps with a rising learning rate, at most a tenth of all steps.
        weight_decay: AdamW decay; none on biases, norms and the logit scale.
    """

    method: ClassVar[str] = "ft"
    epochs: Annotated[int, Between(1, 10_000)] = 10
    learning_rate: Annotated[float, Between(1e-12, 10)] = 1e-5
    batch_size: Annotated[int, Between(2, 100_000)] = 64
    warmup_steps: Annotated[int, Between(0, 1_000_000)] = 50
    weight_decay: Annotated[float, Between(0, 10)] = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanClipConfig(FinetuneConfig):
    """CleanCLIP: FT with self-supervision within each modality.

    Attributes:
        self_supervision_weight: Of the mean of the image-image and the text-text loss.
    """

    method: ClassVar[str] = "cleanclip"
    self_supervision_weight: Annotated[float, Between(0, 1_000)] = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AbdConfig(FinetuneConfig):
    """ABD: FT on images with a universal patch that acts like a trigger.

    Attributes:
        generator_steps: Steps the patch generator is trained.
        generator_step_size: Its learning rate.
        patch_area_rate: Share of the image the patch covers.
        most_brightness: Images are brightened by a factor between 1 and this.
    """

    method: ClassVar[str] = "abd"
    generator_steps: Annotated[int, Between(1, 100_000)] = 200
    generator_step_size: Annotated[float, Between(1e-12, 10)] = 1e-3
    patch_area_rate: Annotated[float, Between(1e-4, 0.5)] = 0.03
    most_brightness: Annotated[float, Between(1, 10)] = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class RvptConfig(DefenseConfig):
    """RVPT: visual prompts at the later layers of the frozen image tower, by SGD.

    Attributes:
        tokens: Prompt tokens per layer of a vision transformer; a ResNet has one map per stage.
        first_layer: Layers before it get no prompts; a quarter of the layers if None.
        repulsion_weight: Of the cosine between prompted and original features inside the tower.
        epochs: Passes over the images.
        learning_rate: Peak of the cosine schedule.
        momentum: Of SGD.
        batch_size: Images per step.
        max_shift: Images are moved by up to so many pixels and mirrored half of the time.
    """

    method: ClassVar[str] = "rvpt"
    tokens: Annotated[int, Between(1, 10_000)] = 50
    first_layer: Annotated[int | None, Between(0, 1_000)] = None
    repulsion_weight: Annotated[float, Between(0, 1_000)] = 2.0
    epochs: Annotated[int, Between(1, 10_000)] = 50
    learning_rate: Annotated[float, Between(1e-12, 10)] = 0.002
    momentum: Annotated[float, Between(0, 0.9999)] = 0.9
    batch_size: Annotated[int, Between(2, 100_000)] = 32
    max_shift: Annotated[int, Between(0, 1_000)] = 4


CONFIGS: dict[str, type[DefenseConfig]] = {
    kind.method: kind for kind in (FinetuneConfig, CleanClipConfig, AbdConfig, RvptConfig)
}
