"""Folders of images nobody has labelled: telling them from class folders, and drawing images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from cbpt_runtime.errors import ImageDataError
from cbpt_runtime.models.image_files import (
    first_few,
    left_out_notes,
    read_files,
    relative_name,
    sort_files,
    stacked,
    visible_entries,
)
from cbpt_runtime.runtime.preprocess import Preprocess, is_image


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
