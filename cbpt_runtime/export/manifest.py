"""The manifest of a model repository: SHA-256 of every file, and nothing beside them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final, Self

from cbpt_runtime.artifacts import (
    MAX_MANIFEST_BYTES,
    NOT_LISTED,
    NUMBER,
    Kind,
    ListedFile,
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
from cbpt_runtime.export.profiles import Profile
from cbpt_runtime.runtime.preprocess import Preprocess

MANIFEST = "manifest.json"
PARITY = "parity.json"
WEIGHTS = "model.onnx.data"
"""Beside a graph that is too large for one file."""
KIND = "cbpt-runtime model repository"
SCHEMA_VERSION = 1
PROVENANCE = ("bundle_digest", "checkpoint_sha256", "graph_sha256", "verdict", "cbpt_runtime_version")
_PARTS = ("_preprocess", "_classifier", "_alarm")
_SHAPE = {
    "name": str,
    "models": [str],
    "classes": int,
    "preprocess": dict,
    "profile": dict,
    "suspects": [int],
    **dict.fromkeys(PROVENANCE, str),
    "versions": {str: str},
    "files": {str: {"sha256": str, "size_bytes": int}},
}
_MODEL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,79}")
_MOVE = "Move them elsewhere: a repository holds what `cbpt-runtime export` wrote and nothing else."
_REMAKE = "Export the bundle again with `cbpt-runtime export`, or fetch an intact copy."


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What ``manifest.json`` of a model repository says.

    Attributes:
        name: Of the model that takes image files.
        classes: How many it tells apart.
        preprocess: How an image becomes the model's pixels.
        profile: How it is meant to be served.
        suspects: Class indices of the suspected targets.
        alarm_threshold: Above which alarm an image is suspicious; older repositories do not say.
        sigmoid: Whether each class has a probability of its own, as SigLIP's have.
        processor: That the gate ran on, where the answers depend on it: int8.
        provenance: What a running server repeats: digests of bundle, checkpoint and graph, the verdict, and
            the version that wrote it.
        versions: Of the packages that made it.
        files: Every other file.
    """

    name: str
    classes: int
    preprocess: Preprocess
    profile: Profile
    suspects: tuple[int, ...]
    alarm_threshold: float | None = None
    sigmoid: bool = False
    processor: str | None = None
    provenance: Mapping[str, str]
    versions: Mapping[str, str]
    files: Mapping[str, ListedFile] = field(default_factory=dict)

    @property
    def models(self) -> tuple[str, ...]:
        """The one that takes image files, and those it asks."""
        return self.name, *(self.name + end for end in _PARTS)

    @property
    def preprocess_name(self) -> str:
        """Name of the model that decodes."""
        return f"{self.name}_preprocess"

    @property
    def classifier_name(self) -> str:
        """Name of the model that takes pixels."""
        return f"{self.name}_classifier"

    @property
    def alarm_name(self) -> str:
        """Name of the model that counts alarms."""
        return f"{self.name}_alarm"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without those that are None."""
        values = {
            "name": self.name,
            "models": list(self.models),
            "classes": self.classes,
            "preprocess": self.preprocess.to_dict(),
            "profile": self.profile.to_dict(),
            "suspects": list(self.suspects),
            "alarm_threshold": self.alarm_threshold,
            "probabilities": "sigmoid" if self.sigmoid else "softmax",
            "processor": self.processor,
            **self.provenance,
            "versions": dict(self.versions),
        }
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Make a manifest of JSON that a stranger may have written.

        Raises:
            ValueError: Something is missing, of another kind or out of its range; the text names all of it.
        """
        problems = [*shape_problems(values, _SHAPE), *_name_problems(values)]
        made: dict[str, Any] = {}
        if not problems:
            problems += _alarm_problems(values)
            for key, kind in (("preprocess", Preprocess), ("profile", Profile)):
                try:
                    made[key] = kind.from_dict(values[key])
                except ConfigError as error:
                    problems.append(f"{key}: {error.got} instead of {error.expected}")
        if problems:
            raise ValueError("; ".join(problems))
        return cls(
            name=values["name"],
            classes=values["classes"],
            suspects=tuple(values["suspects"]),
            alarm_threshold=values.get("alarm_threshold"),
            sigmoid=values.get("probabilities") == "sigmoid",
            processor=values.get("processor"),
            provenance={key: values[key] for key in PROVENANCE},
            versions=values["versions"],
            files={
                name: ListedFile(sha256=entry["sha256"], size_bytes=entry["size_bytes"])
                for name, entry in values["files"].items()
            },
            **made,
        )


