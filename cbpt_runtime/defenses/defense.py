"""What the other published defences share: they tune the image tower and look for no target."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from cbpt_runtime.config import Between, Config, Precision
from cbpt_runtime.models.clip import DualEncoder
from cbpt_runtime.models.data import CleanSplit
from cbpt_runtime.models.pixels import to_float
from cbpt_runtime.progress import Progress
from cbpt_runtime.purification.method import Purified, SuspectModel
from cbpt_runtime.purification.stages import StageStore

_BATCH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Defense(Config, ABC):
    """A defence and its numbers.

    Defaults are the published values, for CLIP models of the usual size; their sources: `docs/defenses.md`.

    Attributes:
        seed: Seed of all random choices.
        precision: Of the towers while they are tuned; `auto` is bfloat16 where the processor has instructions
            for it. Accuracy is always measured in float32.
    """

    name: ClassVar[str]
    is_search: ClassVar[bool] = False
    parameterization: ClassVar[str] = "encoder"
    tower: ClassVar[str] = "tuned"

    seed: Annotated[int, Between(0, 2**63 - 1)] = 0
    precision: Precision = "auto"

    def run(
        self,
        suspect: SuspectModel,
        split: CleanSplit,
        *,
        progress: Progress | None = None,
        stages: StageStore | None = None,
    ) -> Purified:
        """Tune; the head is the tuned model's own, and whether it has a target nobody knows."""
        start = time.perf_counter()
        head = suspect.encoder.class_embeddings(suspect.classes)
        encoder, tuned_head, free = self.tune(suspect, head, split, progress)
        seconds = time.perf_counter() - start
        return Purified(
            encoder=encoder,
            verdict="unknown",
            class_embeddings=tuned_head,
            reference_embeddings=tuned_head,
            metrics={
                "heldout_images": float(len(split.heldout_labels) or len(split.tune_labels)),
                "heldout_ca_before": _accuracy(suspect.encoder, head, split),
                "heldout_ca_after": _accuracy(encoder, tuned_head, split),
            },
            stage_seconds={self.name: seconds},
            tower=self.tower,
            trainable_parameters=free,
        )

    @abstractmethod
    def tune(
        self,
        suspect: SuspectModel,
        head: Float[Tensor, "classes dim"],
        split: CleanSplit,
        progress: Progress | None,
    ) -> tuple[DualEncoder, Float[Tensor, "classes dim"], int]:
        """Return the tuned model, frozen again, its class embeddings, and how many parameters were free."""


@torch.no_grad()
def _accuracy(encoder: DualEncoder, head: Tensor, split: CleanSplit) -> float:
    has_heldout = len(split.heldout_labels) > 0
    images = split.heldout_images if has_heldout else split.tune_images
    labels = torch.as_tensor(split.heldout_labels if has_heldout else split.tune_labels).to(head.device)
    called = [
        (encoder.encode_images(to_float(images[start : start + _BATCH])) @ head.T).argmax(dim=1)
        for start in range(0, len(images), _BATCH)
    ]
    return float((torch.cat(called) == labels).float().mean())
