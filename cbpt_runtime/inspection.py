"""What a path holds: a bundle or a checkpoint, described without running anything from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cbpt_runtime.bundle import MANIFEST, read_bundle
from cbpt_runtime.names import is_file


def inspect_path(
    source: str | Path, *, model: str | Path | None = None, image_size: int | None = None
) -> dict[str, Any]:
    """Describe a checkpoint or a bundle as a JSON-able dict.

    Args:
        source: Path of either, or a pretrained tag or ``hf-hub:`` id.
        model: open_clip architecture or config file, for checkpoints that do not say.
        image_size: Side of the input of a checkpoint, instead of its configuration's.

    Raises:
        BundleError: The bundle is damaged; the text names the file.
        CheckpointError: The checkpoint cannot be read.
    """
    if is_file(Path(source) / MANIFEST):
        return inspect_bundle(Path(source))
    from cbpt_runtime.models.inspection import inspect_checkpoint

    return inspect_checkpoint(source, model=model, image_size=image_size)


def inspect_bundle(path: Path) -> dict[str, Any]:
    """Describe a bundle after hashing every file of it.

    Raises:
        BundleError: A file is missing, changed or contradicts the manifest; the text names it.
    """
    bundle = read_bundle(path)
    files = bundle.manifest["files"]
    unlisted = sorted(item.name for item in path.iterdir() if item.name not in {*files, MANIFEST})
    model, method = bundle.manifest["model"], bundle.manifest["method"]
    return {
        "kind": "bundle",
        "path": str(path),
        "digest": bundle.digest,
        "verdict": bundle.verdict,
        "suspects": [str(suspect["name"]) for suspect in bundle.suspects],
        "classes": len(bundle.class_names),
        "embed_dim": bundle.class_embeddings.shape[1],
        "image_size": list(bundle.preprocess.image_size),
        "checkpoint": str(model["source"]),
        "checkpoint_sha256": str(model["sha256"]),
        "method": str(method["name"]),
        "parameterization": str(method["parameterization"]),
        "encoder": bundle.encoder,
        "seed": method["seed"],
        "size_bytes": sum(entry["size_bytes"] for entry in files.values()),
        "verified": sorted(files),
        "anomalies": [f"a file the manifest does not know: {name}" for name in unlisted],
    }
