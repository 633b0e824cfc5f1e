"""Class lists, class folders, and the few clean images purification may see."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import Int, UInt8

from cbpt_runtime.artifacts.names import name_bytes
from cbpt_runtime.errors import ClassListError, ConfigError, ImageDataError
from cbpt_runtime.models.image_files import (
    all_entries,
    first_few,
    is_ignored,
    left_out_notes,
    read_files,
    relative_name,
    sort_files,
    stacked,
    unreadable_among,
    unreadable_error,
    unreadable_notes,
)
from cbpt_runtime.runtime.preprocess import Preprocess

Item = TypeVar("Item")

HELDOUT_SHOTS = 8
"""Images per class a split holds out, unless told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassList:
    """Class names in order and how to put each into words.

    Attributes:
        names: Two or more, all different (case, '_' and ' ' make no difference).
        templates: Per class one or more texts in which '{}' stands for the name.
        folders: Per class the name of its image folder, where that may be another than the class's.

    Raises:
        ClassListError: Fewer than two names, equal or empty names or folders, or a class without templates.
    """

    names: tuple[str, ...]
    templates: tuple[tuple[str, ...], ...]
    folders: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(len(self.names) >= 2, "two or more classes", first_few(list(self.names)) or "an empty list")
        require(all(name.strip() for name in self.names), "a name for every class", "an empty name")
        equal = _equal_names(self.names)
        if equal:
            raise ClassListError(
                expected="every class name once (case, '_' and ' ' make no difference)",
                got=first_few(equal),
                fix="Rename one, or give each its folder: a list with the columns folder and name.",
            )
        require(
            len(self.folders) in (0, len(self.names)) and not _equal_names(self.folders),
            "for every class a folder of its own",
            first_few(_equal_names(self.folders)) or f"{len(self.folders)} for {len(self.names)} classes",
        )
        require(
            len(self.templates) == len(self.names),
            f"templates for {len(self.names)} classes",
            f"templates for {len(self.templates)}",
        )
        bare = [
            name
            for name, own in zip(self.names, self.templates, strict=True)
            if not own or not all(template.strip() for template in own)
        ]
        require(not bare, "one or more non-empty templates for every class", f"none for {first_few(bare)}")

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
    """Return a class name as it stands in a sentence: '_' read as a space."""
    return " ".join(name.replace("_", " ").split())


