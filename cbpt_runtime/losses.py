"""The losses of purification; equations and reasons stand in `docs/method.md`."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus


def contrastive_inversion(
    triggered: Float[Tensor, "triggers batch dim"],
    clean: Float[Tensor, "batch dim"],
    texts: Float[Tensor, "classes dim"],
    targets: Int[Tensor, " triggers"],
    scale: float,
) -> Float[Tensor, " triggers"]:
    """InfoNCE per trigger: towards the target's text, away from the other texts and the image's own origin.

    Anchor: a triggered feature. Positive: the text of the target. Negatives: the texts of the other classes,
    among them the image's own, and the feature of the same image without the trigger.

    Args:
        triggered: Unit features of the same images under each trigger.
        clean: Unit features of these images without trigger.
        texts: Unit class embeddings.
        targets: The class each trigger is for.
        scale: Inverse temperature.

    Returns:
        Mean loss of each trigger over the batch.
    """
    count, batch, _ = triggered.shape
    to_clean = (triggered * clean).sum(dim=-1, keepdim=True)
    logits = scale * torch.cat([triggered @ texts.T, to_clean], dim=-1)
    labels = targets.unsqueeze(1).expand(count, batch)
    return (
        cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(count, batch).mean(dim=1)
    )


def clean_alignment(
    logits: Float[Tensor, "batch classes"],
    known: Float[Tensor, "batch classes"],
    weights: Float[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """Cross-entropy on clean images to what is known of them: what the head could do, it keeps.

    Args:
        logits: Of the head being tuned.
        known: Class probabilities to keep to.
        weights: Non-negative weight per image; normalised to sum one here.
    """
    per_image = -(known * logits.log_softmax(dim=1)).sum(dim=1)
    return (weights * per_image).sum() / weights.sum()


def backdoor_alignment(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    suspects: Int[Tensor, " batch"],
    own_class_weight: float,
) -> Float[Tensor, ""]:
    """Dummy-triggered images leave the suspected class first and foremost, and find their own.

    Cross-entropy to the own class is the sum of two: of *not the suspected class*, and of the own class among
    the classes that are left. The second counts `own_class_weight`; with 1 the sum is plain cross-entropy.

    Args:
        logits: Of the head being tuned.
        labels: The image's own class.
        suspects: The class its dummy trigger was inverted for, never its own.
        own_class_weight: Non-negative.
    """
    suspect = suspects.unsqueeze(1)
    rest = logits.scatter(1, suspect, -torch.inf)
    leave = softplus(logits.gather(1, suspect).squeeze(1) - rest.logsumexp(dim=1)).mean()
    return leave + own_class_weight * cross_entropy(rest, labels)


def prompt_consistency(
    change: Float[Tensor, "classes dim"],
    directions: Float[Tensor, "suspects dim"],
    weights: Float[Tensor, " classes"],
    across_weight: float,
) -> Float[Tensor, ""]:
    """Mean over the classes of the weighted squared change; across the trigger directions it counts more.

    Args:
        change: Of the class embeddings, against the reference.
        directions: Orthonormal; what the dummy triggers add to every image.
        weights: Non-negative weight per class.
        across_weight: What the part across all directions counts on top, non-negative.
    """
    across = change - change @ directions.T @ directions
    squares = change.pow(2).sum(dim=1) + across_weight * across.pow(2).sum(dim=1)
    return (squares * weights).mean()
