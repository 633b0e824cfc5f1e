"""A trusted relative of the suspect: read, and given the suspect's words.

What every model can be forced to is no sign of a backdoor. A relative that is known to have none says what
that is: triggers that are natural work on it, too.
"""

from __future__ import annotations

from pathlib import Path

from cbpt_runtime.bundle import Evidence
from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models.checkpoint import Checkpoint, read_checkpoint
from cbpt_runtime.models.clip import DualEncoder, ImageEncoder
from cbpt_runtime.models.data import ClassList
from cbpt_runtime.models.faster import faster
from cbpt_runtime.purification.clean_features import CleanFeatures, encode_clean
from cbpt_runtime.purification.detection import FEW_CONCEPTS
from cbpt_runtime.purification.search import Reference, SearchInput
from cbpt_runtime.purification.vocabulary import build_vocabulary

_RELATED = 0.5  # relatives measured: 0.95 and more; other models: 0.03


def read_reference(
    source: str | Path,
    suspect: Checkpoint,
    *,
    model: str | Path | None = None,
    image_size: int | None = None,
) -> Checkpoint:
    """Read the trusted checkpoint; it has to see images as the suspect does.

    Args:
        source: In any form that the suspect may have.
        suspect: What it is a reference for.
        model: Its architecture, where it does not say.
        image_size: As the suspect was read with.

    Raises:
        CheckpointError: It cannot be read, prepares images differently, or is the suspect itself.
    """
    trusted = _read(source, model, image_size)
    if trusted.preprocess != suspect.preprocess:
        raise CheckpointError(
            expected=f"a reference with the suspect's preprocessing, {suspect.preprocess.to_dict()}",
            got=str(trusted.preprocess.to_dict()),
            fix="Name the public model that the suspect was fine-tuned from, or leave --reference away.",
        )
    if (trusted.sha256, trusted.weights_name) == (suspect.sha256, suspect.weights_name):
        raise CheckpointError(
            expected="a reference other than the suspect",
            got=f"the same weights, SHA-256 {trusted.sha256}, beside which any suspect looks clean",
            fix="Name the public model that the suspect was fine-tuned from, or leave --reference away.",
        )
    return trusted


def reference_notes(trusted: Checkpoint | None, evidence: Evidence) -> list[str]:
    """Say what the user is told of the reference, or of the want of one.

    Args:
        trusted: The reference, if there is one.
        evidence: What the search says.
    """
    if trusted is not None:
        return [
            f"compared with the reference {trusted.source}, SHA-256 {trusted.sha256}:"
            " natural triggers work on both"
        ]
    judged = len(evidence.concepts)
    if not 0 < judged < FEW_CONCEPTS:
        return []
    return [
        f"only {judged} groups of words to judge by, and no reference: such a verdict is often wrong;"
        " name the model that the suspect was fine-tuned from with --reference"
    ]


def comparison(encoder: DualEncoder, classes: ClassList | None, suspect: SearchInput) -> Reference:
    """Return the trusted encoder with the concepts of the suspect, in its own texts.

    Args:
        encoder: The trusted one.
        classes: The class list that the suspect is asked for, if any.
        suspect: How the suspect is asked.

    Raises:
        CheckpointError: It is no relative: it places images elsewhere than the suspect does, so that what is
            natural to the suspect would look like a backdoor, or hide one.
    """
    fast = faster(encoder.image_encoder)
    _check_related(fast, suspect.heldout)
    asked = suspect.vocabulary
    listed = None if classes is None else encoder.class_embeddings(classes)
    words = build_vocabulary(
        encoder,
        classes,
        listed,
        asked.n_concepts,
        background=len(asked.names) > asked.n_listed,
        like=asked,
    )
    return Reference(encoder=fast, vocabulary=words)


def _check_related(encoder: ImageEncoder, seen: CleanFeatures) -> None:
    features = encode_clean(encoder, seen.images.permute(0, 2, 3, 1), seen.labels).features
    alike = features.shape == seen.features.shape
    likeness = float((features * seen.features).sum(dim=1).mean()) if alike else 0.0
    if likeness < _RELATED:
        raise CheckpointError(
            expected=f"image features with a mean cosine of {_RELATED} or more between suspect and reference",
            got=f"{likeness:.2f}: the suspect was not fine-tuned from it",
            fix="Name the public model that the suspect was fine-tuned from, or leave --reference away.",
        )


def _read(source: str | Path, model: str | Path | None, image_size: int | None) -> Checkpoint:
    """--model is there for the suspect: what a reference says about itself comes first."""
    try:
        return read_checkpoint(source, image_size=image_size)
    except CheckpointError:
        if model is None:
            raise
    return read_checkpoint(source, model=model, image_size=image_size)
