"""A Triton model repository around the graph of a bundle: gated, whole or absent, every file hashed.

model_repository/
    manifest.json                what it serves, and SHA-256 of every other file
    parity.json                  what the gate saw
    verdict.intoto.json          the verdict about the checkpoint, as an in-toto attestation
    mlbom.cdx.json               a CycloneDX ML-BOM
    <name>/                      ensemble: image files in, answers out; 1/golden/ for self-tests
    <name>_preprocess/           python backend: decode and resize, exactly as open_clip
    <name>_classifier/           the graph: pixels in, answers out; configs/ for other targets; weights
                                 above 2 GiB lie beside it
    <name>_alarm/                python backend: counts alarms per suspected target in Triton's metrics;
                                 looks again at suspicious images, where that was asked for
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from jaxtyping import UInt8

from cbpt_runtime.artifacts import new_folder, reserved
from cbpt_runtime.bundle import Bundle, read_bundle
from cbpt_runtime.bundle.papers import repository_papers
from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.classification.classifier import SecondLook
from cbpt_runtime.errors import ConfigError
from cbpt_runtime.export.cpus import kind_of_processor
from cbpt_runtime.export.golden import GoldenSet, decoded, make_golden, write_golden
from cbpt_runtime.export.graph import export_onnx
from cbpt_runtime.export.images import GateImages, HeldOut, example_of_second_look, find_gate_images
from cbpt_runtime.export.manifest import MODEL_REPOSITORY, PARITY, WEIGHTS, Manifest, write_manifest
from cbpt_runtime.export.onnx import read_metadata
from cbpt_runtime.export.parity import measure_parity
from cbpt_runtime.export.profiles import Profile
from cbpt_runtime.export.session import look_twice, open_session, predict
from cbpt_runtime.export.triton import WARMUP
from cbpt_runtime.export.weights import GRAPH, WEIGHTS_SHA256, seal_weights, to_bytes, write_graph
from cbpt_runtime.export.written import GOLDEN_FOLDER, written_files
from cbpt_runtime.progress import Progress, silent
from cbpt_runtime.runtime.prediction import Prediction

_PACKAGES = ("cbpt-runtime", "torch", "onnx", "onnxruntime", "onnxscript", "numpy", "pillow", "tritonclient")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A repository that was written.

    Attributes:
        path: Its folder.
        name: Of the model that takes image files.
        digest: SHA-256 of its manifest.
        parity: What the gate saw, as in ``parity.json``.
        golden_twice: Golden images that are looked at twice; None where it was exported without.
        notes: Remarks for the user: which of the images given were left out.
    """

    path: Path
    name: str
    digest: str
    parity: dict[str, Any]
    golden_twice: int | None = None
    notes: tuple[str, ...] = ()


