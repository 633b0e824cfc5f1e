"""Image folders in and out: labelled images for training, triggered copies for measuring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image

from cbpt_runtime.artifacts import Kind, marked, new_folder
from cbpt_runtime.errors import ImageDataError
from cbpt_runtime.models.data import find_class_folders, read_images
from cbpt_runtime.models.preprocess import Preprocess, decode_image
from cbpt_runtime.redteam.poisoning import LabelledImages
from cbpt_runtime.redteam.triggers import Trigger, apply_trigger
from cbpt_runtime.types import Progress

TRIGGERED: Final[Kind] = marked("folder of triggered images")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def read_labelled(root: Path, names: Sequence[str], preprocess: Preprocess) -> LabelledImages:
    """Read one folder of images per class at the model's input size.

    Raises:
        ImageDataError: Folders that do not fit the classes, or images that cannot be read.
    """
    folders = find_class_folders(root, names)
    images = read_images([path for folder in folders for path in folder], preprocess)
    labels = np.repeat(np.arange(len(folders)), [len(folder) for folder in folders])
    return LabelledImages(images=images, labels=labels)


def write_triggered(
    trigger: Trigger,
    images: Path,
    output: Path,
    *,
    size: int | None = None,
    generator: torch.Generator,
    force: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write triggered PNG copies of every image below a folder, layout and file stems kept; returns how many.

    Args:
        trigger: The trigger.
        images: Folder of images, in any layout.
        output: The folder to make; whole or absent.
        size: Resize every image to this square first, as the published pipelines do (224); None keeps its
            size.
        generator: CPU generator.
        force: Replace a folder that this function wrote.
        progress: Stage `apply`.

    Raises:
        ImageDataError: No image, an unreadable one, or one smaller than the trigger.
        OutputError: The output exists, or cannot be written.
    """
    paths = _image_paths(images)
    with new_folder(output, TRIGGERED, force=force) as staging:
        for index, path in enumerate(paths):
            out = staging / path.relative_to(images).with_suffix(".png")
            out.parent.mkdir(parents=True, exist_ok=True)
            _triggered(trigger, path, size, generator).save(out)
            if progress is not None:
                progress("apply", index + 1, len(paths), {})
    return len(paths)


def _triggered(trigger: Trigger, path: Path, size: int | None, generator: torch.Generator) -> Image.Image:
    image = decode_image(path)
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    try:
        return Image.fromarray(apply_trigger(trigger, np.array(image)[None], generator)[0])
    except ImageDataError as error:
        raise ImageDataError(expected=error.expected, got=f"{error.got} in {path}", fix=error.fix) from error


def _image_paths(root: Path) -> list[Path]:
    paths = sorted(
        path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )
    counts = Counter(str(path.with_suffix("")) for path in paths)
    doubled = [stem for stem, count in counts.items() if count > 1]
    if not paths or doubled:
        raise ImageDataError(
            expected=f"images below {root}, every stem once in its folder",
            got=f"twice: {', '.join(doubled[:5])}" if doubled else "none",
            fix="Name a folder with images." if not doubled else "Rename one of each pair.",
        )
    return paths