def default_templates() -> tuple[str, ...]:
    """open_clip's 80 ImageNet templates, with '{}' for the name."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


def evenly_spaced(items: Sequence[Item], most: int) -> Sequence[Item]:
    """At most so many of the items, the first among them."""
    return items[:: max(1, -(-len(items) // most))]


class ClassFolders(list[list[Path]]):
    """Per class its image files, by name.

    Attributes:
        notes: Remarks for the user: what was left out.
    """

    notes: tuple[str, ...] = ()


def find_class_folders(
    root: Path,
    classes: ClassList | Sequence[str],
    *,
    folders: Sequence[str] = (),
    allow_missing: bool = False,
) -> ClassFolders:
    """Find the image files of each class; one folder per class, named as the list says or like the class.

    Case makes no difference, and '_', ' ' and '/' are equal. Hidden entries are left out.

    Args:
        root: The folder of class folders.
        classes: The class list, or names in order.
        folders: With names alone, those of their folders, where they may be others.
        allow_missing: Classes without a folder or without images get an empty list.

    Raises:
        ImageDataError: No such folder, or class folders missing, unexpected, doubled or empty: all in one
            message.
    """
    names = classes.names if isinstance(classes, ClassList) else tuple(classes)
    folders = classes.folders if isinstance(classes, ClassList) else tuple(folders)
    by_key, beside = _folders_by_key(root)
    keys = [
        next((key for key in map(class_key, pair) if key in by_key), class_key(pair[0]))
        for pair in zip(folders or names, names, strict=True)
    ]
    found = [None if key not in by_key else sort_files(by_key[key][0], recursive=False) for key in keys]
    problems = {
        "missing": [
            name
            for name, own in zip(folders or names, found, strict=True)
            if own is None and not allow_missing
        ],
        "not in the class list": [own[0].name for key, own in by_key.items() if key not in set(keys)],
        "doubled": [f"{own[0].name} = {own[1].name}" for own in by_key.values() if len(own) > 1],
        "without images": [
            name
            for name, own in zip(names, found, strict=True)
            if own is not None and not own.images and not allow_missing
        ],
    }
    _require_folders(root, problems, any(own is not None and own.images for own in found))
    files = ClassFolders([] if own is None else list(own.images) for own in found)
    left_out = defaultdict(list, beside)
    for own in found:
        for kind, paths in ({} if own is None else own.left_out).items():
            left_out[kind].extend(paths)
    files.notes = left_out_notes(left_out, root)
    return files


def _require_folders(root: Path, problems: Mapping[str, Sequence[str]], has_images: bool) -> None:
    got = [f"{kind}: {first_few(which)}" for kind, which in problems.items() if which]
    if not got and not has_images:
        got = ["no images at all"]
    if got:
        fix = "Rename, add or remove folders, or correct the class list"
        is_renamed = bool(problems.get("missing") and problems.get("not in the class list"))
        more = "; a list with the columns folder and name says which is whose" if is_renamed else ""
        raise ImageDataError(
            expected=f"one folder with images per class in {root}", got="; ".join(got), fix=f"{fix}{more}."
        )


def read_images(paths: Sequence[Path], preprocess: Preprocess) -> UInt8[np.ndarray, "batch height width 3"]:
    """Decode, resize and crop image files, in order.

    Raises:
        ImageDataError: One or more files that are not usable images: all in one message.
    """
    read = read_files(paths, preprocess)
    if any(isinstance(entry, str) for entry in read):
        raise unreadable_error(unreadable_among(paths, preprocess), len(paths))
    return stacked([entry[0] for entry in read if not isinstance(entry, str)], preprocess)


def draw_clean_split(
    root: Path,
    classes: ClassList | Sequence[str],
    preprocess: Preprocess,
    *,
    shots: int = 16,
    heldout_shots: int = HELDOUT_SHOTS,
    seed: int = 0,
    skip_unreadable: bool = False,
) -> CleanSplit:
    """Draws clean images per class: some to tune on and, from the rest, some held out for selection.

    A class with fewer than `shots + heldout_shots` images keeps one to hold out if it has two or more. The
    draw of a class depends on the seed, its place in the list and its file names only.

    Args:
        root: The folder of class folders.
        classes: The class list, or names in order.
        preprocess: How images become the model's input.
        shots: Images per class to tune on.
        heldout_shots: Images per class to hold out.
        seed: Of the draw.
        skip_unreadable: Images that cannot be read make room for others, and are noted.

    Raises:
        ConfigError: `shots` below 1 or `heldout_shots` or `seed` below 0.
        ImageDataError: As `find_class_folders`, or images that cannot be read: all those of the folder.
    """
    check_draw(shots, heldout_shots, seed)
    names = classes.names if isinstance(classes, ClassList) else tuple(classes)
    files = find_class_folders(root, classes)
    orders = [np.random.default_rng([seed, label]).permutation(len(own)) for label, own in enumerate(files)]
    tune, heldout = _draw(files, orders, shots, heldout_shots)
    read = read_files([path for path, _ in tune + heldout], preprocess)
    reasons: dict[Path, str] = {}
    if any(isinstance(entry, str) for entry in read):
        everything = [path for own in files for path in own]
        reasons = unreadable_among(everything, preprocess)
        if not skip_unreadable:
            raise unreadable_error(reasons, len(everything))
        orders = _without(reasons, orders, files, names, root)
        tune, heldout = _draw(files, orders, shots, heldout_shots)
        read = read_files([path for path, _ in tune + heldout], preprocess)
    good = [entry for entry in read if not isinstance(entry, str)]
    images, digests = stacked([entry[0] for entry in good], preprocess), [entry[1] for entry in good]
    labels = np.array([label for _, label in tune + heldout], dtype=np.int64)
    lines = [
        f"{relative_name(path, root)}\0{digest}"
        for (path, _), digest in zip(tune + heldout, digests, strict=True)
    ]
    counts = {name: len(order) for name, order in zip(names, orders, strict=True)}
    return CleanSplit(
        tune_images=images[: len(tune)],
        tune_labels=labels[: len(tune)],
        heldout_images=images[len(tune) :],
        heldout_labels=labels[len(tune) :],
        digest=split_digest(lines, len(tune)),
        notes=(
            *files.notes,
            *unreadable_notes(reasons, root),
            *_few_notes(counts, shots, heldout_shots),
            *_copy_notes(digests, len(tune)),
        ),
    )


def _without(
    reasons: Mapping[Path, str],
    orders: Sequence[Int[np.ndarray, " images"]],
    files: Sequence[Sequence[Path]],
    names: Sequence[str],
    root: Path,
) -> list[Int[np.ndarray, " readable"]]:
    """Return the orders of the draw without the files that cannot be read."""
    kept = [
        np.array([index for index in order if own[index] not in reasons], dtype=np.int64)
        for order, own in zip(orders, files, strict=True)
    ]
    empty = [name for name, order in zip(names, kept, strict=True) if not len(order)]
    _require_folders(root, {"without readable images": empty}, has_images=True)
    return kept


def _draw(
    files: Sequence[Sequence[Path]],
    orders: Sequence[Int[np.ndarray, " images"]],
    shots: int,
    heldout_shots: int,
) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    """Files and labels to tune on, and those to hold out."""
    tune: list[tuple[Path, int]] = []
    heldout: list[tuple[Path, int]] = []
    for label, (own, order) in enumerate(zip(files, orders, strict=True)):
        first, then = parts_of_class(order, shots, heldout_shots)
        tune += [(own[index], label) for index in first]
        heldout += [(own[index], label) for index in then]
    return tune, heldout


def _few_notes(counts: Mapping[str, int], shots: int, heldout_shots: int) -> list[str]:
    few = [f"{name} ({count})" for name, count in counts.items() if count < shots + heldout_shots]
    wanted = f"{shots} + {heldout_shots} held out"
    return (
        [f"fewer than {wanted} images in {len(few)} of {len(counts)} classes: {first_few(few)}"]
        if few
        else []
    )


def _copy_notes(digests: Sequence[str], n_tune: int) -> list[str]:
    shared = set(digests[:n_tune]) & set(digests[n_tune:])
    text = f"{len(shared)} files are in both the tuning and the held-out part under different names"
    return [text] if shared else []


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
    """Split one class's images into those to tune on and those to hold out: of two images, one each."""
    n_tune = min(shots, max(1, len(order) - min(1, heldout_shots)))
    return order[:n_tune], order[n_tune : n_tune + heldout_shots]


