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
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from cbpt_runtime.artifacts import new_folder, reserved
from cbpt_runtime.bundle import Bundle, read_bundle
from cbpt_runtime.bundle.papers import repository_papers
from cbpt_runtime.classification.bundled import BundleClassifier, encoder_tensors
from cbpt_runtime.classification.second_look import SecondLook, require_level
from cbpt_runtime.errors import ConfigError
from cbpt_runtime.export.cpus import kind_of_processor
from cbpt_runtime.export.golden import GoldenSet, make_golden, write_golden
from cbpt_runtime.export.graph import ServedClassifier, check_exportable, export_onnx
from cbpt_runtime.export.images import GateImages, example_of_second_look, find_gate_images
from cbpt_runtime.export.manifest import MODEL_REPOSITORY, PARITY, WEIGHTS, Manifest, write_manifest
from cbpt_runtime.export.onnx import read_metadata
from cbpt_runtime.export.parity import look_twice, measure_parity
from cbpt_runtime.export.profiles import Profile
from cbpt_runtime.export.quality import HeldOut
from cbpt_runtime.export.session import Provider, open_session, predict
from cbpt_runtime.export.triton import WARMUP, Served
from cbpt_runtime.export.weights import GRAPH, WEIGHTS_SHA256, seal_weights, to_bytes, write_graph
from cbpt_runtime.export.written import GOLDEN_FOLDER, written_files
from cbpt_runtime.models.clip import load_image_encoder
from cbpt_runtime.progress import Progress
from cbpt_runtime.runtime.preprocess import decode_image, to_pixels

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
        if profile.second_look:
            require_level(bundle.alarm_threshold, bundle.suspect_indices, str(bundle.path))
        images = find_gate_images(bundle, calibration, skip_unreadable=skip_unreadable)
        content = _gated(bundle, name, profile, images, progress)
        digest = _write_whole(content, output, force)
    return Exported(
        path=output,
        name=name,
        digest=digest,
        parity=dict(content.parity),
        golden_twice=content.golden.looked_twice if profile.second_look else None,
        notes=images.notes,
    )


def load_served(bundle: Bundle) -> tuple[ServedClassifier, BundleClassifier]:
    """Return the module to export and the classifier to compare it with; they share one encoder."""
    state = encoder_tensors(bundle)
    encoder = load_image_encoder(bundle.model_config, bundle.preprocess, state, "cpu")
    return ServedClassifier(bundle, encoder), BundleClassifier(bundle, encoder, torch.device("cpu"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Content:
    served: Served
    model: onnx.ModelProto
    golden: GoldenSet
    parity: Mapping[str, Any]


def _gated(
    bundle: Bundle, name: str, profile: Profile, images: GateImages, progress: Progress | None
) -> _Content:
    """Return what goes into a repository, after its graph has passed the gate."""
    tell = progress or _silent
    heldout = None if profile.precision == "fp32" else HeldOut(bundle, images)
    tell("export graph", 0, 1, {})
    module, classifier = load_served(bundle)
    check_exportable(module, precision=profile.precision)
    model = export_onnx(module, bundle)
    tell("export graph", 1, 1, {})
    provider: Provider = profile.provider
    encoded = images.encoded
    if profile.second_look:
        encoded += example_of_second_look(bundle, images, SecondLook(classifier))
    pixels = np.stack([to_pixels(decode_image(file), bundle.preprocess) for file in encoded])
    twice = pixels if profile.second_look else None
    parity = measure_parity(
        model, classifier, images, max_batch=profile.max_batch, provider=provider, twice=twice
    )
    parity.require()
    tell("parity gate", 1, 1, {})
    report = parity.to_dict()
    if heldout is not None:
        from cbpt_runtime.export.precision import reduce_precision

        model, report["precision"] = reduce_precision(
            model, bundle, images, heldout, profile, progress=progress
        )
        seal_weights(model)
    session = open_session(model, provider)
    said = predict(session, pixels, batch_size=len(pixels), threshold=bundle.alarm_threshold)
    again = None
    if profile.second_look:
        again = look_twice(
            session,
            pixels,
            threshold=bundle.alarm_threshold or 0.0,
            suspects=bundle.suspect_indices,
            sigmoid=bundle.logit_bias is not None,
            max_batch=profile.max_batch,
        )
    return _Content(
        served=Served(name=name, bundle=bundle, profile=profile, provenance=_provenance(bundle, model)),
        model=model,
        golden=make_golden(encoded, bundle, said, again),
        parity=report,
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


def _provenance(bundle: Bundle, model: onnx.ModelProto) -> dict[str, str]:
    return {
        "bundle_digest": bundle.digest,
        "checkpoint_sha256": bundle.origin.sha256,
        "graph_sha256": hashlib.sha256(to_bytes(model)).hexdigest(),
        "verdict": bundle.verdict,
        "cbpt_runtime_version": version("cbpt-runtime"),
    }


def _write_whole(content: _Content, output: Path, force: bool) -> str:
    with new_folder(output, MODEL_REPOSITORY, force=force) as staging:
        for name, data in _files(content).items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_bytes(data)
        write_graph(content.model, staging / content.served.classifier_name / "1")
        write_golden(content.golden, staging / content.served.name / "1" / GOLDEN_FOLDER)
        _write_papers(content, staging)
        return write_manifest(staging, _manifest(content.served).to_dict())


def _write_papers(content: _Content, folder: Path) -> None:
    served = content.served
    place = f"{served.classifier_name}/1"
    products = {f"{place}/{GRAPH}": served.provenance["graph_sha256"]}
    if weights := read_metadata(content.model).get(WEIGHTS_SHA256):
        products[f"{place}/{WEIGHTS}"] = weights
    papers = repository_papers(
        served.bundle,
        name=served.name,
        products=products,
        versions={package: version(package) for package in _PACKAGES},
        export={"profile": served.profile.to_dict(), "parity": content.parity},
    )
    for name, text in papers.items():
        (folder / name).write_text(text, encoding="utf-8")


def _files(content: _Content) -> dict[str, bytes]:
    """Every file of a repository but its graph, its golden set and its manifest, by its path."""
    served, picture = content.served, content.golden.files[0]
    return {
        **written_files(served),
        f"{served.preprocess_name}/warmup/{WARMUP}": len(picture).to_bytes(4, "little") + picture,
        PARITY: _json(content.parity),
    }


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _manifest(served: Served) -> Manifest:
    return Manifest(
        name=served.name,
        classes=len(served.bundle.class_names),
        preprocess=served.bundle.preprocess,
        profile=served.profile,
        suspects=served.bundle.suspect_indices,
        alarm_threshold=served.bundle.alarm_threshold,
        sigmoid=served.bundle.logit_bias is not None,
        processor=kind_of_processor() if served.profile.precision == "int8" else None,
        provenance=served.provenance,
        versions={package: version(package) for package in _PACKAGES},
    )


def _silent(stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
    """Progress nobody wants to see."""
