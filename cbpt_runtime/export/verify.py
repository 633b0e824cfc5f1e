"""A repository checked again: hashes, graph, configurations, golden answers; with a bundle, parity."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from jaxtyping import UInt8

from cbpt_runtime.artifacts import read_regular_file
from cbpt_runtime.bundle import Bundle, read_bundle
from cbpt_runtime.errors import RepositoryError
from cbpt_runtime.export.foreign_graph import MAX_GRAPH_BYTES
from cbpt_runtime.export.golden import GoldenSet, read_golden
from cbpt_runtime.export.manifest import WEIGHTS, Repository
from cbpt_runtime.export.onnx import check_portable, describe, read_metadata
from cbpt_runtime.export.profiles import Profile, Provider
from cbpt_runtime.export.session import look_twice, open_session, predict
from cbpt_runtime.export.triton import parse_config
from cbpt_runtime.export.weights import WEIGHTS_SHA256, read_weights, to_bytes
from cbpt_runtime.export.written import require_own_files
from cbpt_runtime.runtime.prediction import Prediction
from cbpt_runtime.trust import ANYONE, Trust, open_repository

if TYPE_CHECKING:
    from cbpt_runtime.classification.bundled import BundleClassifier
    from cbpt_runtime.export.images import GateImages


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was checked, all of it good.

    Attributes:
        repository: Its path.
        digest: SHA-256 of its manifest.
        files: Files hashed.
        foreign: Files that this version would not have written so.
        provider: Execution provider the golden images really ran on.
        golden_images: Golden images answered.
        golden_difference: Largest difference in probability or alarm.
        golden_note: What differs, when int8 was exported on another kind of processor and something does.
        parity: The gate again, when a bundle was given.
        graph_note: Why the graph was not compared with a new export of the bundle, if it was not.
        ignored: What systems left in the folder, such as `lost+found`; nobody reads it.
    """

    repository: str
    digest: str
    files: int
    foreign: tuple[str, ...]
    provider: str
    golden_images: int
    golden_difference: float
    golden_note: str | None
    parity: dict[str, Any] | None
    graph_note: str | None = None
    ignored: tuple[str, ...] = ()


def verify_repository(
    path: str | Path,
    bundle: Bundle | str | Path | None = None,
    *,
    provider: Provider | None = None,
    images: str | Path | None = None,
    trust: Trust = ANYONE,
    allow_foreign_code: bool = False,
) -> Verification:
    """Check a model repository.

    Args:
        path: Its folder.
        bundle: What it was exported from; the gate of its precision is then run again, and a float32 graph
            compared with a new export.
        provider: Where to run; where its profile says when None.
        images: Labelled images for the gate; those the bundle carries, or drawn ones, when None.
        trust: What the repository has to show; its manifest has the digest that the bundle must have.
        allow_foreign_code: Accept code, configurations and parts of the graph that this version would not
            have written; the graph still has to be portable.

    Raises:
        RepositoryError: It is damaged, contradicts itself, or is not the bundle's.
        TrustError: It is not the trusted one.
        ConfigError: The provider is not there.
        ExportError: A golden answer or the parity gate failed.
    """
    repository = open_repository(path, trust)
    where: Provider = repository.manifest.profile.provider if provider is None else provider
    foreign = require_own_files(repository, allow_foreign_code=allow_foreign_code)
    model = check_graph(repository)
    check_configs(repository)
    preprocess = repository.manifest.preprocess
    golden = read_golden(repository.golden)
    pixels = golden.pixels(preprocess)
    _check_pixels(golden, pixels)
    session = open_session(str(repository.graph), where)
    manifest = repository.manifest
    said = predict(session, pixels, batch_size=len(pixels), threshold=manifest.alarm_threshold)
    checked = golden.check(said, where=str(repository.path), made_on=manifest.processor)
    again = None
    if manifest.profile.second_look:
        again = look_twice(
            session,
            pixels,
            said,
            threshold=manifest.alarm_threshold or 0.0,
            suspects=manifest.suspects,
            sigmoid=manifest.sigmoid,
            max_batch=manifest.profile.max_batch,
        )
        place = f"{repository.path}, looked at twice,"
        checked = golden.check(again, where=place, made_on=manifest.processor)
    parity, graph_note = None, None
    if bundle is not None:
        parity, graph_note = _again(repository, model, bundle, where, images, pixels, again)
    return Verification(
        repository=str(repository.path),
        digest=repository.digest,
        files=len(repository.manifest.files),
        foreign=tuple(foreign),
        provider=session.get_providers()[0],
        golden_images=len(pixels),
        golden_difference=checked.largest_difference,
        golden_note=checked.note,
        parity=parity,
        graph_note=graph_note,
        ignored=repository.ignored,
    )


def check_graph(repository: Repository) -> onnx.ModelProto:
    """Load the graph, not the weights beside it; check that it is portable and what the manifest says.

    Raises:
        RepositoryError: It is not the manifest's graph.
        ExportError: It is not portable.
    """
    try:
        content = read_regular_file(repository.graph, max_bytes=MAX_GRAPH_BYTES)
        model = onnx.load_model_from_string(content)
        names = json.loads(read_metadata(model).get("cbpt.class_names", "[]"))
    except (OSError, DecodeError, ValueError, RecursionError) as error:
        raise _contradiction(f"an ONNX graph in {repository.graph}", str(error)) from error
    check_portable(model)
    manifest, metadata = repository.manifest, read_metadata(model)
    problems = []
    if hashlib.sha256(content).hexdigest() != manifest.provenance["graph_sha256"]:
        problems.append("another graph")
    weights = repository.weights
    if metadata.get(WEIGHTS_SHA256) != (None if weights is None else weights.sha256):
        problems.append(f"other weights in {WEIGHTS}")
    if metadata.get("cbpt.bundle_digest") != manifest.provenance["bundle_digest"]:
        problems.append("the graph of another bundle")
    if not isinstance(names, list) or len(names) != manifest.classes:
        problems.append("another number of classes")
    if problems:
        raise _contradiction("the graph its manifest names", ", ".join(problems))
    return model


