"""The bundle: a purified classifier as a self-contained, hash-checked folder.

    bundle/
        manifest.json         what it is, how it was made, SHA-256 of every other file
        head.safetensors      class_embeddings, reference_embeddings, logit_scale, [logit_bias], [contexts]
        encoder.safetensors   the image tower; untouched, unless the method is one that tunes it
        triggers.safetensors  the dummy triggers
        images.safetensors    some of the clean images, for exports; absent when they were to be left out
        report.html           the same story for people
        verdict.intoto.json   the verdict as an in-toto attestation
        mlbom.cdx.json        a CycloneDX ML-BOM
        model.sig             a signature, where it was signed; not in the manifest

The last five are not in every bundle. It is written to a temporary sibling and renamed into place: a bundle
is whole or absent. Reading needs NumPy and safetensors only. ``logit_scale`` is stored already exponentiated.
"""

from __future__ import annotations

from cbpt_runtime.bundle.images import CleanImages, choose_clean_images
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
from cbpt_runtime.bundle.writing import (
    BundleContent,
    check_output,
    move_into_place,
    output_error,
    write_bundle,
)

__all__ = [
    "ENCODER",
    "HEAD",
    "IMAGES",
    "MANIFEST",
    "REPORT",
    "SCHEMA_VERSION",
    "TRIGGERS",
    "Bundle",
    "BundleContent",
    "CleanImages",
    "check_output",
    "choose_clean_images",
    "move_into_place",
    "output_error",
    "read_bundle",
    "write_bundle",
]
