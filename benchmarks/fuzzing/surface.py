"""What a reader under test has to say of itself, and what an input is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from random import Random

FOLDER, PIPE, LINK = "folder", "pipe", "link to "
Files = dict[str, bytes | str]
"""Names to content; a text stands for what is no file: FOLDER, PIPE, or LINK and where it leads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One input.

    Attributes:
        files: What it is made of.
        how: Which of its ways the reader takes, where it has several.
        is_whole: Whether nothing was spoiled, so that it has to be accepted.
    """

    files: Files
    how: str = ""
    is_whole: bool = False


class Surface:
    """A reader of what strangers wrote.

    Attributes:
        name: Of the surface.
        formats: Its inputs take turns.
        limit_s: Longest time for one input.
        limit_mb: What the reader may need beyond what its process had, in MiB.
        is_on_disk: Whether the reader takes paths.
    """

    name = ""
    formats: tuple[str, ...] = ()
    limit_s = 20.0
    limit_mb = 256
    is_on_disk = True

    def prepare(self, folder: Path) -> None:
        """Write whole inputs; in a process of its own."""

    def load(self, folder: Path) -> None:
        """Read what `prepare` wrote."""

    def make(self, rng: Random, form: str) -> Input:
        """Make an input of a format; the same for the same state of the generator."""
        raise NotImplementedError

    def run(self, made: Input, folder: Path) -> None:
        """Read an input, from `folder` where it is on disk.

        Raises:
            CbptError: It was refused.
            Exception: Any other is a finding.
        """
        raise NotImplementedError


class BrokenPromiseError(Exception):
    """A reader accepted what it promises to refuse, or the other way round."""


def require(holds: bool, promise: str) -> None:
    """Make a finding of a promise that was not kept."""
    if not holds:
        raise BrokenPromiseError(promise)


def write_files(files: Files, folder: Path) -> None:
    """Make a folder of an input."""
    folder.mkdir()
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == FOLDER:
            path.mkdir()
        elif content == PIPE:
            os.mkfifo(path)
        else:
            path.symlink_to(content.removeprefix(LINK))


def read_files(folder: Path) -> Files:
    """Return the files below a folder."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
