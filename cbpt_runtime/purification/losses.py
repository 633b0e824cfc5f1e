"""The losses of purification; equations and reasons stand in `docs/method.md`."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

_NEVER = -1e4  # a logit that counts nothing, with finite gradients


def contrastive_inversion(
    to_texts: Float[Tensor, "triggers batch words"],
    to_clean: Float[Tensor, "triggers batch"],
    positives: Bool[Tensor, "triggers words"],
    negatives: Bool[Tensor, "triggers words"],
    scale: float,
) -> Float[Tensor, " triggers"]:
    """InfoNCE per trigger: towards any of its texts, away from the others and from the image's own origin.

    Anchor: a triggered feature. Positives: the texts the trigger is for. Negatives: texts of other things,
    among them the image's own, and the feature of the same image without the trigger.

    Args:
        to_texts: Cosines of triggered features to texts, the same images under each trigger.
        to_clean: Cosines of triggered features to those of the same images without trigger.
        positives: Texts each trigger is for.
        negatives: Texts each trigger has to leave behind.
        scale: Inverse temperature.

    Returns:
        Mean loss of each trigger over the batch.
    """
    logits = scale * to_texts
    reached = logits.masked_fill(~positives.unsqueeze(1), _NEVER).logsumexp(dim=-1)
    left = logits.masked_fill(~negatives.unsqueeze(1), _NEVER).logsumexp(dim=-1)
    rivals = torch.logaddexp(left, scale * to_clean)
    return softplus(rivals - reached).mean(dim=1)


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
    orthogonal_weight: float,
) -> Float[Tensor, ""]:
    """Mean over the classes of the weighted squared change; across the trigger directions it counts more.

    Args:
        change: Of the class embeddings, against the reference.
        directions: Orthonormal; what the dummy triggers add to every image.
        weights: Non-negative weight per class.
        orthogonal_weight: What the part across all directions counts on top, non-negative.
    """
    across = change - change @ directions.T @ directions
    squares = change.pow(2).sum(dim=1) + orthogonal_weight * across.pow(2).sum(dim=1)
    return (squares * weights).mean()
