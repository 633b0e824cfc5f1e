"""Files and their hashes, as manifests list them; and reading files that strangers may have made."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, get_args, get_type_hints

NOT_LISTED = " is not in the manifest"
"""How `check_files` ends what it says of a file that nobody lists."""

_CHUNK_BYTES = 1 << 20
NUMBER: Final = (int, float)
_MOST_SHOWN = 5
_Record = TypeVar("_Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedFile:
    """What a manifest says of a file.

    Attributes:
        sha256: Of its content, lower-case hexadecimal.
        size_bytes: None where a manifest does not say.
    """

    sha256: str
    size_bytes: int | None = None


def list_files(folder: Path) -> list[str]:
    """Every file below a folder in order, links and all, as relative POSIX paths; links are not followed."""
    found = (file for file in folder.rglob("*") if file.is_symlink() or not file.is_dir())
    return sorted(file.relative_to(folder).as_posix() for file in found)


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, ListedFile]:
    """Hash files of a folder, as manifests list them."""
    return {name: _hash(folder / name) for name in names}


def check_files(folder: Path, table: Mapping[str, ListedFile], *, besides: Iterable[str] = ()) -> list[str]:
    """Compare all files of a folder with a table.

    Args:
        folder: The folder.
        table: The files of a manifest.
        besides: Files that may be there although the table does not list them.

    Returns:
        One problem per file that is missing, not listed, no plain file, or changed.
    """
    there = set(list_files(folder)) - set(besides)
    problems = [f"{name} is missing" for name in sorted(set(table) - there)]
    problems += [f"{name}{NOT_LISTED}" for name in sorted(there - set(table))]
    for name in sorted(set(table) & there):
        file, entry = folder / name, table[name]
        try:
            if file.is_symlink() or not file.is_file():
                problems.append(f"{name} is not a plain file")
            elif not _is_as_listed(file, entry):
                problems.append(f"{name} was changed")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    return problems


def read_regular_file(path: Path, *, max_bytes: int) -> bytes:
    """Read a file that a stranger may have put there: a regular one, of bounded size.

    A link to a regular file is followed.

    Raises:
        OSError: It cannot be opened, is a device, a pipe or a folder, or is larger than `max_bytes`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe nobody writes to blocks
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        if facts.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"Larger than {max_bytes} bytes", str(path))
        return file.read(facts.st_size)


def read_json_file(path: Path, *, max_bytes: int) -> tuple[bytes, Any]:
    """Read JSON that a stranger may have written; the bytes and the value.

    Raises:
        OSError: As `read_regular_file`.
        ValueError: Not JSON in UTF-8, nested too deeply, or with what JSON has no word for: NaN, infinity,
            half a character.
    """
    raw = read_regular_file(path, max_bytes=max_bytes)
    try:
        value = json.loads(raw.decode(), parse_constant=_finite, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return raw, value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]}, which is no finite number")
    return number


def _is_as_listed(file: Path, entry: ListedFile) -> bool:
    """Whether size (the cheap question first) and hash are those of the table."""
    return entry.size_bytes in (None, file.stat().st_size) and _hash(file).sha256 == entry.sha256


def _hash(file: Path) -> ListedFile:
    """SHA-256 and size of what was really read."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    digest, size = hashlib.sha256(), 0
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(file))
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return ListedFile(sha256=digest.hexdigest(), size_bytes=size)


def shape_problems(value: Any, shape: Any, name: str = "") -> list[str]:
    """Compare a JSON value with a shape.

    Args:
        value: As `json.loads` gives it.
        shape: A type or a tuple of types; ``[shape]`` for a list of such values; ``{"key": shape}`` for an
            object with at least these keys; ``{str: shape}`` for an object of such values.
        name: Of the value, for the problems.

    Returns:
        At most a handful of problems in words; none when it fits.
    """
    problems: list[str] = []
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{name or 'the whole'!r} is not a list"]
        for number, item in enumerate(value):
            problems += shape_problems(item, shape[0], f"{name}[{number}]")
            if len(problems) >= _MOST_SHOWN:
                break
    elif isinstance(shape, Mapping):
        if not isinstance(value, dict):
            return [f"{name or 'the whole'!r} is not an object"]
        wanted = dict.fromkeys(value, shape[str]) if str in shape else shape
        for key, inner in wanted.items():
            inside = f"{name}.{key}" if name else key
            if key not in value:
                problems.append(f"no {inside!r}")
            else:
                problems += shape_problems(value[key], inner, inside)
            if len(problems) >= _MOST_SHOWN:
                break
    elif not isinstance(value, shape) or isinstance(value, bool):
        kinds = shape if isinstance(shape, tuple) else (shape,)
        problems.append(
            f"{name or 'the whole'!r} is not of type {' or '.join(_WORDS[kind] for kind in kinds)}"
        )
    return problems


def records_of(kind: type[_Record], rows: object) -> tuple[_Record, ...]:
    """Make records of rows that a stranger may have written; a row that does not fit is left out.

    Args:
        kind: A dataclass whose fields are texts and numbers, or None.
        rows: A list of JSON objects; anything else has no rows.
    """
    hints = get_type_hints(kind)
    objects = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list | tuple) else []
    found = [{name: row.get(name) for name in hints} for row in objects]
    return tuple(kind(**row) for row in found if all(_fits(row[name], hint) for name, hint in hints.items()))


def _fits(value: object, hint: Any) -> bool:
    kinds = get_args(hint) or (hint,)
    if isinstance(value, int | float):
        return float in kinds and finite_number(value) is not None
    return type(value) in kinds


def finite_number(value: object) -> float | None:
    """Return a number that is one for floats, too; None where there is anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return value if abs(value) <= sys.float_info.max else None


_WORDS: Final = {
    str: "text",
    int: "whole number",
    float: "number",
    dict: "object",
    list: "list",
    bool: "bool",
}
