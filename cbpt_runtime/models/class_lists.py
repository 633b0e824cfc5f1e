"""Class lists from files: names, and where they are given the folders and templates of each class.

A text file holds one name per line, or columns: folder, name and any number of templates, separated by tabs
(commas in a .csv file). Lines such as `n01440764 tench, Tinca tinca`, ImageNet's own, are understood.
JSON is a list of names or of `{"name": ..., "folder": ..., "templates": [...]}`; or an object that maps names
to templates, folders to names, or names to numbers; or torchvision's `imagenet_class_index.json`.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbpt_runtime.models.data import (
    ClassList,
    class_key,
    class_list_error,
    default_templates,
    require,
)
from cbpt_runtime.models.image_files import first_few

_SYNSET = re.compile(r"(n\d{8})\s+(\S.*)")
_MAX_BYTES = 64 << 20
_SENTENCE = 5
"""Words from which on a template without '{}' is a sentence about its class, and no bare name."""

_HEADER = ("folder", "name")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One class as the file has it."""

    name: str
    folder: str | None = None
    templates: tuple[str, ...] | None = None


def read_class_list(path: str | Path, *, templates: Sequence[str] | None = None) -> ClassList:
    """Read class names from a file, with their folders and templates where it gives them.

    Two classes may have the same name if they have different folders, as in ImageNet: the folder is then put
    behind the name, and not into the prompts.

    Args:
        path: The file, in UTF-8; JSON if its suffix is .json.
        templates: For classes without their own; the 80 ImageNet templates if None.

    Raises:
        ClassListError: Missing, unreadable or malformed file, or a list `ClassList` refuses.
    """
    path = Path(path)
    content = _read_text(path)
    shared = default_templates() if templates is None else tuple(templates)
    without = [template for template in shared if "{}" not in template]
    require(not without, "'{}' for the class name in every template", first_few(without))
    entries = _json_entries(content, path) if path.suffix.lower() == ".json" else _text_entries(content, path)
    counts = Counter(class_key(entry.name) for entry in entries)
    parts = [_parts(entry, shared, is_doubled=counts[class_key(entry.name)] > 1) for entry in entries]
    return ClassList(
        names=tuple(name for name, _ in parts),
        templates=tuple(own for _, own in parts),
        folders=tuple(entry.folder or entry.name for entry in entries)
        if any(entry.folder for entry in entries)
        else (),
    )


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:  # it may be a pipe that the operator typed
            raw = file.read(_MAX_BYTES + 1)
        require(len(raw) <= _MAX_BYTES, f"a file of at most {_MAX_BYTES:,} bytes", f"more in {path}")
        content = raw.decode("utf-8-sig")
        json.dumps(content, ensure_ascii=False).encode()
    except OSError as error:
        raise class_list_error(f"a readable file {path}", (error.strerror or "no access").lower()) from error
    except UnicodeError as error:
        raise class_list_error(f"UTF-8 text in {path}", str(error)) from error
    return content


def _parts(entry: _Entry, shared: tuple[str, ...], *, is_doubled: bool) -> tuple[str, tuple[str, ...]]:
    """Name and templates of a class; a doubled name gets its folder behind it, its prompts do not."""
    own = shared if entry.templates is None else entry.templates
    if not is_doubled or entry.folder is None or class_key(entry.folder) == class_key(entry.name):
        return entry.name, own
    return f"{entry.name} ({entry.folder})", tuple(text.replace("{}", entry.name) for text in own)


def _text_entries(content: str, path: Path) -> list[_Entry]:
    lines = [line for line in content.splitlines() if line.strip()]
    is_table = path.suffix.lower() == ".csv" and any("," in line for line in lines)
    if is_table or any("\t" in line.strip() for line in lines):
        rows = list(csv.reader(lines)) if is_table else [line.split("\t") for line in lines]
        return _column_entries(rows, path)
    synsets = [_SYNSET.fullmatch(line.strip()) for line in lines]
    found = [match for match in synsets if match]
    if len(found) == len(lines):
        return [_Entry(folder=match[1], name=match[2].partition(",")[0].strip()) for match in found]
    return [_Entry(name=line.strip()) for line in lines]


