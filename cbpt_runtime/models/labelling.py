"""Labels for images that have none: the classes the suspect's own zero-shot head is sure of.

A backdoor needs its trigger to act. On clean images, which have none, the suspect is as good as any model,
and where it is sure it is right more often than elsewhere. How often depends on the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int

from cbpt_runtime.errors import ImageDataError
from cbpt_runtime.models.clip import DualEncoder
from cbpt_runtime.models.data import (
    HELDOUT_SHOTS,
    ClassList,
    CleanSplit,
    check_draw,
    parts_of_class,
    split_digest,
)
from cbpt_runtime.models.image_files import first_few
from cbpt_runtime.models.image_folder import UnlabelledImages
from cbpt_runtime.runtime.zero_shot import logits, probabilities

SURE_RATIO = 2.0
"""An image is used where its likeliest class is at least this many times as likely as the next.

A ratio, and not a least probability: among many classes, or at the small scale of a briefly trained model, no
class is ever likely, while the ratio depends on the two that matter alone.
"""

_LEAST_DRAWN = 64
_BATCH = 256


def images_to_draw(n_classes: int, *, shots: int, heldout_shots: int = HELDOUT_SHOTS) -> int:
    """How many unlabelled images to look at for a split of that size."""
    return max(_LEAST_DRAWN, n_classes * (shots + heldout_shots))


def label_images(
    drawn: UnlabelledImages,
    encoder: DualEncoder,
    classes: ClassList,
    *,
    shots: int = 16,
    heldout_shots: int = HELDOUT_SHOTS,
    seed: int = 0,
) -> CleanSplit:
    """Split unlabelled images by the classes the model's zero-shot head is sure of.

    Raises:
        ConfigError: `shots` below 1 or `heldout_shots` or `seed` below 0.
        ImageDataError: The head is sure of images of fewer than two classes.
    """
    sure = reference_probabilities(drawn, encoder, classes)
    return split_by_confidence(
        drawn, sure, classes.names, shots=shots, heldout_shots=heldout_shots, seed=seed
    )


def reference_probabilities(
    drawn: UnlabelledImages, encoder: DualEncoder, classes: ClassList
) -> Float[np.ndarray, "batch classes"]:
    """Return what the zero-shot head says of each image: a softmax at the model's scale, always."""
    head = encoder.class_embeddings(classes).cpu().numpy()
    pixels = torch.as_tensor(drawn.images).permute(0, 3, 1, 2)
    with torch.no_grad():
        parts = [
            encoder.encode_images(part.to(encoder.device).float() / 255).cpu()
            for part in pixels.split(_BATCH)
        ]
    return probabilities(logits(torch.cat(parts).numpy(), head, encoder.logit_scale))


def split_by_confidence(
    drawn: UnlabelledImages,
    probabilities: Float[np.ndarray, "batch classes"],
    names: Sequence[str],
    *,
    shots: int,
    heldout_shots: int = HELDOUT_SHOTS,
    seed: int = 0,
) -> CleanSplit:
    """Per class the images its head is surest of, some to tune on and some to hold out, drawn by the seed.

    Args:
        drawn: The images.
        probabilities: Of the classes, for each image.
        names: Of the classes.
        shots: Images per class to tune on.
        heldout_shots: Images per class to hold out.
        seed: Decides which of the images of a class are held out.

    Raises:
        ConfigError: `shots` below 1 or `heldout_shots` or `seed` below 0.
        ImageDataError: Sure images of fewer than two classes.
    """
    check_draw(shots, heldout_shots, seed)
    labels, ratios = _likeliest(probabilities)
    tune: list[int] = []
    heldout: list[int] = []
    used: list[int] = []
    for label in range(len(names)):
        own = np.flatnonzero((labels == label) & (ratios >= SURE_RATIO))
        surest = own[np.argsort(-ratios[own], kind="stable")][: shots + heldout_shots]
        order = np.random.default_rng([seed, label]).permutation(surest)
        first, then = parts_of_class(order, shots, heldout_shots)
        tune += first.tolist()
        heldout += then.tolist()
        used.append(len(first) + len(then))
    _require_two_classes(used, names, len(drawn.files))
    unsure = int((ratios < SURE_RATIO).sum())
    return CleanSplit(
        tune_images=drawn.images[tune],
        tune_labels=labels[tune],
        heldout_images=drawn.images[heldout],
        heldout_labels=labels[heldout],
        digest=_digest(drawn, labels, tune, heldout),
        notes=(*drawn.notes, *_notes(drawn, used, unsure, names, f"{shots} + {heldout_shots} held out")),
        labelled_by="suspect",
    )


def _likeliest(
    probabilities: Float[np.ndarray, "batch classes"],
) -> tuple[Int[np.ndarray, " batch"], Float[np.ndarray, " batch"]]:
    """Return the likeliest class of each image, and how many times as likely as the next it is."""
    second, first = np.sort(probabilities.astype(np.float64), axis=1)[:, -2:].T
    return probabilities.argmax(axis=1).astype(np.int64), first / np.maximum(second, np.finfo(float).tiny)


def _notes(
    drawn: UnlabelledImages, used: Sequence[int], unsure: int, names: Sequence[str], wanted: str
) -> list[str]:
    total = len(drawn.files)
    spare = total - unsure - sum(used)
    fewest_first = sorted(range(len(names)), key=lambda index: used[index])
    counts = [f"{names[index]} {used[index]}" for index in fewest_first if used[index]]
    none = [names[index] for index in fewest_first if not used[index]]
    notes = [
        "the images have no labels: the suspect's own zero-shot head gave each the class it is sure of;"
        " accuracies of this run say how often a head agrees with it, not how often it is right",
        f"of {drawn.found:,} images {total:,} were looked at, {sum(used):,} are used, {unsure:,} were"
        f" left out as unsure (the likeliest class less than {SURE_RATIO:g} times as likely as the next)"
        + (f" and {spare:,} as more than {wanted} of a class" if spare else ""),
        f"images used per class, fewest first: {first_few(counts)}",
    ]
    if none:
        notes.append(f"no images of {len(none)} of {len(names)} classes: {first_few(none)}")
    return notes


def _require_two_classes(used: Sequence[int], names: Sequence[str], total: int) -> None:
    present = [names[index] for index, count in enumerate(used) if count]
    if len(present) < 2:
        got = f"sure images of {present[0]} only" if present else "none it is sure of"
        raise ImageDataError(
            expected=f"images of two or more classes the suspect's zero-shot head is sure of, among {total}",
            got=got,
            fix="Add images, sort them into one folder per class, or check that the classes are theirs.",
        )


def _digest(
    drawn: UnlabelledImages, labels: Int[np.ndarray, " batch"], tune: Sequence[int], heldout: Sequence[int]
) -> str:
    """SHA-256 over paths, bytes and labels of the used images, and over which are tuned on."""
    lines = [f"{drawn.files[i]}\0{drawn.digests[i]}\0{labels[i]}" for i in (*tune, *heldout)]
    return split_digest(lines, len(tune))
