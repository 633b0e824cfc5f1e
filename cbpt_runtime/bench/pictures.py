"""The image files that are sent: as they are on disk, of mixed sizes, in an order drawn once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cbpt_runtime.errors import ImageDataError
from cbpt_runtime.names import name_bytes

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Image files in memory.

    Attributes:
        folder: Where they came from.
        names: Paths below it.
        files: Their content.
    """

    folder: Path
    names: tuple[str, ...]
    files: tuple[bytes, ...]

    def labels(self, class_names: Sequence[str]) -> list[int] | None:
        """True class of every file by the folder it lies in; None when one lies in no class's folder."""
        indices = {_key(name): index for index, name in enumerate(class_names)}
        found = [indices.get(_key(Path(name).parent.name)) for name in self.names]
        return None if None in found else [index for index in found if index is not None]

    def describe(self) -> dict[str, Any]:
        """Digest, sizes and formats, as JSON can hold them."""
        digest = hashlib.sha256()
        formats: Counter[str] = Counter()
        sizes = []
        for name, file in zip(self.names, self.files, strict=True):
            digest.update(name_bytes(name) + b"\0" + hashlib.sha256(file).digest())
            with Image.open(BytesIO(file)) as image:
                formats[str(image.format)] += 1
                sizes.append(image.width * image.height)
        lengths = [len(file) for file in self.files]
        return {
            "folder": str(self.folder),
            "count": len(self.files),
            "digest": digest.hexdigest(),
            "formats": dict(formats),
            "megapixels": _spread([size / 1e6 for size in sizes]),
            "kilobytes": _spread([length / 1e3 for length in lengths]),
        }


def read_pictures(folder: str | Path, *, most: int, seed: int) -> Pictures:
    """Read image files below a folder, evenly over all there are, in an order drawn from the seed.

    Raises:
        ImageDataError: There are none, or one of them is not an image.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    if not paths:
        raise ImageDataError(
            expected="a folder with image files",
            got=f"{folder}, {'which has none' if folder.is_dir() else 'which is no folder'}",
            fix="Name one with --images, best with a folder of images per class.",
        )
    rng = np.random.default_rng(seed)
    rows = np.unique(np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int))
    chosen = [paths[row] for row in rng.permutation(rows)]
    files = tuple(path.read_bytes() for path in chosen)
    _check(chosen, files)
    return Pictures(
        folder=folder, names=tuple(path.relative_to(folder).as_posix() for path in chosen), files=files
    )


def _check(paths: Sequence[Path], files: Sequence[bytes]) -> None:
    problems = []
    for path, file in zip(paths, files, strict=True):
        try:
            Image.open(BytesIO(file)).close()
        except Exception as error:  # Pillow raises classes of many kinds
            problems.append(f"{path}: {str(error).split(' <')[0]}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ImageDataError(
            expected="image files that can be read",
            got="; ".join(problems[:5]) + more,
            fix="Remove them: what a server refuses says nothing about its speed.",
        )


def _key(name: str) -> str:
    return name.replace("_", " ").casefold().strip()


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.percentile(values, (0, 50, 100))
    return {"min": round(float(low), 4), "median": round(float(middle), 4), "max": round(float(high), 4)}
