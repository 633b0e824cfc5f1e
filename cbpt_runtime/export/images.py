"""The pictures the parity gate looks at: real ones from a folder, or drawn ones where none are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.models.data import ClassList, find_class_folders, read_images
from cbpt_runtime.models.preprocess import decode_image, to_pixels

DRAWN = 16
GOLDEN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class GateImages:
    """Images at the model's own size.

    Attributes:
        pixels: uint8 RGB.
        labels: True class of each, None for drawn pictures.
        encoded: Files of the first few, for the golden set.
        source: 'folder' or 'drawn'.
    """

    pixels: UInt8[np.ndarray, "batch height width 3"]
    labels: Int[np.ndarray, " batch"] | None
    encoded: tuple[bytes, ...]
    source: str

    def repeated(self, count: int) -> UInt8[np.ndarray, "batch height width 3"]:
        """Exactly `count` images: the first ones, from the start again where there are too few."""
        return self.pixels[np.arange(count) % len(self.pixels)]


def read_gate_images(folder: Path, bundle: Bundle, *, limit: int) -> GateImages:
    """Read labelled images, one folder per class, evenly over the classes.

    Args:
        folder: Folders named like the bundle's classes; some may be missing.
        bundle: Gives classes and preprocessing.
        limit: Read no more than these.

    Raises:
        ImageDataError: The folder does not fit the classes, or an image cannot be read.
    """
    classes = ClassList(
        names=bundle.class_names,
        templates=tuple(tuple(group) for group in bundle.manifest["classes"]["templates"]),
    )
    folders = find_class_folders(folder, classes, allow_missing=True)
    labelled = [[(path, label) for path in paths] for label, paths in enumerate(folders)]
    chosen = _round_robin(labelled)[:limit]
    paths = [path for path, _ in chosen]
    return GateImages(
        pixels=read_images(paths, bundle.preprocess),
        labels=np.array([label for _, label in chosen]),
        encoded=tuple(path.read_bytes() for path in paths[:GOLDEN]),
        source="folder",
    )


def draw_gate_images(bundle: Bundle) -> GateImages:
    """Draw coloured pictures, always the same ones; not the classes' own, so without labels."""
    from cbpt_runtime.demo.motifs import MOTIFS
    from cbpt_runtime.demo.pictures import draw_picture

    rng = np.random.default_rng(0)
    encoded, pixels = [], []
    for number in range(DRAWN):
        file = BytesIO()
        name = sorted(MOTIFS)[number % len(MOTIFS)]
        draw_picture(name, 96 + 8 * number, rng).save(file, format="PNG")
        encoded.append(file.getvalue())
        pixels.append(to_pixels(decode_image(encoded[-1]), bundle.preprocess))
    return GateImages(pixels=np.stack(pixels), labels=None, encoded=tuple(encoded[:GOLDEN]), source="drawn")


def _round_robin(groups: Sequence[Sequence[tuple[Path, int]]]) -> list[tuple[Path, int]]:
    turns = chain.from_iterable(zip_longest(*groups))
    return [item for item in turns if item is not None]
