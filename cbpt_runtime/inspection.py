"""What a path holds: a bundle or a checkpoint, described without running anything from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbpt_runtime.artifacts.names import is_file
from cbpt_runtime.artifacts.signing import SIGNATURE
from cbpt_runtime.bundle import MANIFEST
from cbpt_runtime.errors import ConfigError
from cbpt_runtime.trust import ANYONE, Trust, open_bundle, refuse_untrusted


def inspect_path(
    source: str | Path,
    *,
    model: str | Path | None = None,
    image_size: int | None = None,
    classes: str | Path | None = None,
    templates: Sequence[str] | None = None,
    trust: Trust = ANYONE,
) -> dict[str, Any]:
    """Describe a checkpoint or a bundle as a JSON-able dict.

    Args:
        source: Path of either, or a pretrained tag or ``hf-hub:`` id.
        model: open_clip architecture or config file, for checkpoints that do not say.
        image_size: Side of the input of a checkpoint, instead of its configuration's.
        classes: A class list, whose prompts are then looked at through the text tower of a checkpoint.
        templates: Of the classes without their own, as for purification.
        trust: What a bundle has to show.

    Raises:
        BundleError: The bundle is damaged; the text names the file.
        CheckpointError: The checkpoint cannot be read.
        ConfigError: Classes for a bundle, which has its own, or templates without classes.
        TrustError: The bundle is not the trusted one, or it is a checkpoint that can show nothing.
    """
    if templates is not None and classes is None:
        raise ConfigError(
            expected="templates for classes",
            got="templates alone",
            fix="Name the class list, too: --classes.",
        )
    if is_file(Path(source) / MANIFEST):
        if classes is not None:
            raise ConfigError(
                expected="a class list for a checkpoint",
                got=f"one for the bundle {source}, which has its own",
                fix="Leave --classes away; what was found of its prompts is in the bundle.",
            )
        return inspect_bundle(Path(source), trust)
    refuse_untrusted(source, trust)
    from cbpt_runtime.models.inspection import inspect_checkpoint, inspect_prompts

    if classes is None:
        return inspect_checkpoint(source, model=model, image_size=image_size)
    return inspect_prompts(source, classes, model=model, image_size=image_size, templates=templates)


def inspect_bundle(path: Path, trust: Trust = ANYONE) -> dict[str, Any]:
    """Describe a bundle after hashing every file of it.

    Raises:
        BundleError: A file is missing, changed or contradicts the manifest; the text names it.
        TrustError: It is not the trusted one.
    """
    bundle = open_bundle(path, trust)
    origin, making = bundle.origin, bundle.making
    return {
        "kind": "bundle",
        "path": str(path),
        "digest": bundle.digest,
        "signature": _signature(path, trust),
        "verdict": bundle.verdict,
        "suspects": [suspect.name for suspect in bundle.suspects],
        "classes": len(bundle.class_names),
        "embed_dim": bundle.class_embeddings.shape[1],
        "image_size": list(bundle.preprocess.image_size),
        "checkpoint": origin.source,
        "checkpoint_sha256": origin.sha256,
        "method": making.method,
        "parameterization": making.parameterization,
        "encoder": making.encoder,
        "seed": making.seed,
        "size_bytes": sum(file.size_bytes or 0 for file in bundle.files.values()),
        "verified": sorted(bundle.files),
        "prompts": bundle.prompts,
        "anomalies": [f"a file the manifest does not know: {name}" for name in bundle.unlisted()],
    }


def _signature(path: Path, trust: Trust) -> str:
    if trust.key is not None:
        return f"good, by the signer that {trust.key} names"
    return "there, not checked: --trust names a key" if (path / SIGNATURE).is_file() else "none"
