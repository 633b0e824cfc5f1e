"""Writing a bundle: staged, read back, moved into place."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float
from safetensors import numpy as safetensors_numpy

from cbpt_runtime.artifacts import Kind, ListedFile, listed_in, new_folder
from cbpt_runtime.artifacts.names import json_text, readable
from cbpt_runtime.artifacts.signing import SIGNATURE
from cbpt_runtime.bundle.images import CleanImages
from cbpt_runtime.bundle.reading import (
    ENCODER,
    HEAD,
    IMAGES,
    MANIFEST,
    REPORT,
    SCHEMA_VERSION,
    TRIGGERS,
    Bundle,
    read_bundle,
)
from cbpt_runtime.bundle.records import Evidence, Suspect
from cbpt_runtime.models.prompt_findings import PromptCheck


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleContent:
    """Everything a bundle holds, before it is on disk.

    Attributes:
        verdict: 'backdoored' or 'clean'; 'unknown' where the method looks for no target.
        model: ``config``, ``preprocess``, ``source``, ``format``, ``sha256`` and ``dtype`` of the suspect
            checkpoint; ``preprocess`` as `Preprocess.to_dict` gives it.
        class_names: In the order of the rows of both heads.
        templates: Prompt templates of each class, ``{}`` standing for the name.
        class_folders: Names of the classes' image folders, where they may be others than the classes'.
        method: ``name``, ``config``, ``seed`` and ``parameterization``.
        suspects: The suspected targets, the most suspicious first.
        metrics: Numbers measured on held-out clean images, in [0, 1] where they are rates.
        stage_seconds: Wall time of each stage.
        evidence: What the search says of every concept.
        prompts: What was found of the words in the prompts; None where nobody looked.
        alarm: From which alarm on an image is suspicious: ``threshold``, ``false_alarm_rate`` and what it was
            chosen on; None where nothing is suspected.
        versions: Versions of the packages that made it.
        class_embeddings: The purified head, unit-norm rows.
        reference_embeddings: The head before purification, unit-norm rows.
        logit_scale: Temperature, already exponentiated.
        logit_bias: SigLIP's bias, else None.
        contexts: Learned prompt contexts where there are any.
        encoder: State dict of the image tower.
        triggers: The dummy triggers by name.
        images: Clean images for exports; None leaves them out.
    """

    verdict: str
    model: Mapping[str, Any]
    class_names: tuple[str, ...]
    templates: tuple[tuple[str, ...], ...]
    method: Mapping[str, Any]
    class_embeddings: Float[np.ndarray, "classes dim"]
    reference_embeddings: Float[np.ndarray, "classes dim"]
    logit_scale: float
    logit_bias: float | None = None
    contexts: Float[np.ndarray, "classes context dim"] | None = None
    encoder: Mapping[str, np.ndarray] = field(default_factory=dict)
    triggers: Mapping[str, np.ndarray] = field(default_factory=dict)
    images: CleanImages | None = None
    class_folders: tuple[str, ...] = ()
    suspects: tuple[Suspect, ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    evidence: Evidence = field(default_factory=Evidence)
    prompts: PromptCheck | None = None
    alarm: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


def _is_manifest(manifest: Mapping[str, Any]) -> bool:
    return "verdict" in manifest and HEAD in manifest["files"]


BUNDLE: Final = Kind(name="bundle", own_files=listed_in(MANIFEST, _is_manifest, besides=[SIGNATURE]))


def write_bundle(
    path: str | Path,
    *,
    content: BundleContent,
    force: bool = False,
    report: Callable[[Bundle], str] | None = None,
    papers: Callable[[Bundle], Mapping[str, str]] | None = None,
) -> Bundle:
    """Write a bundle whole, or not at all.

    Args:
        path: The folder to make; its parents are made too.
        content: What to write.
        force: Replace a bundle that is already there.
        report: Given the bundle so far, returns the text of ``report.html``.
        papers: Given the bundle so far, returns further texts by file name.

    Returns:
        The bundle as read back from disk.

    Raises:
        OutputError: The path exists already, the disk is full, or there is no permission.
        BundleError: The content contradicts itself, for example NaN in a head.
    """
    path = Path(path)
    with new_folder(path, BUNDLE, force=force) as staging:
        _write_files(staging, content, report)
        _write_papers(staging, content, papers)
        read_bundle(staging)
    return read_bundle(path, verify=False)


def _write_files(folder: Path, content: BundleContent, report: Callable[[Bundle], str] | None) -> None:
    files: dict[str, ListedFile] = {}
    parts: dict[str, Mapping[str, np.ndarray]] = {
        HEAD: _head(content),
        ENCODER: content.encoder,
        TRIGGERS: content.triggers,
    }
    if content.images is not None:
        parts[IMAGES] = content.images.to_tensors()
    for name, tensors in parts.items():
        ordered = {key: np.asarray(tensors[key], order="C") for key in sorted(tensors)}
        files[name] = _write(folder / name, safetensors_numpy.save(ordered))
    _write_manifest(folder, content, files)
    if report is not None:
        text = report(read_bundle(folder, verify=False))
        files[REPORT] = _write(folder / REPORT, readable(text).encode())
        _write_manifest(folder, content, files)


def _write_papers(
    folder: Path, content: BundleContent, papers: Callable[[Bundle], Mapping[str, str]] | None
) -> None:
    if papers is not None:
        bundle = read_bundle(folder, verify=False)
        files = bundle.files
        for name, text in papers(bundle).items():
            files[name] = _write(folder / name, text.encode())
        _write_manifest(folder, content, files)


def _head(content: BundleContent) -> dict[str, np.ndarray]:
    head = {
        "class_embeddings": content.class_embeddings.astype(np.float32),
        "reference_embeddings": content.reference_embeddings.astype(np.float32),
        "logit_scale": np.array(content.logit_scale, np.float32),
    }
    if content.logit_bias is not None:
        head["logit_bias"] = np.array(content.logit_bias, np.float32)
    if content.contexts is not None:
        head["contexts"] = content.contexts.astype(np.float32)
    return head


def _write(path: Path, data: bytes) -> ListedFile:
    path.write_bytes(data)
    return ListedFile(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


def _write_manifest(folder: Path, content: BundleContent, files: Mapping[str, ListedFile]) -> None:
    folders = {"folders": content.class_folders} if content.class_folders else {}
    prompts = {} if content.prompts is None else {"prompts": content.prompts.to_dict()}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "verdict": content.verdict,
        "model": content.model,
        "classes": {"names": content.class_names, "templates": content.templates, **folders},
        "method": content.method,
        "suspects": [asdict(suspect) for suspect in content.suspects],
        "metrics": content.metrics,
        "stage_seconds": content.stage_seconds,
        "evidence": content.evidence.to_dict() | prompts,
        **({} if content.alarm is None else {"alarm": content.alarm}),
        "versions": content.versions,
        "files": {name: asdict(file) for name, file in files.items()},
    }
    text = json_text(_jsonable(manifest), indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _jsonable(value: Any) -> Any:
    """Plain JSON values; NumPy and tensor numbers become Python's, a rate that is NaN becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if hasattr(value, "tolist"):
        return _jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
