"""Class lists, class folders, and the few clean images purification may see."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, UInt8

from cbpt_runtime.errors import ClassListError, ConfigError, ImageDataError
from cbpt_runtime.models.preprocess import Preprocess, decode_image, to_pixels

_MAX_LIST_BYTES = 64 << 20
_IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm",
)  # fmt: skip
_NAMED_AT_MOST = 10
_READERS = 4
HELDOUT_SHOTS = 8
"""Images per class a split holds out, unless told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassList:
    """Class names in order and how to put each into words.

    Attributes:
        names: Two or more, all different (case, '_' and ' ' make no difference).
        templates: Per class one or more texts in which '{}' stands for the name.

    Raises:
        ClassListError: Fewer than two names, equal or empty names, or a class without templates.
    """

    names: tuple[str, ...]
    templates: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        _require(len(self.names) >= 2, "two or more classes", first_few(list(self.names)) or "an empty list")
        _require(all(name.strip() for name in self.names), "a name for every class", "an empty name")
        counts = Counter(map(class_key, self.names))
        equal = [name for name in self.names if counts[class_key(name)] > 1]
        _require(not equal, "every class name once (case, '_' and ' ' make no difference)", first_few(equal))
        _require(
            len(self.templates) == len(self.names),
            f"templates for {len(self.names)} classes",
            f"templates for {len(self.templates)}",
        )
        bare = [
            name
            for name, own in zip(self.names, self.templates, strict=True)
            if not own or not all(template.strip() for template in own)
        ]
        _require(not bare, "one or more non-empty templates for every class", f"none for {first_few(bare)}")

    def texts(self) -> tuple[tuple[str, ...], ...]:
        """Per class its templates with the name put in, '_' in names read as a space."""
        return tuple(
            tuple(template.replace("{}", spoken(name)) for template in own)
            for name, own in zip(self.names, self.templates, strict=True)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanSplit:
    """The clean images of a purification: some to tune on, others to select on, none in both.

    Attributes:
        tune_images: uint8 RGB at the model's input size.
        tune_labels: Class indices.
        heldout_images: As `tune_images`; may be empty.
        heldout_labels: As `tune_labels`.
        digest: SHA-256 over the paths (relative to the folder) and bytes of the drawn files.
        notes: Remarks for the user, such as classes with fewer images than asked for.
        labelled_by: Where the labels come from: class folders, or the suspect's own zero-shot head.
    """

    tune_images: UInt8[np.ndarray, "tune height width 3"]
    tune_labels: Int[np.ndarray, " tune"]
    heldout_images: UInt8[np.ndarray, "heldout height width 3"]
    heldout_labels: Int[np.ndarray, " heldout"]
    digest: str
    notes: tuple[str, ...] = ()
    labelled_by: Literal["folders", "suspect"] = "folders"


def spoken(name: str) -> str:
    """A class name as it stands in a sentence: '_' read as a space."""
    return " ".join(name.replace("_", " ").split())


def default_templates() -> tuple[str, ...]:
    """open_clip's 80 ImageNet templates, with '{}' for the name."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


def read_class_list(path: str | Path, *, templates: Sequence[str] | None = None) -> ClassList:
    """Reads class names, and with JSON also templates, from a file.

    Text files hold one name per line; empty lines are skipped. JSON (suffix .json) is a list of names or of
    `{"name": ..., "templates": [...]}`, or an object that maps names to their templates.

    Args:
        path: The file, in UTF-8.
        templates: For classes without their own; the 80 ImageNet templates if None.

    Raises:
        ClassListError: Missing, unreadable or malformed file, or a list `ClassList` refuses.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:  # it may be a pipe that the operator typed
            raw = file.read(_MAX_LIST_BYTES + 1)
        _require(
            len(raw) <= _MAX_LIST_BYTES, f"a file of at most {_MAX_LIST_BYTES:,} bytes", f"more in {path}"
        )
        content = raw.decode("utf-8-sig")
    except OSError as error:
        raise _list_error(f"a readable file {path}", (error.strerror or "no access").lower()) from error
    except UnicodeDecodeError as error:
        raise _list_error(f"UTF-8 text in {path}", str(error)) from error
    shared = default_templates() if templates is None else tuple(templates)
    without = [template for template in shared if "{}" not in template]
    _require(not without, "'{}' for the class name in every template", first_few(without))
    if path.suffix.lower() == ".json":
        entries = _json_entries(content, path)
    else:
        entries = [(line.strip(), None) for line in content.splitlines() if line.strip()]
    return ClassList(
        names=tuple(name for name, _ in entries),
        templates=tuple(shared if own is None else own for _, own in entries),
    )


def find_class_folders(
    root: Path, classes: ClassList | Sequence[str], *, allow_missing: bool = False
) -> list[list[Path]]:
    """Finds the image files of each class; one folder per class, named like the class.

    Case makes no difference, and '_', ' ' and '/' are equal. Hidden entries are ignored.

    Args:
        root: The folder of class folders.
        classes: The class list, or names in order.
        allow_missing: Classes without a folder or without images get an empty list.

    Returns:
        Per class its image files, sorted by name.

    Raises:
        ImageDataError: No such folder, or class folders missing, unexpected, doubled or empty: all in one
            message.
    """
    names = classes.names if isinstance(classes, ClassList) else tuple(classes)
    folders = _folders_by_key(root)
    wanted = {class_key(name): name for name in names}
    problems = {
        "missing": [name for key, name in wanted.items() if key not in folders and not allow_missing],
        "not in the class list": [found[0].name for key, found in folders.items() if key not in wanted],
        "doubled": [f"{found[0].name} = {found[1].name}" for found in folders.values() if len(found) > 1],
    }
    files = [
        _image_files(folders[class_key(name)][0]) if class_key(name) in folders else [] for name in names
    ]
    if not allow_missing:
        problems["without images"] = [
            name for name, own in zip(names, files, strict=True) if not own and class_key(name) in folders
        ]
    found_problems = [f"{kind}: {first_few(which)}" for kind, which in problems.items() if which]
    if not found_problems and not any(files):
        found_problems = ["no images at all"]
    if found_problems:
        raise ImageDataError(
            expected=f"one folder with images per class in {root}",
            got="; ".join(found_problems),
            fix="Rename, add or remove folders, or correct the class list.",
        )
    return files


def read_images(paths: Sequence[Path], preprocess: Preprocess) -> UInt8[np.ndarray, "batch height width 3"]:
    """Decodes, resizes and crops image files, in order.

    Raises:
        ImageDataError: One or more files that are not usable images: all in one message.
    """
    return _load(paths, preprocess)[0]


def draw_clean_split(
    root: Path,
    classes: ClassList | Sequence[str],
    preprocess: Preprocess,
    *,
    shots: int = 16,
    heldout_shots: int = HELDOUT_SHOTS,
    seed: int = 0,
) -> CleanSplit:
    """Draws clean images per class: some to tune on and, from the rest, some held out for selection.

    A class with fewer than `shots + heldout_shots` images keeps one to hold out if it has two or more. The
    draw of a class depends on the seed, its place in the list and its file names only.

    Raises:
        ConfigError: `shots` below 1 or `heldout_shots` or `seed` below 0.
        ImageDataError: As `find_class_folders` and `read_images`.
    """
    check_draw(shots, heldout_shots, seed)
    names = classes.names if isinstance(classes, ClassList) else tuple(classes)
    tune: list[tuple[Path, int]] = []
    heldout: list[tuple[Path, int]] = []
    short: list[str] = []
    for label, files in enumerate(find_class_folders(root, names)):
        order = np.random.default_rng([seed, label]).permutation(len(files))
        first, then = parts_of_class(order, shots, heldout_shots)
        tune += [(files[index], label) for index in first]
        heldout += [(files[index], label) for index in then]
        if len(first) + len(then) < shots + heldout_shots:
            short.append(f"{names[label]} ({len(files)})")
    images, digests = _load([path for path, _ in tune + heldout], preprocess)
    notes = []
    if short:
        wanted = f"{shots} + {heldout_shots} held out"
        notes.append(
            f"fewer than {wanted} images in {len(short)} of {len(names)} classes: {first_few(short)}"
        )
    if shared := set(digests[: len(tune)]) & set(digests[len(tune) :]):
        notes.append(
            f"{len(shared)} files are in both the tuning and the held-out part under different names"
        )
    labels = np.array([label for _, label in tune + heldout], dtype=np.int64)
    lines = [
        f"{path.relative_to(root).as_posix()}\0{digest}"
        for (path, _), digest in zip(tune + heldout, digests, strict=True)
    ]
    return CleanSplit(
        tune_images=images[: len(tune)],
        tune_labels=labels[: len(tune)],
        heldout_images=images[len(tune) :],
        heldout_labels=labels[len(tune) :],
        digest=split_digest(lines, len(tune)),
        notes=tuple(notes),
    )


def check_draw(shots: int, heldout_shots: int, seed: int) -> None:
    """Refuses numbers no images can be drawn by.

    Raises:
        ConfigError: `shots` below 1 or `heldout_shots` or `seed` below 0.
    """
    for name, value, least in (("shots", shots, 1), ("heldout_shots", heldout_shots, 0), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(expected=f"{name} of at least {least}", got=str(value), fix=f"Raise --{name}.")


def parts_of_class(
    order: Int[np.ndarray, " images"], shots: int, heldout_shots: int
) -> tuple[Int[np.ndarray, " tune"], Int[np.ndarray, " heldout"]]:
    """The images of one class to tune on and those to hold out: one of them at least where there are two."""
    n_tune = min(shots, max(1, len(order) - min(1, heldout_shots)))
    return order[:n_tune], order[n_tune : n_tune + heldout_shots]


def visible_entries(folder: Path, expected: str) -> list[Path]:
    """What is in a folder and not hidden, by name.

    Raises:
        ImageDataError: It cannot be listed; the text says what was expected there.
    """
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise ImageDataError(
            expected=f"{expected} at {folder}",
            got=(error.strerror or type(error).__name__).lower(),
            fix="Check the path and its mode.",
        ) from error


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


def stacked(
    pixels: Sequence[UInt8[np.ndarray, "height width 3"]], preprocess: Preprocess
) -> UInt8[np.ndarray, "batch height width 3"]:
    """Images of the model's size as one batch, which may be empty."""
    return np.stack(pixels) if pixels else np.zeros((0, *preprocess.image_size, 3), dtype=np.uint8)


def first_few(names: Sequence[str]) -> str:
    """The first ten of a list, and how many more there are."""
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _json_entries(content: str, path: Path) -> list[tuple[str, tuple[str, ...] | None]]:
    try:
        parsed = json.loads(content, object_pairs_hook=_pairs)
    except (ValueError, RecursionError) as error:
        raise _list_error(f"valid JSON in {path}", str(error)) from error
    if isinstance(parsed, _Pairs):
        return [(name, _own_templates(name, value)) for name, value in parsed]
    _require(isinstance(parsed, list), f"a JSON list or object in {path}", type(parsed).__name__)
    return [_json_entry(entry, path) for entry in parsed]


def _json_entry(entry: Any, path: Path) -> tuple[str, tuple[str, ...] | None]:
    if isinstance(entry, str):
        return entry, None
    fields = dict(entry) if isinstance(entry, _Pairs) else {}
    known = isinstance(fields.get("name"), str) and set(fields) <= {"name", "templates"}
    _require(known, f'names or {{"name": ..., "templates": [...]}} in {path}', f"{entry!r:.80}")
    own = fields.get("templates")
    return fields["name"], None if own is None else _own_templates(fields["name"], own)


def _own_templates(name: str, value: Any) -> tuple[str, ...]:
    is_texts = isinstance(value, list) and all(isinstance(template, str) for template in value)
    _require(is_texts, f"a list of templates for {name}", f"{value!r:.80}")
    return tuple(value)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its keys as written, so that repeated ones are noticed."""


def _pairs(items: list[tuple[str, Any]]) -> _Pairs:
    return _Pairs(items)


def _folders_by_key(root: Path) -> dict[str, list[Path]]:
    folders = defaultdict(list)
    for path in visible_entries(root, "a folder of class folders"):
        if path.is_dir():
            folders[class_key(path.name)].append(path)
    return dict(folders)


def _image_files(folder: Path) -> list[Path]:
    entries = visible_entries(folder, "a folder of images")
    return [path for path in entries if path.suffix.lower() in _IMAGE_SUFFIXES and path.is_file()]


def _load(
    paths: Sequence[Path], preprocess: Preprocess
) -> tuple[UInt8[np.ndarray, "batch height width 3"], list[str]]:
    """Pixels and SHA-256 of each file, all of which have to be of use."""
    read = read_files(paths, preprocess)
    unusable = [
        f"{path} ({entry})" for path, entry in zip(paths, read, strict=True) if isinstance(entry, str)
    ]
    if unusable:
        raise ImageDataError(
            expected=f"{len(paths)} readable images",
            got=f"{len(unusable)} that are not: {first_few(unusable)}",
            fix="Replace or remove them.",
        )
    good = [entry for entry in read if not isinstance(entry, str)]
    return stacked([entry[0] for entry in good], preprocess), [entry[1] for entry in good]


def split_digest(lines: Sequence[str], n_tune: int) -> str:
    """SHA-256 over a line for each file of a split, those to tune on first, and how many these are."""
    return hashlib.sha256("\n".join([str(n_tune), *lines]).encode()).hexdigest()


def class_key(name: str) -> str:
    """What two names of the same class have in common: case, '_', ' ' and '/' make no difference."""
    return unicodedata.normalize("NFC", spoken(name.replace("/", " "))).casefold()


def _require(holds: bool, expected: str, got: str) -> None:
    if not holds:
        raise _list_error(expected, got)


def _list_error(expected: str, got: str) -> ClassListError:
    return ClassListError(
        expected=expected, got=got, fix="Correct the class list (--classes) or its templates."
    )
