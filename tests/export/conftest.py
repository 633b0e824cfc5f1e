"""One export of the tiny bundle, shared by the tests of this area."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors import numpy as safetensors_numpy

from cbpt_runtime.bundle import ENCODER, Bundle, BundleContent, CleanImages, write_bundle
from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.export.graph import export_onnx
from cbpt_runtime.export.images import GateImages, draw_gate_images
from cbpt_runtime.export.profiles import Profile
from cbpt_runtime.export.repository import Exported, export_bundle


@dataclass(frozen=True)
class TinyExport:
    """The graph of the tiny bundle and what it is compared with. Copy the model before changing it."""

    bundle: Bundle
    classifier: BundleClassifier
    images: GateImages
    model: onnx.ModelProto


@pytest.fixture(scope="session")
def tiny_export(tiny_bundle: Bundle) -> TinyExport:
    classifier = BundleClassifier.from_bundle(tiny_bundle)
    return TinyExport(
        bundle=tiny_bundle,
        classifier=classifier,
        images=draw_gate_images(tiny_bundle),
        model=export_onnx(classifier),
    )


@pytest.fixture(scope="session")
def bundle_with_images(tiny_export: TinyExport, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with the drawn pictures in it, labelled by its own classifier: its accuracy is 1."""
    bundle, pixels = tiny_export.bundle, tiny_export.images.pixels
    labels = tiny_export.classifier.predict(pixels).labels.astype(np.int64)
    parts = ("verdict", "model", "method", "versions")
    content = BundleContent(
        **{part: bundle.manifest[part] for part in parts},
        class_names=bundle.class_names,
        templates=tuple(map(tuple, bundle.manifest["classes"]["templates"])),
        suspects=bundle.suspects,
        class_embeddings=bundle.class_embeddings,
        reference_embeddings=bundle.reference_embeddings,
        logit_scale=bundle.logit_scale,
        encoder=safetensors_numpy.load(bundle.read_file(ENCODER)),
        images=CleanImages(
            calibration=pixels[:8],
            calibration_labels=labels[:8],
            heldout=pixels[8:],
            heldout_labels=labels[8:],
        ),
    )
    return write_bundle(tmp_path_factory.mktemp("with-images") / "bundle", content=content)


@pytest.fixture(scope="session")
def tiny_repository(
    tiny_bundle: Bundle, tiny_image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    """Read only: use `copied_repository` to change it."""
    output = tmp_path_factory.mktemp("tiny-repository") / "repository"
    return export_bundle(
        tiny_bundle, output, name="shapes", profile=Profile(max_batch=8), calibration=tiny_image_folder
    )


@pytest.fixture
def copied_repository(tiny_repository: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_repository.path, tmp_path / "repository"))


@pytest.fixture
def resealed() -> Callable[[Path], None]:
    """Returns a function that makes the manifest of a changed repository fit again, as an attacker would."""

    def reseal(folder: Path) -> None:
        import json

        from cbpt_runtime.export.manifest import write_manifest

        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").unlink()
        summary = {k: v for k, v in manifest.items() if k not in ("files", "kind", "schema_version")}
        write_manifest(folder, summary)

    return reseal