def _column_entries(rows: list[list[str]], path: Path) -> list[_Entry]:
    rows = [[cell.strip() for cell in row] for row in rows]
    if rows and tuple(cell.lower() for cell in rows[0][:2]) == _HEADER:
        rows = rows[1:]
    bad = [f"line {number}: {row[0]:.40}" for number, row in enumerate(rows, start=1) if not all(row[:2])]
    bad += [f"line {number}: {row[0]:.40}" for number, row in enumerate(rows, start=1) if len(row) < 2]
    require(not bad, f"folder and name in every line of {path}", first_few(bad))
    return [
        _Entry(
            folder=folder,
            name=name,
            templates=_own_templates(name, [cell for cell in more if cell]) if any(more) else None,
        )
        for folder, name, *more in rows
    ]


def _json_entries(content: str, path: Path) -> list[_Entry]:
    try:
        parsed = json.loads(content, object_pairs_hook=_Pairs)
        json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise class_list_error(f"text in {path}", "half of a surrogate pair") from error
    except (ValueError, RecursionError) as error:
        raise class_list_error(f"valid JSON in {path}", str(error)) from error
    if isinstance(parsed, _Pairs):
        return _object_entries(parsed)
    require(isinstance(parsed, list), f"a JSON list or object in {path}", type(parsed).__name__)
    return [_json_entry(entry, path) for entry in parsed]


def _object_entries(pairs: _Pairs) -> list[_Entry]:
    values = [value for _, value in pairs]
    if pairs and all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return [_Entry(name=name) for name, _ in sorted(pairs, key=lambda pair: pair[1])]
    if pairs and all(_is_index_entry(key, value) for key, value in pairs):
        in_order = sorted(pairs, key=lambda pair: int(pair[0]))
        return [_Entry(folder=folder, name=name) for _, (folder, name) in in_order]
    return [
        _Entry(folder=key, name=value)
        if isinstance(value, str)
        else _Entry(name=key, templates=_own_templates(key, value))
        for key, value in pairs
    ]


def _is_index_entry(key: str, value: Any) -> bool:
    """Whether it is an entry as in `imagenet_class_index.json`: "0": ["n01440764", "tench"]."""
    is_pair = type(value) is list and len(value) == 2 and all(isinstance(part, str) for part in value)
    return key.isdecimal() and is_pair and not any("{}" in part for part in value)


def _json_entry(entry: Any, path: Path) -> _Entry:
    if isinstance(entry, str):
        return _Entry(name=entry)
    fields = dict(entry) if isinstance(entry, _Pairs) else {}
    known = isinstance(fields.get("name"), str) and set(fields) <= {"name", "folder", "templates"}
    known = known and isinstance(fields.get("folder"), str | None)
    shape = '{"name": ..., "folder": ..., "templates": [...]}'
    require(known, f"names or {shape} in {path}", f"{entry!r:.80}")
    own = fields.get("templates")
    return _Entry(
        name=fields["name"],
        folder=fields.get("folder"),
        templates=None if own is None else _own_templates(fields["name"], own),
    )


def _own_templates(name: str, value: Any) -> tuple[str, ...]:
    is_texts = type(value) is list and all(isinstance(template, str) for template in value)
    require(is_texts, f"a list of templates for {name}", f"{value!r:.80}")
    is_bare = all("{}" not in text and len(text.split()) < _SENTENCE for text in value)
    require(
        not value or not is_bare or not any(text.strip() for text in value),
        f"templates for {name}, with '{{}}' for the name or whole sentences",
        f"bare words: {first_few(value)}",
    )
    return tuple(value)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its keys as written, so that repeated ones are noticed."""
