"""Outputs that are whole or absent, and that never take the place of what is not their kind.

A kind says how one is recognised before it is replaced.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cbpt_runtime.artifacts.file_table import list_files, read_json_file
from cbpt_runtime.artifacts.names import json_text, readable
from cbpt_runtime.errors import OutputError

MARKER = ".cbpt-runtime.json"
"""In folders whose files do not say themselves who made them; hidden, so that no reader of images minds."""

MAX_MANIFEST_BYTES = 64 << 20
WORK: Final = "work folder of a run"
_NEW, _OLD, _STAGES = "new", "old", "stages"
_RESERVED: ContextVar[frozenset[Path]] = ContextVar("_RESERVED", default=frozenset())


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
    """Return a kind of folder that is recognised by its marker."""
    return Kind(name=name, own_files=lambda folder: read_marker(folder, name), marker=True)


def write_marker(folder: Path, name: str) -> None:
    """Mark a folder: its kind and the files that are in it now."""
    content = {"kind": f"cbpt-runtime {name}", "files": [*list_files(folder), MARKER]}
    (folder / MARKER).write_text(json_text(content) + "\n", encoding="utf-8")


def read_marker(folder: Path, name: str) -> list[str] | None:
    """Return the files a marker lists; None where there is none, or one of another kind."""
    try:
        _, content = read_json_file(folder / MARKER, max_bytes=MAX_MANIFEST_BYTES)
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("kind") != f"cbpt-runtime {name}":
        return None
    files = content.get("files")
    return [str(file) for file in files] if isinstance(files, list) else None


def check_output(path: Path, kind: Kind, *, force: bool = False) -> None:
    """Refuse an output path that is taken.

    Args:
        path: Where the output is to be written.
        kind: What is to be written.
        force: Whether one of the same kind that is already there may be replaced. Nothing else ever is.

    Raises:
        OutputError: There is something at the path that may not be replaced.
    """
    if not os.path.lexists(path):
        return
    if not force:
        raise OutputError(
            expected="an output path that does not exist yet",
            got=f"{path}, which exists",
            fix=f"Choose another --output, or replace the {kind.name} there with --force.",
        )
    _check_kind(path, kind, path)


def _check_kind(found: Path, kind: Kind, path: Path) -> None:
    with writing(path):
        refusal = kind.refusal(found)
    if refusal is not None:
        raise OutputError(
            expected=f"a {kind.name} or an empty folder to replace",
            got=f"{path}, which is {refusal}",
            fix=f"Choose another --output; --force replaces a {kind.name} only.",
        )


@contextmanager
def reserved(path: Path, kind: Kind, *, force: bool = False, resume: bool = False) -> Iterator[Path]:
    """Keep an output path for one run, from before its work until the output stands.

    Inside the block `new_folder` and `new_file` may write the output.

    Args:
        path: Where the output is to be written; its parents are made, and removed again if nothing is.
        kind: What is to be written.
        force: Whether one of the same kind that is already there may be replaced.
        resume: Keep the stages of an earlier run that did not finish.

    Yields:
        The folder for finished stages, to be made on demand. It goes when the block succeeds.

    Raises:
        OutputError: The path is taken or cannot be written, or another run is writing it.
    """
    place = Path(os.path.abspath(path))  # noqa: PTH100  # links stay links
    work = place.parent / f"{place.name}.partial"
    if place in _RESERVED.get():
        yield work / _STAGES
        return
    check_output(path, kind, force=force)
    with writing(path):
        missing = [parent for parent in place.parents if not parent.exists()]
    try:
        with writing(path):
            place.parent.mkdir(parents=True, exist_ok=True)
        with claimed(work, WORK):
            _restore(work / _OLD, place)  # a run was killed between its last two steps
            check_output(path, kind, force=force)
            _remove(work / _NEW, work / _OLD, *(() if resume else (work / _STAGES,)))
            token = _RESERVED.set(_RESERVED.get() | {place})
            try:
                yield work / _STAGES
                _remove(work / _STAGES)
            finally:
                _RESERVED.reset(token)
                _remove(work / _NEW)
                _restore(work / _OLD, place)
    finally:
        for parent in missing:
            with contextlib.suppress(OSError):  # there is something in it now
                parent.rmdir()


@contextmanager
def new_folder(path: Path, kind: Kind, *, force: bool = False) -> Iterator[Path]:
    """Stage a folder that takes its place when the block succeeds, and vanishes when it fails.

    Args:
        path: The folder to make.
        kind: What it will be.
        force: Whether one of the same kind that is already there may be replaced.

    Yields:
        The staging folder, empty.

    Raises:
        OutputError: The path is or was meanwhile taken, or the folder cannot be written.
    """
    with reserved(path, kind, force=force) as stages, writing(path):
        staging = stages.with_name(_NEW)
        staging.mkdir()
        yield staging
        if kind.marker:
            write_marker(staging, kind.name)
        _move_into_place(staging, path, kind, force=force)


def new_file(path: Path, kind: Kind, content: bytes, *, force: bool = False) -> None:
    """Write a file whole, or not at all.

    Raises:
        OutputError: The path is or was meanwhile taken, or the file cannot be written.
    """
    with reserved(path, kind, force=force) as stages, writing(path):
        staging = stages.with_name(_NEW)
        staging.write_bytes(content)
        _move_into_place(staging, path, kind, force=force)


@contextmanager
def claimed(folder: Path, name: str) -> Iterator[None]:
    """Make a folder this run's own: marked, and locked until the block ends.

    A new or an empty one is taken, or one with such a marker that no living run has. If nothing else is in
    it in the end, it is removed.

    Raises:
        OutputError: It is somebody else's, another run has it, or it cannot be written.
    """
    marker = folder / MARKER
    with writing(folder):
        folder.mkdir(exist_ok=True)
        if folder.is_symlink() or not (read_marker(folder, name) or _is_bare(folder)):
            raise OutputError(
                expected=f"{folder} to be absent, or the {name} of this program",
                got="a folder of somebody else",
                fix="Move it away, or choose another --output.",
            )
        descriptor = os.open(marker, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        if not _lock(descriptor, marker):
            raise OutputError(
                expected=f"{folder.name} for this run alone",
                got="another run that is writing there",
                fix="Wait for it to end, or choose another --output.",
            )
        try:
            with writing(folder):
                write_marker(folder, name)
            yield
        finally:
            with contextlib.suppress(OSError):
                if _is_bare(folder):
                    marker.unlink()
                    folder.rmdir()
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into an OutputError that tells what went wrong when writing a path."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "Free some space or choose an --output on another disk, then run again."
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            fix = "Choose an --output in a folder you may write to."
        else:
            fix = "Choose another --output."
        reason = error.strerror or type(error).__name__
        raise OutputError(expected=f"to be able to write {path}", got=reason, fix=fix) from error


def _move_into_place(staging: Path, path: Path, kind: Kind, *, force: bool) -> None:
    """Rename what is finished to its name; what is there is kept until the new one has its place."""
    _sync(staging)
    old = staging.with_name(_OLD)
    if force and os.path.lexists(path):
        path.rename(old)
        _check_kind(old, kind, path)  # what really was moved
    _take(path, is_folder=staging.is_dir())
    staging.rename(path)
    _sync_folder(path.parent)
    _remove(old)


def _restore(old: Path, path: Path) -> None:
    """Put back what was to be replaced, unless something has its place by now."""
    with writing(path):
        facts = path.stat(follow_symlinks=False) if os.path.lexists(path) else None
        holds = facts and (any(path.iterdir()) if stat.S_ISDIR(facts.st_mode) else facts.st_size)
        if os.path.lexists(old) and not holds:
            old.rename(path)


def _take(path: Path, *, is_folder: bool) -> None:
    """Put an empty folder or file at a path, for the finished one to be renamed over.

    Raises:
        OutputError: Something is there: unlike a rename, this never replaces anything.
    """
    try:
        if is_folder:
            path.mkdir()
        else:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError as error:
        raise OutputError(
            expected=f"{path} to stay free during the run",
            got="something that was made there meanwhile",
            fix="Look at it and move it away, then run again.",
        ) from error


def _sync(path: Path) -> None:
    """Have everything at or below a path written to the disk before its name says that it is whole."""
    for file in [path, *path.rglob("*")]:
        if file.is_dir():
            _sync_folder(file)
        else:
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_bare(folder: Path) -> bool:
    """Whether there is nothing in a folder, except perhaps a marker."""
    return set(os.listdir(folder)) <= {MARKER}  # noqa: PTH208  # a missing folder is an error here


def _lock(descriptor: int, marker: Path) -> bool:
    """Lock a marker without waiting; False where another run has it, or had it and just removed it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), marker.stat(follow_symlinks=False))
    except (BlockingIOError, FileNotFoundError):
        return False


def _remove(*paths: Path) -> None:
    """Remove what this program has put into its own work folder."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
