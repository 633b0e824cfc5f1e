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

The last five are not in every bundle. It is staged beside its place and moved there: a bundle is whole or
absent. Reading needs NumPy and safetensors only. ``logit_scale`` is stored already exponentiated.
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
from cbpt_runtime.bundle.records import Concept, Evidence, Making, Origin, Suspect
from cbpt_runtime.bundle.writing import BUNDLE, BundleContent, write_bundle

__all__ = [
    "BUNDLE",
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
    "Concept",
    "Evidence",
    "Making",
    "Origin",
    "Suspect",
    "choose_clean_images",
    "read_bundle",
    "write_bundle",
]
