"""The numbers of each method, checked on construction and saved in the bundle.

Defaults are the published values, for CLIP models of the usual size; `docs/defenses.md` has their sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self, get_args

from cbpt_runtime.config import Precision, from_known_keys
from cbpt_runtime.errors import ConfigError

_RANGES: dict[str, tuple[type, float, float]] = {
    "seed": (int, 0, 2**63 - 1),
    "epochs": (int, 1, 10_000),
    "batch_size": (int, 2, 100_000),
    "warmup_steps": (int, 0, 1_000_000),
    "generator_steps": (int, 1, 100_000),
    "tokens": (int, 1, 10_000),
    "first_layer": (int, 0, 1_000),
    "max_shift": (int, 0, 1_000),
    "learning_rate": (float, 1e-12, 10),
    "generator_step_size": (float, 1e-12, 10),
    "weight_decay": (float, 0, 10),
    "momentum": (float, 0, 0.9999),
    "self_supervision_weight": (float, 0, 1_000),
    "repulsion_weight": (float, 0, 1_000),
    "patch_area_rate": (float, 1e-4, 0.5),
    "most_brightness": (float, 1, 10),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DefenseConfig:
    """What all methods have.

    Attributes:
        seed: Of every random choice.
        precision: Of the towers while they are tuned; `auto` is bfloat16 where the processor has instructions
            for it. Accuracy is always measured in float32.
    """

    method: ClassVar[str]
    seed: int = 0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ConfigError(
                expected="precision to be one of " + ", ".join(get_args(Precision)),
                got=repr(self.precision),
                fix="Correct the value.",
            )
        for field in fields(self):
            if field.name == "precision":
                continue
            value = getattr(self, field.name)
            kind, least, most = _RANGES[field.name]
            if value is None and field.default is None:
                continue
            number = (int, float) if kind is float else int
            if isinstance(value, bool) or not isinstance(value, number) or not least <= value <= most:
                what = "whole number" if kind is int else "number"
                raise ConfigError(
                    expected=f"{field.name} to be a {what} from {least:g} to {most:g}",
                    got=repr(value),
                    fix="Correct the value.",
                )

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From plain values.

        Raises:
            ConfigError: An unknown key or a bad value.
        """
        return from_known_keys(cls, values, f"keys of the method {cls.method}: ")


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
    epochs: int = 10
    learning_rate: float = 1e-5
    batch_size: int = 64
    warmup_steps: int = 50
    weight_decay: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanClipConfig(FinetuneConfig):
    """CleanCLIP: FT with self-supervision within each modality.

    Attributes:
        self_supervision_weight: Of the mean of the image-image and the text-text loss.
    """

    method: ClassVar[str] = "cleanclip"
    self_supervision_weight: float = 1.0


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
    generator_steps: int = 200
    generator_step_size: float = 1e-3
    patch_area_rate: float = 0.03
    most_brightness: float = 1.5


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
    tokens: int = 50
    first_layer: int | None = None
    repulsion_weight: float = 2.0
    epochs: int = 50
    learning_rate: float = 0.002
    momentum: float = 0.9
    batch_size: int = 32
    max_shift: int = 4


CONFIGS: dict[str, type[DefenseConfig]] = {
    kind.method: kind for kind in (FinetuneConfig, CleanClipConfig, AbdConfig, RvptConfig)
}
