"""A bundle read from disk, every file checked against the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from cbpt_runtime.artifacts import (
    MAX_MANIFEST_BYTES,
    NUMBER,
    ListedFile,
    read_json_file,
    read_regular_file,
    shape_problems,
)
from cbpt_runtime.artifacts.signing import SIGNATURE
from cbpt_runtime.bundle.images import CleanImages, check_clean_images
from cbpt_runtime.bundle.records import Evidence, Making, Origin, Suspect
from cbpt_runtime.errors import BundleError, ConfigError
from cbpt_runtime.models.prompt_findings import PromptCheck
from cbpt_runtime.runtime.preprocess import Preprocess

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
HEAD = "head.safetensors"
ENCODER = "encoder.safetensors"
TRIGGERS = "triggers.safetensors"
IMAGES = "images.safetensors"
REPORT = "report.html"
MAX_FILE_BYTES = 64 << 30

_REQUIRED_FILES = (HEAD, ENCODER, TRIGGERS)
_SAID_SINCE = {"encoder": str, "labelled_by": str, "notes": [str]}  # of the method, by newer bundles
_VERDICTS = ("backdoored", "clean", "unknown")
_SHAPE = {
    "verdict": str,
    "model": {"config": dict, "preprocess": dict, "source": str, "sha256": str},
    "classes": {"names": [str], "templates": [[str]]},
    "method": {"name": str, "parameterization": str, "seed": int},
    "suspects": [{"index": int, "name": str}],
    "metrics": dict,
    "evidence": dict,
    "versions": dict,
    "files": {str: {"sha256": str, "size_bytes": int}},
}
_ALARM_SHAPE = {"threshold": NUMBER, "false_alarm_rate": NUMBER}
_REMAKE = "Make the bundle again with `cbpt-runtime purify`, or fetch an intact copy."


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle read from disk.

    Attributes:
        path: Its folder.
        manifest: The whole of ``manifest.json``.
        digest: SHA-256 of ``manifest.json``, hence of everything in the bundle.
        class_embeddings: The purified head, unit-norm rows, float32.
        reference_embeddings: The zero-shot head of the bundle's encoder before class prompts were tuned,
            unit-norm rows, float32; equal to `class_embeddings` where a method tunes none.
        logit_scale: Temperature, already exponentiated.
        logit_bias: SigLIP's bias, else None.
    """

    path: Path
    manifest: dict[str, Any]
    digest: str
    class_embeddings: Float[np.ndarray, "classes dim"]
    reference_embeddings: Float[np.ndarray, "classes dim"]
    logit_scale: float
    logit_bias: float | None

    def __repr__(self) -> str:
        names = ", ".join(suspect.name for suspect in self.suspects)
        found = f" ({names})" if names else ""
        return f"<Bundle {self.path}: {self.verdict}{found}, {len(self.class_names)} classes>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the verdict, the suspected targets and what was measured."""
        rows = [("verdict", self.verdict)]
        for suspect in self.suspects:
            shown = "" if suspect.p_value is None else f"p = {suspect.p_value:.2g}"
            rows.append((f"suspect: {suspect.name}", shown))
        rows += [("classes", str(len(self.class_names))), ("digest", self.digest)]
        rows += [(name, f"{value:.4g}") for name, value in self.metrics.items() if isinstance(value, float)]
        cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
        return f"<table><caption>{escape(str(self.path))}</caption>{cells}</table>"

    @property
    def verdict(self) -> str:
        """'backdoored' or 'clean'; 'unknown' where the method looks for no target."""
        return str(self.manifest["verdict"])

    @property
    def origin(self) -> Origin:
        """The suspect checkpoint it was made of."""
        return Origin.from_dict(self.manifest["model"])

    @property
    def making(self) -> Making:
        """How it was made."""
        return Making.from_dict(self.manifest["method"])

    @property
    def files(self) -> dict[str, ListedFile]:
        """Every other file of its manifest."""
        return _listed(self.manifest["files"])

    @property
    def encoder(self) -> str:
        """'untouched', or what a method made of the suspect's image tower: 'tuned' or 'prompted'."""
        return self.making.encoder

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return tuple(self.manifest["classes"]["names"])

    @property
    def templates(self) -> tuple[tuple[str, ...], ...]:
        """Prompt templates of each class, ``{}`` standing for the name."""
        return tuple(map(tuple, self.manifest["classes"]["templates"]))

    @property
    def class_folders(self) -> tuple[str, ...]:
        """Names of the classes' image folders, where the class list gave others than the classes'."""
        return tuple(self.manifest["classes"].get("folders", ()))

    @property
    def preprocess(self) -> Preprocess:
        """How an image becomes the model's pixels."""
        return Preprocess.from_dict(self.manifest["model"]["preprocess"])

    @property
    def model_config(self) -> dict[str, Any]:
        """open_clip's model configuration."""
        return dict(self.manifest["model"]["config"])

    @property
    def suspects(self) -> tuple[Suspect, ...]:
        """The suspected targets, most suspicious first; none of a clean checkpoint."""
        return tuple(map(Suspect.from_dict, self.manifest["suspects"]))

    @property
    def suspect_indices(self) -> tuple[int, ...]:
        """Class indices of the suspected targets."""
        return tuple(suspect.index for suspect in self.suspects)

    @property
    def alarm_threshold(self) -> float | None:
        """Above which alarm an image is suspicious; None where nothing is suspected, and in older bundles."""
        decision = self.manifest.get("alarm")
        return None if decision is None else float(decision["threshold"])

    @property
    def evidence(self) -> Evidence:
        """What the search says of every concept; empty of a method that searches for nothing."""
        return Evidence.from_dict(self.manifest["evidence"])

    @property
    def prompts(self) -> PromptCheck | None:
        """What was found of the words in the prompts; None where nobody looked."""
        return PromptCheck.from_dict(self.manifest["evidence"].get("prompts"))

    @property
    def metrics(self) -> dict[str, Any]:
        """What was measured on held-out clean images when the bundle was made."""
        return dict(self.manifest["metrics"])

    def read_file(self, name: str) -> bytes:
        """Content of one file of the bundle, checked against the manifest.

        Raises:
            BundleError: The file is missing, unreadable or not the one the manifest describes.
        """
        return _read_checked(self.path, name, self.files)

    def unlisted(self) -> list[str]:
        """Names in its folder that its manifest does not know; a signature is none of them."""
        known = {*self.files, MANIFEST, SIGNATURE}
        return sorted(item.name for item in self.path.iterdir() if item.name not in known)

    def triggers(self) -> dict[str, np.ndarray]:
        """Return the dummy triggers by name."""
        return _tensors(self.path, TRIGGERS, self.read_file(TRIGGERS))

    def images(self) -> CleanImages | None:
        """Return the clean images it carries; None where they were left out, and in the oldest bundles.

        Raises:
            BundleError: They are damaged or do not fit the model.
        """
        if IMAGES not in self.files:
            return None
        tensors = _tensors(self.path, IMAGES, self.read_file(IMAGES))
        size, classes = self.preprocess.image_size, len(self.class_names)
        problems = check_clean_images(tensors, image_size=size, classes=classes)
        if problems:
            raise BundleError(
                expected=f"labelled images of {size[0]}×{size[1]} pixels in {self.path / IMAGES}",
                got="; ".join(problems),
                fix=_REMAKE,
            )
        return CleanImages(
            calibration=tensors["calibration_images"],
            calibration_labels=tensors["calibration_labels"],
            heldout=tensors["heldout_images"],
            heldout_labels=tensors["heldout_labels"],
        )


