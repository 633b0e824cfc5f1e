"""Head tuning: three losses move the class embeddings, everything else is constant and cached."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from cbpt_runtime.models.prompts import PromptEncoder
from cbpt_runtime.progress import Progress
from cbpt_runtime.purification.config import PurifyConfig
from cbpt_runtime.purification.losses import backdoor_alignment, clean_alignment, prompt_consistency

HeadCheck = Literal["accepted", "false_positives", "trigger_survives"]
_DAMPING = math.sqrt(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningData:
    """Features the head is tuned on.

    Attributes:
        reference: Class embeddings before tuning.
        scale: The model's logit scale.
        clean: Unit features of clean images and of augmented ones, of suspected classes synthetic ones, too.
        clean_labels: Their classes.
        triggered: Unit features of these images under dummy triggers, those of suspected classes left out.
        triggered_labels: Their own classes.
        triggered_targets: The suspected targets of their triggers.
        targets: Class indices of the suspected targets.
        directions: Orthonormal; what the dummy triggers add to every image, one per suspected target.
    """

    reference: Float[Tensor, "classes dim"]
    scale: float
    clean: Float[Tensor, "batch dim"]
    clean_labels: Int[Tensor, " batch"]
    triggered: Float[Tensor, "triggered dim"]
    triggered_labels: Int[Tensor, " triggered"]
    triggered_targets: Int[Tensor, " triggered"]
    targets: tuple[int, ...]
    directions: Float[Tensor, "targets dim"]


def tune(
    data: TuningData,
    config: PurifyConfig,
    *,
    backdoor_weight: float,
    target_weight: float,
    prompts: PromptEncoder | None = None,
    progress: Progress | None = None,
) -> tuple[Float[Tensor, "classes dim"], Float[Tensor, "classes context width"] | None]:
    """Move the class embeddings so that dummy-triggered images get their own class back.

    A class embedding is its reference plus a change. With `prompts`, the free parameters are one context per
    class in front of its name, and the change is what the context has done to the text feature. Without, the
    change itself is free.

    Returns:
        Tuned class embeddings and, with `prompts`, the contexts.
    """
    if prompts is None:
        free = torch.zeros_like(data.reference).requires_grad_()
        start: Tensor | None = None
    else:
        free = prompts.initial_contexts().requires_grad_()
        start = prompts.encode(free).detach()

    def change() -> Tensor:
        return free if prompts is None or start is None else prompts.encode(free) - start

    weights = image_weights(data.clean_labels, data.targets, target_weight)
    _minimise(data, config, backdoor_weight, weights, free, change, progress)
    return data.reference + change().detach(), None if prompts is None else free.detach()


def tune_in_rounds(
    data: TuningData,
    config: PurifyConfig,
    check: Callable[[Float[Tensor, "classes dim"]], HeadCheck],
    *,
    prompts: PromptEncoder | None = None,
    progress: Progress | None = None,
) -> tuple[Float[Tensor, "classes dim"], Float[Tensor, "classes context width"] | None]:
    """Tunes in rounds, each with other weights, until a head is accepted on held-out images.

    The weight of the suspects' own images is divided by √2 where clean images are called a suspect more often
    than before; else the backdoor weight is doubled where the dummy triggers still succeed.

    Args:
        data: Features.
        config: Most rounds and the first weights.
        check: What held-out images say of a head.
        prompts: As in `tune`.
        progress: Told about the steps.
    """
    backdoor_weight, target_weight = config.backdoor_weight, config.target_weight
    for _ in range(config.tuning_rounds):
        embeddings, contexts = tune(
            data,
            config,
            backdoor_weight=backdoor_weight,
            target_weight=target_weight,
            prompts=prompts,
            progress=progress,
        )
        match check(embeddings):
            case "accepted":
                break
            case "false_positives":
                target_weight /= _DAMPING
            case "trigger_survives":
                backdoor_weight *= 2
    return embeddings, contexts


def _minimise(
    data: TuningData,
    config: PurifyConfig,
    backdoor_weight: float,
    weights: Float[Tensor, " batch"],
    free: Tensor,
    change: Callable[[], Tensor],
    progress: Progress | None,
) -> None:
    targets = soft_targets(data)
    class_weights = torch.ones(len(data.reference), device=free.device)
    class_weights[list(data.targets)] = config.target_consistency_weight
    optimizer = torch.optim.Adam([free], lr=config.tuning_step_size)
    for step in range(config.tuning_steps):
        moved = change()
        current = data.reference + moved
        clean = clean_alignment(data.scale * data.clean @ current.T, targets, weights)
        backdoor = backdoor_alignment(
            data.scale * data.triggered @ current.T,
            data.triggered_labels,
            data.triggered_targets,
            config.own_class_weight,
        )
        consistency = prompt_consistency(moved, data.directions, class_weights, config.orthogonal_weight)
        loss = clean + backdoor_weight * backdoor + config.consistency_weight * consistency
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress is not None and (step + 1) % 10 == 0:
            losses = {"clean": clean, "backdoor": backdoor, "consistency": consistency}
            values = {name: value.item() for name, value in losses.items()}
            progress("tune prompts", step + 1, config.tuning_steps, values)


def soft_targets(data: TuningData) -> Float[Tensor, "batch classes"]:
    """Say what is known of the clean images, without what the backdoor may have put there.

    On images of suspected classes the label. On images of other classes what the reference head says, the
    share of the suspected classes taken out and the rest scaled to one.
    """
    n_classes = len(data.reference)
    probabilities = (data.scale * data.clean @ data.reference.T).softmax(dim=1)
    suspected = torch.zeros(n_classes, dtype=torch.bool, device=probabilities.device)
    suspected[list(data.targets)] = True
    others = probabilities.masked_fill(suspected, 0.0)
    others = others / others.sum(dim=1, keepdim=True)
    own = one_hot(data.clean_labels, n_classes).to(others)
    return torch.where(suspected[data.clean_labels].unsqueeze(1), own, others)


def image_weights(
    labels: Int[Tensor, " batch"], targets: Sequence[int], target_weight: float
) -> Float[Tensor, " batch"]:
    """One per image; for those of a suspected class what makes the class count as `target_weight` others."""
    suspected: Bool[Tensor, " batch"] = torch.isin(labels, torch.tensor(targets, device=labels.device))
    counts = labels.bincount()
    usual = (~suspected).sum() / max(1, len(labels[~suspected].unique()))
    return torch.where(suspected, target_weight * usual / counts[labels], 1.0)
