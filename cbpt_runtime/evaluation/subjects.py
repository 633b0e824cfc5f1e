"""A bundle or a checkpoint as something that names the classes of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

from cbpt_runtime import heads
from cbpt_runtime.artifacts.names import is_file
from cbpt_runtime.bundle import MANIFEST, Bundle
from cbpt_runtime.classifier import ZeroShotClassifier
from cbpt_runtime.errors import ClassListError, ConfigError
from cbpt_runtime.evaluation.detectors import Detector, bdetclip
from cbpt_runtime.models.data import ClassList, class_index, draw_clean_split
from cbpt_runtime.models.preprocess import Preprocess
from cbpt_runtime.trust import ANYONE, Trust, open_bundle, refuse_untrusted

_IMAGES_PER_CLASS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Called:
    """What is said about a batch of images; see `results.Measured`."""

    before: Int[np.ndarray, " batch"]
    after: Int[np.ndarray, " batch"] | None = None
    alarm: Float[np.ndarray, " batch"] | None = None


Call = Callable[[UInt8[np.ndarray, "batch height width 3"]], Called]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is evaluated.

    Attributes:
        source: Path of a bundle, or what names a checkpoint.
        kind: 'bundle' or 'checkpoint'.
        digest: SHA-256 of the bundle's manifest or of the checkpoint's weights.
        class_names: In the order of the class indices.
        preprocess: How an image becomes the model's pixels.
        verdict: Of a bundle.
        suspects: Names of a bundle's suspected targets.
        call: From uint8 RGB images at the model's size to classes.
        encoder: 'untouched', or what a method made of the image tower of a bundle.
        detector: What the alarm of `call` is: 'alarm' of a bundle with suspects, 'bdetclip', or None.
        class_folders: Names of the classes' image folders, where they may be others than the classes'.
        notes: What was adapted while reading a checkpoint.
    """

    source: str
    kind: str
    digest: str
    class_names: tuple[str, ...]
    preprocess: Preprocess
    call: Call
    verdict: str | None = None
    suspects: tuple[str, ...] = ()
    encoder: str = "untouched"
    detector: str | None = None
    class_folders: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def find_target(self, target: str) -> int:
        """Index of a class by its name; case, '_' and ' ' make no difference.

        Raises:
            ClassListError: No such class; the text lists them.
        """
        return class_index(self.class_names, target, where=self.source)


def open_subjects(
    sources: Sequence[Bundle | str | Path],
    *,
    classes: ClassList | None = None,
    model: str | Path | None = None,
    image_size: int | None = None,
    device: str = "auto",
    detector: Detector | None = None,
    trust: Trust = ANYONE,
    images: Path | None = None,
) -> list[Subject]:
    """Open bundles and checkpoints that share one class list.

    Args:
        sources: Bundles, their folders, or checkpoints in any form `read_checkpoint` knows.
        classes: Class list of the checkpoints; that of the first bundle if None.
        model: Architecture of checkpoints that do not say.
        image_size: Side of the input of checkpoints, instead of their configuration's.
        device: 'auto', 'cpu' or 'cuda'.
        detector: A test-time detector for the checkpoints.
        trust: What every source given by its path has to show; checkpoints can show nothing.
        images: Clean labelled images, which tell GELU from QuickGELU where a checkpoint does not say.

    Raises:
        BundleError: A bundle is damaged.
        CheckpointError: A checkpoint cannot be used.
        ClassListError: The class lists differ.
        ConfigError: A checkpoint without any class list, or a detector without a checkpoint.
        TrustError: A source is not a trusted bundle.
    """
    opened = [_open_if_bundle(source, trust) for source in sources]
    lists = [_class_list(item) for item in opened if isinstance(item, Bundle)]
    shared = classes if classes is not None else next(iter(lists), None)
    if shared is None:
        raise ConfigError(
            expected="a bundle folder, or a class list for a checkpoint",
            got=f"{opened[0]} and no class list",
            fix="Give the folder that `cbpt-runtime purify --output` wrote, or a class list with --classes.",
        )
    if detector is not None and all(isinstance(item, Bundle) for item in opened):
        raise ConfigError(
            expected=f"the suspect checkpoint, whose text tower {detector} needs",
            got="bundles alone, which hold none",
            fix="Give the checkpoint, too (with a bundle beside it the two are compared).",
        )
    for item, own in zip((item for item in opened if isinstance(item, Bundle)), lists, strict=True):
        if own.names != shared.names:
            raise ClassListError(
                expected="one class list for everything in a table",
                got=f"other classes in {item.path}",
                fix="Evaluate bundles of different classes one by one.",
            )
    return [
        _bundle_subject(item, device)
        if isinstance(item, Bundle)
        else _checkpoint_subject(item, shared, model, image_size, device, detector, images)
        for item in opened
    ]


