"""Kinds of outputs, and how one is recognised before it is replaced."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbpt_runtime.artifacts.file_table import list_files, read_json_file
from cbpt_runtime.artifacts.names import json_text, readable

MARKER = ".cbpt-runtime.json"
"""In folders whose files do not say themselves who made them; hidden, so that no reader of images minds."""

MAX_MANIFEST_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of output.

    Attributes:
        name: In words.
        own_files: Names of the files an output is made of by its own account, damaged or not; None for what
            is not of this kind.
        marker: Whether a `MARKER` is put into it, because nothing else tells what it is.
        is_file: Whether it is a single file, which never replaces a folder.
    """

    name: str
    own_files: Callable[[Path], Collection[str] | None]
    marker: bool = False
    is_file: bool = False

    def refusal(self, path: Path) -> str | None:
        """Why `--force` may not replace what is at a path, in words; None when it may.

        An empty folder may be replaced; a link never, nor a folder with files its maker did not put there.
        """
        if path.is_symlink():
            return "something else: a link"
        if path.is_dir() and not self.is_file and not any(path.iterdir()):
            return None
        own = self.own_files(path)
        if own is None or self.is_file == path.is_dir():
            return "something else"
        there = map(readable, list_files(path)) if path.is_dir() else ()
        strangers = sorted(set(there) - set(map(readable, own)))
        if strangers:
            more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
            return f"something else, too: {', '.join(strangers[:3])}{more}"
        return None


def listed_in(
    manifest: str, is_own: Callable[[dict[str, Any]], bool], *, besides: Collection[str] = ()
) -> Callable[[Path], list[str] | None]:
    """`Kind.own_files` of folders whose manifest lists their files.

    Args:
        manifest: Its name.
        is_own: Whether a manifest with a table of files is that of such a folder.
        besides: Files that belong to it and are in no manifest.
    """

    def own_files(folder: Path) -> list[str] | None:
        try:
            _, found = read_json_file(folder / manifest, max_bytes=MAX_MANIFEST_BYTES)
        except (OSError, ValueError):
            return None
        files = found.get("files") if isinstance(found, dict) else None
        return [manifest, *besides, *files] if isinstance(files, dict) and is_own(found) else None

    return own_files


def marked(name: str) -> Kind:
    """A kind of folder that is recognised by its marker."""
    return Kind(name=name, own_files=lambda folder: read_marker(folder, name), marker=True)


def write_marker(folder: Path, name: str) -> None:
    """Mark a folder: its kind and the files that are in it now."""
    content = {"kind": f"cbpt-runtime {name}", "files": [*list_files(folder), MARKER]}
    (folder / MARKER).write_text(json_text(content) + "\n", encoding="utf-8")


def read_marker(folder: Path, name: str) -> list[str] | None:
    """The files a marker lists; None where there is none, or one of another kind."""
    try:
        _, content = read_json_file(folder / MARKER, max_bytes=MAX_MANIFEST_BYTES)
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("kind") != f"cbpt-runtime {name}":
        return None
    files = content.get("files")
    return [str(file) for file in files] if isinstance(files, list) else None