def _name_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the names of files and models, whatever their kinds."""
    files, name = values.get("files"), str(values.get("name"))
    if isinstance(files, dict) and not all(map(_is_inside, files)):
        yield "a file name that leaves the repository"
    if not _MODEL_NAME.fullmatch(name) or values.get("models") != [name, *(name + end for end in _PARTS)]:
        yield "the name of a model that is none"


def _alarm_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with what not every repository says."""
    threshold, processor = values.get("alarm_threshold"), values.get("processor")
    if threshold is not None and (type(threshold) not in NUMBER or not 0 <= threshold <= 1):
        yield f"an alarm_threshold of {threshold!r:.40}, not in [0, 1]"
    if not isinstance(processor, str | None):
        yield "a processor that is no text"
    if values.get("probabilities") not in (None, "softmax", "sigmoid"):
        yield "probabilities that are neither softmax nor sigmoid"
    if values["profile"].get("second_look") and (threshold is None or not values["suspects"]):
        yield "a second look without suspected targets and a level of the alarm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A model repository whose files are those of its manifest.

    Attributes:
        path: Its folder.
        manifest: What ``manifest.json`` says.
        digest: SHA-256 of it, hence of everything in the repository.
        ignored: What systems leave everywhere, such as `lost+found`; nobody reads it.
    """

    path: Path
    manifest: Manifest
    digest: str
    ignored: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the model that takes image files."""
        return self.manifest.name

    @property
    def graph(self) -> Path:
        """The ONNX file."""
        return self.path / self.manifest.classifier_name / "1" / "model.onnx"

    @property
    def weights(self) -> ListedFile | None:
        """The file with the weights, where the graph needs one beside it."""
        return self.manifest.files.get((self.graph.parent / WEIGHTS).relative_to(self.path).as_posix())

    @property
    def golden(self) -> Path:
        """The folder of the golden set."""
        return self.path / self.name / "1" / "golden"

    @property
    def inner_models(self) -> tuple[str, ...]:
        """Models that only the one that takes image files asks."""
        return self.manifest.preprocess_name, self.manifest.alarm_name


def write_manifest(folder: Path, summary: Mapping[str, Any]) -> str:
    """Hash every file below a folder and write ``manifest.json``.

    Args:
        folder: Of the repository.
        summary: What `Manifest.to_dict` gives.

    Returns:
        SHA-256 of the manifest.
    """
    files = {name: asdict(file) for name, file in hash_files(folder, list_files(folder)).items()}
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
    problems = check_files(path, manifest.files, besides=(MANIFEST, SIGNATURE, *litter))
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


def _read(path: Path) -> tuple[bytes, Manifest]:
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
    try:
        return raw, Manifest.from_dict(manifest)
    except ValueError as error:
        raise RepositoryError(expected=f"a complete {file}", got=str(error), fix=_REMAKE) from error


def _litter(folder: Path) -> tuple[str, ...]:
    """Return what systems left in a folder; not what lies inside that."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if is_litter(path.name))
    return tuple(sorted(path.as_posix() for path in found if not _is_litter_below(path.parent.as_posix())))


def _is_litter_below(name: str) -> bool:
    """Whether a path is, or lies in, something that systems leave everywhere."""
    return any(map(is_litter, PurePosixPath(name).parts))


def _is_inside(name: object) -> bool:
    path = PurePosixPath(str(name))
    return not path.is_absolute() and ".." not in path.parts