def check_configs(repository: Repository) -> None:
    """Parse every configuration of the repository with Triton's own protobuf.

    Raises:
        RepositoryError: One does not parse, or belongs to another model.
    """
    from google.protobuf import text_format

    for name in repository.manifest.models:
        folder = repository.path / name
        for file in [folder / "config.pbtxt", *sorted(folder.glob("configs/*.pbtxt"))]:
            try:
                config = parse_config(file.read_text(encoding="utf-8"))
            except (OSError, ValueError, text_format.ParseError) as error:
                raise _contradiction(f"a configuration Triton can read in {file}", str(error)) from error
            if config.name != name:
                raise _contradiction(f"the configuration of {name} in {file}", f"that of {config.name}")


def _check_pixels(golden: GoldenSet, pixels: Any) -> None:
    rows = golden.answers["images"]
    different = [
        row["file"]
        for row, image in zip(rows, pixels, strict=True)
        if hashlib.sha256(image.tobytes()).hexdigest() != row["pixels_sha256"]
    ]
    if different:
        raise RepositoryError(
            expected="golden images that decode to the pixels they had at export",
            got=f"other pixels from {', '.join(different)}",
            fix="Install the Pillow version named in the manifest.",
        )


def _again(
    repository: Repository,
    model: onnx.ModelProto,
    bundle: Bundle | str | Path,
    provider: Provider,
    images: str | Path | None,
    golden: UInt8[np.ndarray, "batch height width 3"],
    golden_again: Prediction | None,
) -> tuple[dict[str, Any], str | None]:
    """Run the gate again; also return why the graph was not compared with a new export, if it was not."""
    from cbpt_runtime.classification.bundled import BundleClassifier
    from cbpt_runtime.classification.classifier import SecondLook
    from cbpt_runtime.export.images import find_gate_images
    from cbpt_runtime.export.parity import measure_parity

    bundle = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    if bundle.digest != repository.manifest.provenance["bundle_digest"]:
        raise _contradiction(f"the repository of {bundle.path}", "that of another bundle")
    profile = repository.manifest.profile
    seen = find_gate_images(bundle, images)
    classifier = BundleClassifier.from_bundle(bundle)
    graph_note = _compare_with_new_export(model, classifier)
    if profile.precision != "fp32":
        session = open_session(str(repository.graph), provider)
        return _quality(session, classifier, seen, profile), graph_note
    read_weights(model, repository.graph.with_name(WEIGHTS))
    parity = measure_parity(model, classifier, seen, max_batch=profile.max_batch, provider=provider)
    if golden_again is not None:
        expected = SecondLook(classifier).predict(golden)
        parity = parity.with_second_look(golden_again, expected, max_batch=profile.max_batch)
    parity.require()
    return parity.to_dict(), graph_note


def _compare_with_new_export(model: onnx.ModelProto, classifier: BundleClassifier) -> str | None:
    """Export the bundle once more and compare byte by byte; why not, where that says nothing.

    The same bundle and packages give the same bytes in float32. Those of fp16 and int8 also depend on the
    provider, the calibration images and the processor; the gate alone speaks for them.

    Raises:
        RepositoryError: The bundle gives another graph.
    """
    from cbpt_runtime.export.graph import export_onnx

    metadata, expected = read_metadata(model), describe(classifier.bundle, precision="fp32")
    if metadata.get("cbpt.precision") != "fp32":
        return "the graph was not compared with a new export, which only float32 allows"
    if metadata.get("cbpt.versions") != expected["cbpt.versions"]:
        return (
            "the graph was not compared with a new export: it was made with other package versions, "
            f"{metadata.get('cbpt.versions')}"
        )
    if to_bytes(export_onnx(classifier)) != to_bytes(model):
        raise _contradiction(f"the graph that {classifier.source} gives when it is exported", "another graph")
    return None


def _quality(
    session: onnxruntime.InferenceSession,
    classifier: BundleClassifier,
    images: GateImages,
    profile: Profile,
) -> dict[str, Any]:
    """Run the gate of lower precisions again, against PyTorch in float32."""
    from cbpt_runtime.export.images import HeldOut, compare, is_good_enough, refusal
    from cbpt_runtime.export.precision import answers

    heldout = HeldOut(classifier.bundle, images)
    before = heldout.measure(lambda pixels: classifier.predict(pixels).logits)
    report = compare(before, heldout.measure(answers(session, profile.max_batch)))
    if not is_good_enough(report):
        raise refusal(report, profile.precision)
    return {"provider": session.get_providers()[0], "images": images.source, "precision": report}


def _contradiction(expected: str, got: str) -> RepositoryError:
    return RepositoryError(
        expected=expected, got=got, fix="Export the bundle again with `cbpt-runtime export`."
    )
