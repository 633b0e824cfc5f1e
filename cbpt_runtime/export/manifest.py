"""The manifest of a model repository: SHA-256 of every file, and nothing beside them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cbpt_runtime.errors import RepositoryError
from cbpt_runtime.names import is_litter

MANIFEST = "manifest.json"
PARITY = "parity.json"
KIND = "cbpt-runtime model repository"
SCHEMA_VERSION = 1
_KEYS = ("name", "models", "classes", "preprocess", "profile", "bundle_digest", "graph_sha256", "files")
_MODEL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,79}")
_MOVE = "Move them elsewhere: a repository holds what `cbpt-runtime export` wrote and nothing else."
_REMAKE = "Export the bundle again with `cbpt-runtime export`, or fetch an intact copy."


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A model repository whose files are those of its manifest.

    Attributes:
        path: Its folder.
        manifest: The whole of ``manifest.json``.
        digest: SHA-256 of it, hence of everything in the repository.
        ignored: What systems leave everywhere, such as `lost+found`; nobody reads it.
    """

    path: Path
    manifest: dict[str, Any]
    digest: str
    ignored: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the model that takes image files."""
        return str(self.manifest["name"])

    @property
    def graph(self) -> Path:
        """The ONNX file."""
        return self.path / f"{self.name}_classifier" / "1" / "model.onnx"

    @property
    def golden(self) -> Path:
        """The folder of the golden set."""
        return self.path / self.name / "1" / "golden"

    @property
    def made_on(self) -> str | None:
        """Processor the gate ran on, where the answers depend on it: int8."""
        processor = self.manifest.get("processor")
        return None if processor is None else str(processor)


def write_manifest(folder: Path, summary: Mapping[str, Any]) -> str:
    """Hash every file below a folder and write ``manifest.json``.

    Returns:
        SHA-256 of the manifest.
    """
    files = {name: {"sha256": _sha256(folder / name), "size_bytes": (folder / name).stat().st_size}
             for name in _list(folder)}  # fmt: skip
    manifest = {"kind": KIND, "schema_version": SCHEMA_VERSION, **summary, "files": files}
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def is_repository(path: Path) -> bool:
    """Whether a folder is a model repository by the looks of its manifest, damaged or not."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("kind") == KIND


def read_repository(path: str | Path) -> Repository:
    """Read a model repository and hash every file of it. Needs neither torch nor onnxruntime.

    Raises:
        RepositoryError: Not a repository, or a file is missing, changed or not in the manifest; the text
            names every one of them.
    """
    path = Path(path)
    raw, manifest = _read(path)
    listed, there = manifest["files"], set(_list(path))
    foreign = sorted(name for name in there - set(listed) if not _is_litter_below(name))
    problems = [f"{name} is missing" for name in sorted(set(listed) - there)]
    problems += [f"{name} is not in the manifest" for name in foreign]
    for name in sorted(set(listed) & there):
        file = path / name
        if file.is_symlink() or not file.is_file():
            problems.append(f"{name} is not a plain file")
        elif _sha256(file) != listed[name].get("sha256"):
            problems.append(f"{name} was changed")
    if problems:
        raise RepositoryError(
            expected=f"the files of {path / MANIFEST}, unchanged, and no others",
            got="; ".join(problems[:10]) + (f" and {len(problems) - 10} more" if len(problems) > 10 else ""),
            fix=_MOVE if len(problems) == len(foreign) else _REMAKE,
        )
    return Repository(
        path=path,
        manifest=manifest,
        digest=hashlib.sha256(raw).hexdigest(),
        ignored=_litter(path),
    )


def _read(path: Path) -> tuple[bytes, dict[str, Any]]:
    file = path / MANIFEST
    try:
        raw = file.read_bytes()
        manifest = json.loads(raw)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RepositoryError(
            expected=f"a model repository with a {MANIFEST}",
            got=f"{path} ({reason})",
            fix="Give the folder that `cbpt-runtime export --output` wrote.",
        ) from error
    is_ours = isinstance(manifest, dict) and manifest.get("kind") == KIND
    if not is_ours or manifest.get("schema_version") != SCHEMA_VERSION:
        raise RepositoryError(
            expected=f"a {KIND} of schema version {SCHEMA_VERSION} in {file}",
            got="something else",
            fix="Give the folder that `cbpt-runtime export --output` wrote.",
        )
    problems = [f"no {key!r}" for key in _KEYS if key not in manifest]
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        problems.append("'files' is not an object of objects")
    elif not all(_is_inside(name) for name in files):
        problems.append("a file name that leaves the repository")
    if not _are_names([manifest.get("name"), *_as_list(manifest.get("models"))]):
        problems.append("the name of a model that is none")
    if problems:
        raise RepositoryError(expected=f"a complete {file}", got="; ".join(problems), fix=_REMAKE)
    return raw, manifest


def _list(folder: Path) -> list[str]:
    """Every file below a folder but the manifest itself, links and all, in order."""
    found = (file for file in folder.rglob("*") if file.is_symlink() or not file.is_dir())
    return sorted(name for file in found if (name := file.relative_to(folder).as_posix()) != MANIFEST)


def _litter(folder: Path) -> tuple[str, ...]:
    """What systems left in a folder; not what lies inside that."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if is_litter(path.name))
    return tuple(sorted(path.as_posix() for path in found if not _is_litter_below(path.parent.as_posix())))


def _is_litter_below(name: str) -> bool:
    """Whether a path is, or lies in, something that systems leave everywhere."""
    return any(map(is_litter, PurePosixPath(name).parts))


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _are_names(values: list[object]) -> bool:
    """Whether all are names of models as `export` makes them: folders, and words of a shell's command."""
    return all(isinstance(value, str) and _MODEL_NAME.fullmatch(value) for value in values)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
