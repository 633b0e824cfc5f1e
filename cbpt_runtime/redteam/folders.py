"""Image folders in and out: labelled images for training, triggered copies for measuring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image

from cbpt_runtime.artifacts import Kind, marked, new_folder
from cbpt_runtime.errors import ImageDataError
from cbpt_runtime.models.data import ClassList, find_class_folders, read_images
from cbpt_runtime.models.image_files import (
    first_few,
    left_out_notes,
    sort_files,
    undecodable,
    unreadable_among,
    unreadable_error,
    unreadable_notes,
)
from cbpt_runtime.progress import Progress
from cbpt_runtime.redteam.poisoning import LabelledImages
from cbpt_runtime.redteam.triggers import Trigger, apply_trigger
from cbpt_runtime.runtime.preprocess import Preprocess, decode_image

TRIGGERED: Final[Kind] = marked("folder of triggered images")


@dataclass(frozen=True, slots=True, kw_only=True)
class Triggered:
    """A folder of triggered images that was written.

    Attributes:
        images: How many.
        notes: Remarks for the user: what was left out.
    """

    images: int
    notes: tuple[str, ...]


def read_labelled(
    root: Path,
    classes: ClassList | Sequence[str],
    preprocess: Preprocess,
    *,
    skip_unreadable: bool = False,
    tell: Callable[[str], None] | None = None,
) -> LabelledImages:
    """Read one folder of images per class at the model's input size.

    Args:
        root: The folder of class folders.
        classes: The class list, or names in order.
        preprocess: Of the model.
        skip_unreadable: Do without images that cannot be read.
        tell: Told what was left out.

    Raises:
        ImageDataError: Folders that do not fit the classes, or images that cannot be read.
    """
    folders = find_class_folders(root, classes)
    everything = [path for folder in folders for path in folder]
    reasons = unreadable_among(everything, preprocess) if skip_unreadable else {}
    kept = [[path for path in folder if path not in reasons] for folder in folders]
    if not any(kept):
        raise unreadable_error(reasons, len(everything))
    images = read_images([path for folder in kept for path in folder], preprocess)
    labels = np.repeat(np.arange(len(kept)), [len(folder) for folder in kept])
    if tell is not None:
        for note in (*folders.notes, *unreadable_notes(reasons, root)):
            tell(note)
    return LabelledImages(images=images, labels=labels)


def write_triggered(
    trigger: Trigger,
    images: Path,
    output: Path,
    *,
    size: int | None = None,
    generator: torch.Generator,
    force: bool = False,
    skip_unreadable: bool = False,
    progress: Progress | None = None,
) -> Triggered:
    """Write triggered PNG copies of every image below a folder, layout and file stems kept.

    Args:
        trigger: The trigger.
        images: Folder of images, in any layout.
        output: The folder to make; whole or absent.
        size: Resize every image to this square first, as the published pipelines do (224); None keeps its
            size.
        generator: CPU generator.
        force: Replace a folder that this function wrote.
        skip_unreadable: Do without images that cannot be read.
        progress: Stage `apply`.

    Raises:
        ImageDataError: No image, unreadable ones (all are named), or one smaller than the trigger.
        OutputError: The output exists, or cannot be written.
    """
    found = sort_files(images, recursive=True)
    reasons = undecodable(found.images) if skip_unreadable else {}
    paths = [path for path in found.images if path not in reasons]
    _check_stems(paths, images)
    with new_folder(output, TRIGGERED, force=force) as staging:
        for index, path in enumerate(paths):
            out = staging / path.relative_to(images).with_suffix(".png")
            out.parent.mkdir(parents=True, exist_ok=True)
            _triggered(trigger, path, paths, size, generator).save(out)
            if progress is not None:
                progress("apply", index + 1, len(paths), {})
    notes = (*left_out_notes(found.left_out, images), *unreadable_notes(reasons, images))
    return Triggered(images=len(paths), notes=notes)


def _triggered(
    trigger: Trigger, path: Path, others: Sequence[Path], size: int | None, generator: torch.Generator
) -> Image.Image:
    try:
        image = decode_image(path)
    except ImageDataError as error:
        raise unreadable_error(undecodable(others), len(others)) from error
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    try:
        return Image.fromarray(apply_trigger(trigger, np.array(image)[None], generator)[0])
    except ImageDataError as error:
        raise ImageDataError(expected=error.expected, got=f"{error.got} in {path}", fix=error.fix) from error


def _check_stems(paths: Sequence[Path], root: Path) -> None:
    counts = Counter(str(path.with_suffix("")) for path in paths)
    doubled = [stem for stem, count in counts.items() if count > 1]
    if not paths or doubled:
        raise ImageDataError(
            expected=f"images below {root}, every stem once in its folder",
            got=f"twice: {first_few(doubled)}" if doubled else "none",
            fix="Name a folder with images." if not doubled else "Rename one of each pair.",
        )