def read_bundle(path: str | Path, *, verify: bool = True) -> Bundle:
    """Read a bundle.

    Args:
        path: Its folder.
        verify: Hash every file and compare with the manifest. The head is always checked.

    Raises:
        BundleError: Not a bundle, or a file of it is missing, changed or contradicts the manifest; the
            text names the file.
    """
    path = Path(path)
    raw, manifest = _read_manifest(path)
    files = _listed(manifest["files"])
    head = _tensors(path, HEAD, _read_checked(path, HEAD, files))
    if verify:
        for name in files:
            if name != HEAD:
                _read_checked(path, name, files)
    names, templates = manifest["classes"]["names"], manifest["classes"]["templates"]
    _check_head(path, head, len(names))
    if len(templates) != len(names):
        raise BundleError(
            expected=f"one group of templates for each of {len(names)} classes in {path / MANIFEST}",
            got=f"{len(templates)} groups",
            fix=_REMAKE,
        )
    bias = head.get("logit_bias")
    return Bundle(
        path=path,
        manifest=manifest,
        digest=hashlib.sha256(raw).hexdigest(),
        class_embeddings=head["class_embeddings"],
        reference_embeddings=head["reference_embeddings"],
        logit_scale=head["logit_scale"].item(),
        logit_bias=None if bias is None else bias.item(),
    )


def _read_manifest(path: Path) -> tuple[bytes, dict[str, Any]]:
    file = path / MANIFEST
    try:
        raw, manifest = read_json_file(file, max_bytes=MAX_MANIFEST_BYTES)
    except OSError as error:
        raise BundleError(
            expected=f"a bundle folder with a {MANIFEST}",
            got=f"{path} ({error.strerror or 'unreadable'})",
            fix="Give the folder that `cbpt-runtime purify --output` wrote.",
        ) from error
    except ValueError as error:
        raise BundleError(expected=f"valid JSON in {file}", got=str(error), fix=_REMAKE) from error
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            expected=f"schema_version {SCHEMA_VERSION} in {file}",
            got=repr(version),
            fix="Use the version of cbpt-runtime that wrote this bundle, or make the bundle again.",
        )
    _check_manifest(file, manifest)
    return raw, manifest