def export_bundle(
    bundle: Bundle | str | Path,
    output: str | Path,
    *,
    name: str = "clip",
    profile: Profile | None = None,
    calibration: str | Path | None = None,
    force: bool = False,
    skip_unreadable: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Export the classifier of a bundle and write a model repository, if and only if the gate passes.

    Args:
        bundle: A bundle or the path of one.
        output: The folder to make.
        name: Of the model that takes image files.
        profile: How it will be served; the CPU when None.
        calibration: Labelled images, one folder per class: what the gate and the golden set use, instead of
            those the bundle carries. Without either, pictures are drawn; 'fp16' and 'int8' need real ones.
        force: Replace a model repository that is already at ``output``.
        skip_unreadable: Do without images of ``calibration`` that cannot be read.
        progress: Told how far the work is.

    Raises:
        InputError: The bundle is damaged, or something given is wrong, or a second look is asked for where
            the bundle calls nothing suspicious.
        ExportError: The graph cannot be exported or did not pass the gate; nothing was written.
    """
    output = Path(output)
    profile = Profile() if profile is None else profile
    _check_request(name, profile)
    with reserved(output, MODEL_REPOSITORY, force=force):
        if not isinstance(bundle, Bundle):
            bundle = read_bundle(bundle)
        images = find_gate_images(bundle, calibration, skip_unreadable=skip_unreadable)
        graph = _gated_graph(bundle, profile, images, progress or silent)
        manifest = _manifest(bundle, name, profile, graph.model)
        digest = _write_whole(manifest, bundle, graph, output, force)
    return Exported(
        path=output,
        name=name,
        digest=digest,
        parity=graph.parity,
        golden_twice=graph.golden.looked_twice if profile.second_look else None,
        notes=images.notes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _GatedGraph:
    model: onnx.ModelProto
    golden: GoldenSet
    parity: dict[str, Any]


def _gated_graph(bundle: Bundle, profile: Profile, images: GateImages, tell: Progress) -> _GatedGraph:
    """Return the graph of a bundle that has passed the gate, with what it answers and what the gate saw."""
    heldout = None if profile.precision == "fp32" else HeldOut(bundle, images)
    tell("export graph", 0, 1, {})
    classifier = BundleClassifier.from_bundle(bundle)
    looker = SecondLook(classifier) if profile.second_look else None
    model = export_onnx(classifier, profile.precision)
    tell("export graph", 1, 1, {})
    parity = measure_parity(model, classifier, images, max_batch=profile.max_batch, provider=profile.provider)
    files = images.encoded
    if looker is not None:
        files += example_of_second_look(bundle, images, looker)
    pixels = decoded(files, bundle.preprocess)
    said, again = _answers(model, bundle, profile, pixels)
    if looker is not None and again is not None:
        parity = parity.with_second_look(again, looker.predict(pixels), max_batch=profile.max_batch)
    parity.require()
    tell("parity gate", 1, 1, {})
    report = parity.to_dict()
    if heldout is not None:
        from cbpt_runtime.export.precision import reduce_precision

        model, report["precision"] = reduce_precision(model, bundle, images, heldout, profile, progress=tell)
        seal_weights(model)
        said, again = _answers(model, bundle, profile, pixels)
    golden = make_golden(files, pixels, bundle.class_names, said, again)
    return _GatedGraph(model=model, golden=golden, parity=report)


def _answers(
    model: onnx.ModelProto,
    bundle: Bundle,
    profile: Profile,
    pixels: UInt8[np.ndarray, "batch height width 3"],
) -> tuple[Prediction, Prediction | None]:
    """Ask a graph about images, and again about suspicious ones where a server is to look twice."""
    session, level = open_session(model, profile.provider), bundle.alarm_threshold
    said = predict(session, pixels, batch_size=len(pixels), threshold=level)
    if level is None or not profile.second_look:
        return said, None
    return said, look_twice(
        session,
        pixels,
        said,
        threshold=level,
        suspects=bundle.suspect_indices,
        sigmoid=bundle.logit_bias is not None,
        max_batch=profile.max_batch,
    )


def _check_request(name: str, profile: Profile) -> None:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,63}", name):
        raise ConfigError(
            expected="a model name of letters, digits, '_' and '-', at most 64, a letter first",
            got=repr(name),
            fix="Choose another --name.",
        )
    if profile.precision == "int8" and profile.provider != "cpu":
        raise ConfigError(
            expected="int8 on a CPU, for whose instructions it is made",
            got=f"int8 on {profile.provider}",
            fix="Choose --precision fp16 there, or --profile cpu.",
        )


def _manifest(bundle: Bundle, name: str, profile: Profile, model: onnx.ModelProto) -> Manifest:
    return Manifest(
        name=name,
        classes=len(bundle.class_names),
        preprocess=bundle.preprocess,
        profile=profile,
        suspects=bundle.suspect_indices,
        alarm_threshold=bundle.alarm_threshold,
        sigmoid=bundle.logit_bias is not None,
        processor=kind_of_processor() if profile.precision == "int8" else None,
        provenance={
            "bundle_digest": bundle.digest,
            "checkpoint_sha256": bundle.origin.sha256,
            "graph_sha256": hashlib.sha256(to_bytes(model)).hexdigest(),
            "verdict": bundle.verdict,
            "cbpt_runtime_version": version("cbpt-runtime"),
        },
        versions={package: version(package) for package in _PACKAGES},
    )


def _write_whole(manifest: Manifest, bundle: Bundle, graph: _GatedGraph, output: Path, force: bool) -> str:
    picture = graph.golden.files[0]
    files = {
        **written_files(manifest, bundle.class_names),
        **_papers(manifest, bundle, graph),
        f"{manifest.preprocess_name}/warmup/{WARMUP}": len(picture).to_bytes(4, "little") + picture,
        PARITY: _json(graph.parity),
    }
    with new_folder(output, MODEL_REPOSITORY, force=force) as staging:
        for name, data in files.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_bytes(data)
        write_graph(graph.model, staging / manifest.classifier_name / "1")
        write_golden(graph.golden, staging / manifest.name / "1" / GOLDEN_FOLDER)
        return write_manifest(staging, manifest.to_dict())


def _papers(manifest: Manifest, bundle: Bundle, graph: _GatedGraph) -> dict[str, bytes]:
    place = f"{manifest.classifier_name}/1"
    products = {f"{place}/{GRAPH}": manifest.provenance["graph_sha256"]}
    if weights := read_metadata(graph.model).get(WEIGHTS_SHA256):
        products[f"{place}/{WEIGHTS}"] = weights
    papers = repository_papers(
        bundle,
        name=manifest.name,
        products=products,
        versions=manifest.versions,
        export={"profile": manifest.profile.to_dict(), "parity": graph.parity},
    )
    return {name: text.encode() for name, text in papers.items()}


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
