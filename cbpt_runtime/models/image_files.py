"""The image files of a folder, and what was left out of it: counted and named, never in silence."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from cbpt_runtime.artifacts.names import is_litter
from cbpt_runtime.errors import ImageDataError
from cbpt_runtime.runtime.preprocess import (
    Preprocess,
    can_decode,
    decode_image,
    is_image,
    missing_decoder,
    to_pixels,
)

# A file that is called so has to be a whole image; the others are images if they begin like one.
_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
_SUFFIXES_OF_SOME = {".avif": "AVIF", ".heic": "HEIF", ".heif": "HEIF"}  # where there is a decoder
IMAGE_SUFFIXES = _SUFFIXES | set(_SUFFIXES_OF_SOME)
"""What images are called, where only their names are to be had."""
_NAMED_AT_MOST = 10
_UNREADABLE_NAMED_AT_MOST = 1000
_READERS = 4
_BATCH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Sorted:
    """The files of a folder, sorted by what they are.

    Attributes:
        images: Paths of the images, by name.
        left_out: All others, by what they are.
    """

    images: tuple[Path, ...]
    left_out: Mapping[str, tuple[Path, ...]]


def sort_files(folder: Path, *, recursive: bool, trust_names: bool = True) -> Sorted:
    """Find the images of a folder; what a file holds decides, not its name.

    Args:
        folder: The folder. Hidden files are left out.
        recursive: Search the folders in it, too, however deep; a folder reached twice by links is read once.
            Otherwise the files in them are left out.
        trust_names: A file with the usual suffix of an image is one, damaged or not: reading it will say why.

    Raises:
        ImageDataError: No such folder.
    """
    left_out: dict[str, list[Path]] = defaultdict(list)
    images: list[Path] = []
    unsure: list[Path] = []
    for path, is_below in _walk(folder):
        if is_ignored(path.name):
            left_out["are hidden or the system's"].append(path)
        elif is_below and not recursive:
            left_out["lie in folders further down"].append(path)
        elif not path.exists():
            left_out["are links that lead nowhere"].append(path)
        elif not path.is_file():
            left_out["are no plain files"].append(path)
        elif trust_names and _is_called_image(path.suffix.lower()):
            images.append(path)
        else:
            unsure.append(path)
    with ThreadPoolExecutor(_READERS) as pool:
        for path, found in zip(unsure, pool.map(is_image, unsure), strict=True):
            decoder = None if found else missing_decoder(path)
            if found:
                images.append(path)
            else:
                left_out[f"are {decoder}" if decoder else "are no images"].append(path)
    return Sorted(
        images=tuple(sorted(images)), left_out={kind: tuple(sorted(own)) for kind, own in left_out.items()}
    )


def _is_called_image(suffix: str) -> bool:
    return suffix in _SUFFIXES or can_decode(_SUFFIXES_OF_SOME.get(suffix, ""))


def left_out_notes(left_out: Mapping[str, Sequence[Path | str]], root: Path) -> tuple[str, ...]:
    """One remark for each kind of file that was left out, with their number and names."""
    return tuple(
        f"left out {len(own)} files that {kind}: {first_few([relative_name(path, root) for path in own])}"
        for kind, own in left_out.items()
        if own
    )


def is_ignored(name: str) -> bool:
    """Whether a file or folder is hidden or one that systems leave everywhere."""
    return name.startswith(".") or is_litter(name)


def relative_name(path: Path | str, root: Path | None) -> str:
    """Return a path relative to a folder, in POSIX form; a text, and a path without a folder, as it is."""
    return str(path) if isinstance(path, str) or root is None else path.relative_to(root).as_posix()


def visible_entries(folder: Path, expected: str) -> list[Path]:
    """Return what is in a folder and neither hidden nor left there by a system, by name.

    Raises:
        ImageDataError: It cannot be listed; the text says what was expected there.
    """
    return [path for path in all_entries(folder, expected) if not is_ignored(path.name)]


def read_files(
    paths: Sequence[Path], preprocess: Preprocess
) -> list[tuple[UInt8[np.ndarray, "height width 3"], str] | str]:
    """Pixels and SHA-256 of each file, or why it is of no use; each file is read once."""

    def read_one(path: Path) -> tuple[UInt8[np.ndarray, "height width 3"], str] | str:
        try:
            content = path.read_bytes()
            return to_pixels(decode_image(content), preprocess), hashlib.sha256(content).hexdigest()
        except OSError as error:
            return (error.strerror or type(error).__name__).lower()
        except ImageDataError as error:
            return error.got

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(read_one, paths))


def unreadable_among(paths: Sequence[Path], preprocess: Preprocess) -> dict[Path, str]:
    """Every file that is of no use, and why."""
    reasons: dict[Path, str] = {}
    for start in range(0, len(paths), _BATCH):
        batch = paths[start : start + _BATCH]
        for path, read in zip(batch, read_files(batch, preprocess), strict=True):
            if isinstance(read, str):
                reasons[path] = read
    return reasons


def undecodable(paths: Sequence[Path]) -> dict[Path, str]:
    """Every file that is no whole image, and why; nothing is kept of the others."""

    def reason(path: Path) -> str | None:
        try:
            decode_image(path)
        except ImageDataError as error:
            return error.got
        return None

    with ThreadPoolExecutor(_READERS) as pool:
        found = zip(paths, pool.map(reason, paths), strict=True)
        return {path: why for path, why in found if why is not None}


def unreadable_error(reasons: Mapping[Path, str], total: int) -> ImageDataError:
    """Return the error that names every file that is of no use."""
    named = [f"{path} ({reason})" for path, reason in reasons.items()]
    return ImageDataError(
        expected=f"{total} readable images",
        got=f"{len(named)} that are not: {first_few(named, most=_UNREADABLE_NAMED_AT_MOST)}",
        fix="Replace or remove them, or go on without them: --skip-unreadable.",
    )


def unreadable_notes(reasons: Mapping[Path, str], root: Path | None) -> tuple[str, ...]:
    """Return the remark that names every file that is of no use and was left out."""
    named = [f"{relative_name(path, root)} ({reason})" for path, reason in reasons.items()]
    listed = first_few(named, most=_UNREADABLE_NAMED_AT_MOST)
    return (f"left out {len(named)} files that are unreadable images: {listed}",) if named else ()


def stacked(
    pixels: Sequence[UInt8[np.ndarray, "height width 3"]], preprocess: Preprocess
) -> UInt8[np.ndarray, "batch height width 3"]:
    """Images of the model's size as one batch, which may be empty."""
    return np.stack(pixels) if pixels else np.zeros((0, *preprocess.image_size, 3), dtype=np.uint8)


def first_few(names: Sequence[str], *, most: int = _NAMED_AT_MOST) -> str:
    """Return the first of a list, ten by default, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def all_entries(folder: Path, expected: str) -> list[Path]:
    """Return what is in a folder, by name.

    Raises:
        ImageDataError: It cannot be listed; the text says what was expected there.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise ImageDataError(
            expected=f"{expected} at {folder}",
            got=(error.strerror or type(error).__name__).lower(),
            fix="Check the path and its mode.",
        ) from error


def _walk(root: Path) -> Iterator[tuple[Path, bool]]:
    """Every file below a folder, and whether it lies in a folder further down; hidden folders as one file."""
    all_entries(root, "a folder of images")  # a loop of links is an error of the folder, not of `resolve`
    waiting, seen = [root], {root.resolve()}
    while waiting:
        folder = waiting.pop()
        for path in all_entries(folder, "a folder of images"):
            if not path.is_dir() or is_ignored(path.name):
                yield path, folder != root
            elif path.resolve() not in seen:
                seen.add(path.resolve())
                waiting.append(path)
