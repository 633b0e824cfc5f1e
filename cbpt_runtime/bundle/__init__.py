"""The bundle: a purified classifier as a self-contained, hash-checked folder.

    bundle/
        manifest.json         what it is, how it was made, SHA-256 of every other file
        head.safetensors      class_embeddings, reference_embeddings, logit_scale, [logit_bias], [contexts]
        encoder.safetensors   the image tower, untouched
        triggers.safetensors  the dummy triggers
        report.html           the same story for people

It is written to a temporary sibling and renamed into place: a bundle is whole or absent. Reading needs
NumPy and safetensors only. ``logit_scale`` is stored already exponentiated.
"""

from __future__ import annotations

from cbpt_runtime.bundle.reading import (
    ENCODER,
    HEAD,
    MANIFEST,
    REPORT,
    SCHEMA_VERSION,
    TRIGGERS,
    Bundle,
    read_bundle,
)
from cbpt_runtime.bundle.writing import BundleContent, check_output, output_error, write_bundle

__all__ = [
    "ENCODER",
    "HEAD",
    "MANIFEST",
    "REPORT",
    "SCHEMA_VERSION",
    "TRIGGERS",
    "Bundle",
    "BundleContent",
    "check_output",
    "output_error",
    "read_bundle",
    "write_bundle",
]
