"""The manifest of a model repository: SHA-256 of every file, and nothing beside them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from cbpt_runtime.artifacts import (
    MAX_MANIFEST_BYTES,
    NOT_LISTED,
    NUMBER,
    Kind,
    check_files,
    hash_files,
    list_files,
    listed_in,
    read_json_file,
    shape_problems,
)
from cbpt_runtime.artifacts.names import is_litter
from cbpt_runtime.artifacts.signing import SIGNATURE
from cbpt_runtime.errors import ConfigError, RepositoryError
from cbpt_runtime.models.preprocess import Preprocess

MANIFEST = "manifest.json"
PARITY = "parity.json"
WEIGHTS = "model.onnx.data"
"""Beside a graph that is too large for one file."""
KIND = "cbpt-runtime model repository"
SCHEMA_VERSION = 1
_PARTS = ("_preprocess", "_classifier", "_alarm")
_PROVIDERS = ("cpu", "cuda", "tensorrt")  # as the modules say that need onnxruntime
_PRECISIONS = ("fp32", "fp16", "int8")
_RANGES = {
    "max_batch": (1, 4096),
    "instances": (1, 64),
    "threads": (0, 1024),
    "decoders": (0, 256),
    "max_image_bytes": (1, 10**9),
}
_SHAPE = {
    "name": str,
    "models": [str],
    "classes": int,
    "preprocess": dict,
    "profile": {"provider": str, "precision": str, **dict.fromkeys(_RANGES, int)},
    "bundle_digest": str,
    "graph_sha256": str,
    "files": {str: {"sha256": str, "size_bytes": int}},
}
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
    def weights(self) -> dict[str, Any] | None:
        """What the manifest says of the file with the weights, where the graph needs one beside it."""
        name = (self.graph.parent / WEIGHTS).relative_to(self.path).as_posix()
        entry: dict[str, Any] | None = self.manifest["files"].get(name)
        return entry

    @property
    def golden(self) -> Path:
        """The folder of the golden set."""
        return self.path / self.name / "1" / "golden"

    @property
    def inner_models(self) -> tuple[str, ...]:
        """Models that only the one that takes image files asks."""
        return f"{self.name}_preprocess", f"{self.name}_alarm"

    @property
    def alarm_threshold(self) -> float | None:
        """Above which alarm an image is suspicious; older repositories do not say."""
        threshold = self.manifest.get("alarm_threshold")
        return None if threshold is None else float(threshold)

    @property
    def second_look(self) -> bool:
        """Whether it was exported to look again at suspicious images."""
        return bool(self.manifest["profile"].get("second_look", False))

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
    files = hash_files(folder, list_files(folder))
    manifest = {"kind": KIND, "schema_version": SCHEMA_VERSION, **summary, "files": files}
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


MODEL_REPOSITORY: Final = Kind(
    name="model repository",
    own_files=listed_in(MANIFEST, lambda manifest: manifest.get("kind") == KIND, besides=[SIGNATURE]),
)


def is_repository(path: Path) -> bool:
    """Whether a folder is a model repository by the looks of its manifest, damaged or not."""
    return MODEL_REPOSITORY.own_files(path) is not None


def read_repository(path: str | Path) -> Repository:
    """Read a model repository and hash every file of it. Needs neither torch nor onnxruntime.

    Raises:
        RepositoryError: Not a repository, or a file is missing, changed or not in the manifest; the text
            names every one of them.
    """
    path = Path(path)
    raw, manifest = _read(path)
    litter = [name for name in list_files(path) if _is_litter_below(name)]
    problems = check_files(path, manifest["files"], besides=(MANIFEST, SIGNATURE, *litter))
    if problems:
        raise RepositoryError(
            expected=f"the files of {path / MANIFEST}, unchanged, and no others",
            got="; ".join(problems[:10]) + (f" and {len(problems) - 10} more" if len(problems) > 10 else ""),
            fix=_MOVE if all(problem.endswith(NOT_LISTED) for problem in problems) else _REMAKE,
        )
    return Repository(
        path=path,
        manifest=manifest,
        digest=hashlib.sha256(raw).hexdigest(),
        ignored=_litter(path),
    )


def require_unchanged(repository: Repository) -> None:
    """Hash every file again.

    Raises:
        RepositoryError: Something changed since the repository was read, be it the manifest as a whole.
    """
    found = read_repository(repository.path)
    if found.digest != repository.digest:
        raise RepositoryError(
            expected=f"{repository.path} as it was, with the digest {repository.digest}",
            got=f"{found.digest}: another repository has its place",
            fix="Stop serving it and look at who changed it.",
        )


def _read(path: Path) -> tuple[bytes, dict[str, Any]]:
    file = path / MANIFEST
    try:
        raw, manifest = read_json_file(file, max_bytes=MAX_MANIFEST_BYTES)
    except (OSError, ValueError) as error:
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
    problems = shape_problems(manifest, _SHAPE)
    files = manifest.get("files")
    if isinstance(files, dict) and not all(map(_is_inside, files)):
        problems.append("a file name that leaves the repository")
    name = str(manifest.get("name"))
    if not _MODEL_NAME.fullmatch(name) or manifest.get("models") != [name, *(name + end for end in _PARTS)]:
        problems.append("the name of a model that is none")
    if not problems:
        profile = manifest["profile"]
        if profile["provider"] not in _PROVIDERS or profile["precision"] not in _PRECISIONS:
            problems.append("a provider or a precision that is none")
        problems += [
            f"profile.{key} is {profile[key]:.3g}, not from {low} to {high:,}"
            for key, (low, high) in _RANGES.items()
            if not low <= profile[key] <= high
        ]
        threshold = manifest.get("alarm_threshold", 0.0)
        has_alarm = "alarm_threshold" in manifest and bool(manifest.get("suspects"))
        if profile.get("second_look", False) not in (False, has_alarm):
            problems.append("a second look without suspected targets and a level of the alarm")
        if type(threshold) not in NUMBER or not 0 <= threshold <= 1:
            problems.append(f"an alarm_threshold of {threshold!r:.40}, not in [0, 1]")
        try:
            Preprocess.from_dict(manifest["preprocess"])
        except ConfigError as error:
            problems.append(f"preprocessing: {error.got} instead of {error.expected}")
    if problems:
        raise RepositoryError(expected=f"a complete {file}", got="; ".join(problems), fix=_REMAKE)
    return raw, manifest


def _litter(folder: Path) -> tuple[str, ...]:
    """What systems left in a folder; not what lies inside that."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if is_litter(path.name))
    return tuple(sorted(path.as_posix() for path in found if not _is_litter_below(path.parent.as_posix())))


def _is_litter_below(name: str) -> bool:
    """Whether a path is, or lies in, something that systems leave everywhere."""
    return any(map(is_litter, PurePosixPath(name).parts))


def _is_inside(name: object) -> bool:
    path = PurePosixPath(str(name))
    return not path.is_absolute() and ".." not in path.parts