def _folders_by_key(root: Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Return the folders below a root by their key, and what lies beside them, by what it is."""
    folders, beside = defaultdict(list), defaultdict(list)
    for path in all_entries(root, "a folder of class folders"):
        if is_ignored(path.name):
            beside["are hidden or the system's"].append(path)
        elif path.is_dir():
            folders[class_key(path.name)].append(path)
        else:
            beside["lie beside the folders of the classes"].append(path)
    return dict(folders), beside


def split_digest(lines: Sequence[str], n_tune: int) -> str:
    """SHA-256 over a line for each file of a split, those to tune on first, and how many these are."""
    return hashlib.sha256(name_bytes("\n".join([str(n_tune), *lines]))).hexdigest()


def class_key(name: str) -> str:
    """Return what two names of the same class have in common: case, '_', ' ' and '/' make no difference."""
    return unicodedata.normalize("NFC", spoken(name.replace("/", " "))).casefold()


def class_index(names: Sequence[str], name: str, *, where: object = "the class list") -> int:
    """Index of a class by its name, as `class_key` reads it.

    Raises:
        ClassListError: It is none of the names; the text lists some.
    """
    key = class_key(name)
    for index, own in enumerate(names):
        if class_key(own) == key:
            return index
    raise ClassListError(
        expected=f"a class of {where}",
        got=repr(name),
        fix=f"Choose one of: {first_few(list(names), most=20)}.",
    )


def _equal_names(names: Sequence[str]) -> list[str]:
    counts = Counter(map(class_key, names))
    return [name for name in names if counts[class_key(name)] > 1]


def require(holds: bool, expected: str, got: str) -> None:
    """Raise `class_list_error` unless a condition of class lists holds."""
    if not holds:
        raise class_list_error(expected, got)


def class_list_error(expected: str, got: str) -> ClassListError:
    """Return the error of a class list that is not as expected."""
    return ClassListError(
        expected=expected, got=got, fix="Correct the class list (--classes) or its templates."
    )