def _check_manifest(file: Path, manifest: dict[str, Any]) -> None:
    problems = shape_problems(manifest, _SHAPE)
    files = manifest.get("files")
    if isinstance(files, dict):
        problems += [f"{name} is not listed" for name in _REQUIRED_FILES if name not in files]
        problems += [f"unsafe file name {name!r}" for name in files if not _is_plain_name(name)]
    if not problems:
        names, files = manifest["classes"]["names"], manifest["files"]
        problems += [f"a size of {name} below zero" for name in files if files[name]["size_bytes"] < 0]
        indices = [suspect["index"] for suspect in manifest["suspects"]]
        problems += [f"suspect {i} is not a class" for i in indices if not 0 <= i < len(names)]
        problems += [] if names else ["no classes"]
        if manifest["verdict"] not in _VERDICTS:
            problems.append(f"a verdict that is none of {', '.join(_VERDICTS)}")
        for key, shape in _SAID_SINCE.items():
            if key in manifest["method"]:
                problems += shape_problems(manifest["method"][key], shape, f"method.{key}")
        problems += _alarm_problems(manifest)
        try:
            Preprocess.from_dict(manifest["model"]["preprocess"])
        except ConfigError as error:
            problems.append(f"preprocessing: {error.got} instead of {error.expected}")
    if problems:
        raise BundleError(expected=f"a complete {file}", got="; ".join(problems[:10]), fix=_REMAKE)


def _alarm_problems(manifest: dict[str, Any]) -> list[str]:
    """Return what is wrong with the level of the alarm; older bundles have none."""
    if "alarm" not in manifest:
        return []
    problems = shape_problems(manifest["alarm"], _ALARM_SHAPE, "alarm")
    if not problems:
        rates = {name: manifest["alarm"][name] for name in _ALARM_SHAPE}
        problems = [f"alarm.{name} is not in [0, 1]" for name, rate in rates.items() if not 0 <= rate <= 1]
    return problems


def _listed(files: Mapping[str, Any]) -> dict[str, ListedFile]:
    return {
        name: ListedFile(sha256=entry["sha256"], size_bytes=entry["size_bytes"])
        for name, entry in files.items()
    }


def _is_plain_name(name: str) -> bool:
    return Path(name).name == name and name.isprintable()


def _read_checked(folder: Path, name: str, files: Mapping[str, ListedFile]) -> bytes:
    file = folder / name
    try:
        data = read_regular_file(file, max_bytes=MAX_FILE_BYTES)
    except OSError as error:
        got = error.strerror or "unreadable"
        raise BundleError(expected=f"the file {file}", got=got, fix=_REMAKE) from error
    sha256 = hashlib.sha256(data).hexdigest()
    expected = files[name].sha256 if name in files else None
    if sha256 != expected:
        raise BundleError(
            expected=f"{file} with SHA-256 {expected}, as its manifest says",
            got=f"{sha256}: the file was changed or damaged",
            fix=_REMAKE,
        )
    return data


def _tensors(folder: Path, name: str, data: bytes) -> dict[str, np.ndarray]:
    try:
        return safetensors_numpy.load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise BundleError(expected=f"safetensors in {folder / name}", got=str(error), fix=_REMAKE) from error


def _check_head(folder: Path, head: Mapping[str, np.ndarray], classes: int) -> None:
    problems = [] if "logit_scale" in head else ["no 'logit_scale'"]
    scalars = [key for key in ("logit_scale", "logit_bias") if key in head and head[key].size != 1]
    problems += [f"{key} is not one number" for key in scalars]
    shapes = set()
    for key in ("class_embeddings", "reference_embeddings"):
        tensor = head.get(key)
        if tensor is None:
            problems.append(f"no {key!r}")
            continue
        shapes.add(tensor.shape)
        if tensor.dtype != np.float32 or tensor.ndim != 2 or len(tensor) != classes:
            problems.append(f"{key} is {tensor.dtype} {list(tensor.shape)}")
    if len(shapes) > 1:
        problems.append("the two heads differ in shape")
    finite = {key: bool(np.isfinite(tensor).all()) for key, tensor in head.items()}
    problems += [f"{key} holds NaN or infinity" for key, good in finite.items() if not good]
    if problems:
        raise BundleError(
            expected=f"two finite float32 heads of {classes} rows in {folder / HEAD}",
            got="; ".join(problems),
            fix=_REMAKE,
        )
