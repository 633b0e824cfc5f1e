"""Images nobody has labelled: found, drawn, and labelled by the suspect where its zero-shot head is sure.

A backdoor needs its trigger to act. On clean images, which have none, the suspect is as good as any model,
and where it is sure it is right more often than elsewhere. How often depends on the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

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
from cbpt_runtime.models.image_files import (
    first_few,
    left_out_notes,
    read_files,
    relative_name,
    sort_files,
    stacked,
    visible_entries,
)
from cbpt_runtime.models.pixels import to_float
from cbpt_runtime.runtime.preprocess import Preprocess, is_image
from cbpt_runtime.runtime.zero_shot import logits, probabilities

SURE_RATIO = 2.0
"""An image is used where its likeliest class is at least this many times as likely as the next.

A ratio, and not a least probability: among many classes, or at the small scale of a briefly trained model, no
class is ever likely, while the ratio depends on the two that matter alone.
"""

_LEAST_DRAWN = 64
_BATCH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class UnlabelledImages:
    """Images drawn out of a folder, in the order of the draw.

    Attributes:
        images: uint8 RGB at the model's input size.
        files: Their paths relative to the folder, in POSIX form.
        digests: SHA-256 of each file; no two are equal.
        found: Images in the folder.
        notes: Remarks for the user: what was left out.
    """

    images: UInt8[np.ndarray, "batch height width 3"]
    files: tuple[str, ...]
    digests: tuple[str, ...]
    found: int
    notes: tuple[str, ...] = ()


def is_flat(root: Path) -> bool:
    """Whether a folder holds images itself, and not folders with the images of a class each.

    Hidden entries are ignored. What a file holds decides, not its name.

    Raises:
        ImageDataError: Both or neither, or no such folder.
    """
    entries = visible_entries(root, "a folder of images")
    folders = [path for path in entries if path.is_dir()]
    image = next((path for path in entries if path.is_file() and is_image(path)), None)
    if (image is None) == bool(folders):
        return image is not None
    if image is None:
        got = "files that are no images" if entries else "an empty folder"
        fix = "Put images there."
    else:
        got = f"both: {first_few([path.name for path in folders])} beside the image {image.name}"
        fix = "Move the images into the folders of their classes, or the folders elsewhere."
    raise ImageDataError(
        expected=f"one folder with images per class, or images and no folders, in {root}", got=got, fix=fix
    )


def find_images(root: Path, *, recursive: bool) -> tuple[list[Path], dict[str, tuple[Path, ...]]]:
    """Find the images in a folder by what the files hold, not by their names.

    Args:
        root: The folder. Hidden entries are ignored.
        recursive: Search the folders in it, too, however deep; a folder reached twice by links is read once.

    Returns:
        Their paths, sorted, and what else there is, by what it is.

    Raises:
        ImageDataError: No such folder, or no image in it.
    """
    found = sort_files(root, recursive=recursive, trust_names=False)
    if not found.images:
        where = "or in the folders below it" if recursive else "itself, not in a folder below it"
        raise ImageDataError(
            expected=f"one or more images in {root} {where}",
            got="; ".join(("none", *left_out_notes(found.left_out, root))),
            fix="Check the path.",
        )
    return list(found.images), dict(found.left_out)


def draw_images(
    root: Path, preprocess: Preprocess, *, count: int, seed: int = 0, recursive: bool = False
) -> UnlabelledImages:
    """Draws images out of a folder; those that cannot be decoded, and copies, make room for others.

    The draw depends on the seed and the names of the images only.

    Args:
        root: The folder.
        preprocess: How images become the model's input.
        count: At most how many to draw.
        seed: Of the draw.
        recursive: Look into the folders in it, too, however deep.

    Raises:
        ImageDataError: No such folder, no image in it, or none that can be decoded.
    """
    paths, left_out = find_images(root, recursive=recursive)
    order = np.random.default_rng(seed).permutation(len(paths))
    drawn: dict[str, tuple[Path, UInt8[np.ndarray, "height width 3"]]] = {}
    unusable: list[str] = []
    copies: list[str] = []
    tried = 0
    while len(drawn) < count and tried < len(paths):
        batch = [paths[index] for index in order[tried : tried + count - len(drawn)]]
        tried += len(batch)
        for path, read in zip(batch, read_files(batch, preprocess), strict=True):
            if isinstance(read, str):
                unusable.append(f"{relative_name(path, root)} ({read})")
            elif read[1] in drawn:
                copies.append(relative_name(path, root))
            else:
                drawn[read[1]] = (path, read[0])
    if not drawn:
        raise ImageDataError(
            expected=f"one or more readable images in {root}",
            got=f"{len(unusable)} that are not: {first_few(unusable)}",
            fix="Replace or remove them.",
        )
    useless = {"are unreadable images": unusable, "are copies of other images": copies}
    return UnlabelledImages(
        images=stacked([pixels for _, pixels in drawn.values()], preprocess),
        files=tuple(relative_name(path, root) for path, _ in drawn.values()),
        digests=tuple(drawn),
        found=len(paths),
        notes=(*left_out_notes(left_out, root), *left_out_notes(useless, root)),
    )


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
    with torch.no_grad():
        parts = [
            encoder.encode_images(to_float(drawn.images[start : start + _BATCH], encoder.device)).cpu()
            for start in range(0, len(drawn.images), _BATCH)
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