def _open_if_bundle(source: Bundle | str | Path, trust: Trust) -> Bundle | str | Path:
    if isinstance(source, Bundle):
        return source
    if is_file(Path(source) / MANIFEST):
        return open_bundle(source, trust)
    refuse_untrusted(source, trust)
    return source


def _class_list(bundle: Bundle) -> ClassList:
    groups = bundle.manifest["classes"]["templates"]
    return ClassList(
        names=bundle.class_names,
        templates=tuple(tuple(group) for group in groups),
        folders=bundle.class_folders,
    )


def _bundle_subject(bundle: Bundle, device: str) -> Subject:
    classifier = ZeroShotClassifier.from_bundle(bundle, device)

    def call(images: UInt8[np.ndarray, "batch height width 3"]) -> Called:
        prediction = classifier.predict(images)
        return Called(
            before=prediction.reference_logits.argmax(axis=1), after=prediction.labels, alarm=prediction.alarm
        )

    return Subject(
        source=str(bundle.path),
        kind="bundle",
        digest=bundle.digest,
        class_names=bundle.class_names,
        preprocess=bundle.preprocess,
        call=call,
        verdict=bundle.verdict,
        suspects=tuple(str(suspect["name"]) for suspect in bundle.suspects),
        encoder=bundle.encoder,
        detector="alarm" if bundle.suspects else None,
        class_folders=bundle.class_folders,
    )


def _checkpoint_subject(
    source: str | Path,
    classes: ClassList,
    model: str | Path | None,
    image_size: int | None,
    device: str,
    detector: Detector | None,
    images: Path | None,
) -> Subject:
    from cbpt_runtime.models.activation import settle_activation
    from cbpt_runtime.models.checkpoint import read_checkpoint
    from cbpt_runtime.models.clip import load_dual_encoder, resolve_device
    from cbpt_runtime.models.prompt_tokens import prompt_notes

    checkpoint = read_checkpoint(source, model=model, image_size=image_size)
    if checkpoint.activation_is_guessed and images is not None:
        few = draw_clean_split(
            images,
            classes,
            checkpoint.preprocess,
            shots=_IMAGES_PER_CLASS,
            heldout_shots=0,
            skip_unreadable=True,
        )
        checkpoint = settle_activation(checkpoint, classes, few.tune_images, few.tune_labels, device=device)
    encoder = load_dual_encoder(checkpoint, device=str(resolve_device(device)))
    notes = prompt_notes(classes, encoder.tokenizer)
    head = encoder.class_embeddings(classes).cpu().numpy()
    score = None if detector is None else bdetclip(encoder, classes.names)

    def call(images: UInt8[np.ndarray, "batch height width 3"]) -> Called:
        batch = torch.from_numpy(np.ascontiguousarray(images)).to(encoder.device)
        with torch.inference_mode():
            features = encoder.encode_images(batch.permute(0, 3, 1, 2).float().div(255)).cpu().numpy()
        logits = heads.logits(features, head, encoder.logit_scale, encoder.logit_bias)
        return Called(before=logits.argmax(axis=1), alarm=None if score is None else score(features))

    return Subject(
        source=str(source),
        kind="checkpoint",
        digest=checkpoint.sha256,
        class_names=classes.names,
        preprocess=checkpoint.preprocess,
        call=call,
        detector=detector,
        class_folders=classes.folders,
        notes=(*checkpoint.notes, *notes),
    )
