"""GELU or QuickGELU: weights do not show which they were trained with, clean labelled images do.

OpenAI's architectures and their QuickGELU variants have the same names and shapes of weights; the wrong one
costs accuracy and says nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int, UInt8

from cbpt_runtime.models.checkpoint import Checkpoint
from cbpt_runtime.models.clip import DualEncoder, load_dual_encoder
from cbpt_runtime.models.data import ClassList
from cbpt_runtime.models.pixels import to_float

_DEVIATIONS = 3.0
"""By how many standard deviations of a coin's tosses the better one has to lead (McNemar's test)."""

_BATCH = 64
UNTRIED = (
    "whether these weights want QuickGELU was not tried, which takes labelled images:"
    " if OpenAI or a model of theirs is the origin, name the architecture as in --model ViT-B-32-quickgelu"
)


def settle_activation(
    checkpoint: Checkpoint,
    classes: ClassList,
    images: UInt8[np.ndarray, "batch height width 3"],
    labels: Int[np.ndarray, " batch"],
    *,
    device: str = "cpu",
) -> Checkpoint:
    """Return the checkpoint with the activation that names clean images clearly better, and a remark on it.

    Nothing is tried where the checkpoint or its configuration says which it is.

    Args:
        checkpoint: Weights whose architecture the user named.
        classes: What the images are of.
        images: Clean ones.
        labels: Class indices.
        device: 'auto', 'cpu' or 'cuda'.

    Raises:
        CheckpointError: The weights do not fit the architecture.
    """
    if not checkpoint.activation_is_guessed or checkpoint.anomalies:
        return checkpoint
    given = bool(checkpoint.model_config.get("quick_gelu"))
    other = replace(checkpoint, model_config={**checkpoint.model_config, "quick_gelu": not given})
    right = {
        quick: _right(load_dual_encoder(one, device=device), classes, images, labels)
        for quick, one in ((given, checkpoint), (not given, other))
    }
    lead = int(right[not given].sum()) - int(right[given].sum())
    is_clear = abs(lead) > _DEVIATIONS * math.sqrt(int((right[given] != right[not given]).sum()))
    shares = ", ".join(f"{_word(quick)} {right[quick].mean():.1%}" for quick in (True, False))
    shares = f"of {len(labels)} clean images right with {shares}"
    if not is_clear:
        note = f"GELU or QuickGELU: clean images do not tell ({shares}); {_word(given)} it is, as named"
        return replace(checkpoint, notes=(*checkpoint.notes, note))
    if lead < 0:
        return checkpoint
    note = f"{_word(not given)} taken instead of {_word(given)}, which --model says: {shares}"
    return replace(other, notes=(*checkpoint.notes, note))


def _right(
    encoder: DualEncoder,
    classes: ClassList,
    images: UInt8[np.ndarray, "batch height width 3"],
    labels: Int[np.ndarray, " batch"],
) -> np.ndarray:
    """Of each image whether the zero-shot head names its class."""
    head = encoder.class_embeddings(classes)
    parts = []
    with torch.no_grad():
        for start in range(0, len(images), _BATCH):
            features = encoder.encode_images(to_float(images[start : start + _BATCH]).to(encoder.device))
            parts.append((features @ head.T).argmax(dim=1).cpu().numpy())
    found: np.ndarray = np.concatenate(parts) == labels
    return found


def _word(is_quick: bool) -> str:
    return "QuickGELU" if is_quick else "GELU"
