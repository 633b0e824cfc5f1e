"""From a suspect checkpoint on disk to a bundle on disk: what `cbpt-runtime purify` runs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cbpt_runtime.artifacts import check_output, reserved, writing
from cbpt_runtime.batch.engine import reach_cluster
from cbpt_runtime.bundle import (
    BUNDLE,
    Bundle,
    BundleContent,
    choose_clean_images,
    write_bundle,
)
from cbpt_runtime.bundle.papers import bundle_papers
from cbpt_runtime.config import read_settings
from cbpt_runtime.defenses.abd import Abd
from cbpt_runtime.defenses.defense import Defense
from cbpt_runtime.defenses.finetuning import CleanClip, Finetune
from cbpt_runtime.defenses.rvpt import Rvpt
from cbpt_runtime.errors import ConfigError
from cbpt_runtime.models.activation import UNTRIED, settle_activation
from cbpt_runtime.models.checkpoint import Checkpoint, read_checkpoint
from cbpt_runtime.models.class_lists import read_class_list
from cbpt_runtime.models.clip import DualEncoder, load_dual_encoder, resolve_device
from cbpt_runtime.models.data import ClassList, CleanSplit, draw_clean_split
from cbpt_runtime.models.labelling import draw_images, images_to_draw, is_flat, label_images
from cbpt_runtime.models.prompt_findings import PromptCheck
from cbpt_runtime.models.prompt_words import check_prompts
from cbpt_runtime.models.tokenizer import prompt_notes
from cbpt_runtime.progress import Progress, silent
from cbpt_runtime.purification.cbpt import Cbpt
from cbpt_runtime.purification.dummy_triggers import to_tensors
from cbpt_runtime.purification.method import Chain, Method, Purified, SuspectModel
from cbpt_runtime.purification.reference import read_reference, reference_notes
from cbpt_runtime.purification.stages import StageStore
from cbpt_runtime.report import bundle_report

if TYPE_CHECKING:
    from torch import Tensor

METHODS: dict[str, type[Cbpt] | type[Defense]] = {
    method.name: method for method in (Cbpt, Finetune, CleanClip, Abd, Rvpt)
}
"""What `purify --method` knows, the default first."""

_PACKAGES = ("cbpt-runtime", "torch", "open_clip_torch", "numpy", "pillow", "safetensors")


def purify_checkpoint(
    checkpoint: str | Path,
    classes: str | Path | ClassList,
    images: str | Path,
    output: str | Path,
    *,
    model: str | Path | None = None,
    image_size: int | None = None,
    templates: Sequence[str] | None = None,
    shots: int = 16,
    reference: str | Path | None = None,
    method: Method | None = None,
    device: str = "auto",
    cluster: str | None = None,
    force: bool = False,
    resume: bool = False,
    keep_images: bool = True,
    skip_unreadable: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Turn a suspect checkpoint, class names and a few clean images into a purified classifier.

    Finished stages are kept in ``<output>.partial`` until the bundle stands, so that an interrupted run can
    be resumed. The bundle itself appears whole or not at all.

    Args:
        checkpoint: Path of the suspect checkpoint, an open_clip pretrained tag, or an ``hf-hub:`` id.
        classes: A class list, or a file with one name per line or JSON.
        images: A few clean images, one folder per class; or images without folders, of which those are used
            that the suspect's own zero-shot head is sure of.
        output: The bundle folder to make.
        model: An open_clip architecture or a config file, for checkpoints that do not say; also of a
            reference that does not.
        image_size: Side of the input, instead of the configuration's; position embeddings are resized.
        templates: Prompt templates with ``{}`` for the name; the 80 ImageNet templates otherwise. Not
            together with a `ClassList`, which has its own.
        shots: Images per class used for tuning; others of the same folder are held out for selection.
        reference: The trusted checkpoint that the suspect was fine-tuned from, with the same
            preprocessing: natural triggers work on both. Not with a method that does not search.
        method: How to purify, `Cbpt()` if None; its seed also draws the images. A defence that tunes the
            image tower looks for no target, and the verdict is 'unknown'; `Chain(first=CleanClip(),
            then=Cbpt())` purifies the tuned model after it.
        device: 'auto', 'cpu' or 'cuda'; the search takes all of its kind.
        cluster: Address of a Ray cluster to search on; this machine when None, and with a method that does
            not search.
        force: Replace a bundle that is already at ``output``.
        resume: Continue from the finished stages of an interrupted run with the same input.
        keep_images: Put some of the clean images into the bundle and its report, for exports to calibrate and
            measure on, at most 640 and 96 MiB.
        skip_unreadable: Do without clean images that cannot be read; the notes count and name them.
        progress: Told how far the work is.

    Returns:
        The bundle.

    Raises:
        InputError: Something given is wrong; raised before the work starts wherever it can be known.
        PurificationError: Purification did not reach a usable result.
    """
    output = Path(output)
    check_output(output, BUNDLE, force=force)
    method = Cbpt() if method is None else method
    for option, value in (("--reference", reference), ("--cluster", cluster)):
        if value is not None and not method.is_search:
            raise ConfigError(
                expected=f"{option} with --method cbpt",
                got=f"{option} with --method {method.name}, which searches for no target",
                fix=f"Leave {option} away.",
            )
    place = resolve_device(device)
    if cluster is not None:
        reach_cluster(cluster)
    class_list = classes if isinstance(classes, ClassList) else read_class_list(classes, templates=templates)
    tell = progress or silent
    with reserved(output, BUNDLE, force=force, resume=resume) as kept:
        tell("read checkpoint", 0, 1, {})
        checkpoint_read = read_checkpoint(checkpoint, model=model, image_size=image_size)
        trusted = None
        if reference is not None:
            trusted = read_reference(reference, checkpoint_read, model=model, image_size=image_size)
        tell("read checkpoint", 1, 1, {})
        checkpoint_read, encoder, split = _encoder_and_split(
            checkpoint_read,
            Path(images),
            class_list,
            shots,
            method.seed,
            str(place),
            tell,
            skip_unreadable=skip_unreadable,
        )
        words = prompt_notes(class_list, encoder.tokenizer)
        tell("check prompts", 0, 1, {})
        prompts = check_prompts(encoder, class_list)
        tell("check prompts", 1, 1, {})

        suspect = SuspectModel(
            checkpoint=checkpoint_read,
            encoder=encoder,
            classes=class_list,
            reference=None if trusted is None else load_dual_encoder(trusted, device=str(place)),
            cluster=cluster,
        )
        stages = StageStore(kept, _fingerprint(suspect, trusted, split, method))
        with writing(kept):  # nothing but the stages is written
            result = method.run(suspect, split, progress=progress, stages=stages)
        known = reference_notes(trusted, result.evidence)
        notes = [*checkpoint_read.notes, *split.notes, *words, *prompts.notes(), *known]
        content = _content(suspect, split, method, result, prompts, shots=shots, notes=notes)
        if keep_images:
            content = replace(content, images=choose_clean_images(split))
        return write_bundle(
            output,
            content=content,
            force=force,
            report=lambda bundle: _report(bundle, split, keep_images, str(place)),
            papers=bundle_papers,
        )


def _encoder_and_split(
    suspect: Checkpoint,
    images: Path,
    classes: ClassList,
    shots: int,
    seed: int,
    device: str,
    tell: Progress,
    *,
    skip_unreadable: bool,
) -> tuple[Checkpoint, DualEncoder, CleanSplit]:
    """Return the suspect, its frozen model and the clean images, which it has to label where nobody has."""
    if not is_flat(images):
        split = draw_clean_split(
            images, classes, suspect.preprocess, shots=shots, seed=seed, skip_unreadable=skip_unreadable
        )
        tell("read images", 1, 1, {})
        suspect = settle_activation(
            suspect,
            classes,
            np.concatenate([split.tune_images, split.heldout_images]),
            np.concatenate([split.tune_labels, split.heldout_labels]),
            device=device,
        )
        return suspect, load_dual_encoder(suspect, device=device), split
    count = images_to_draw(len(classes.names), shots=shots)
    drawn = draw_images(images, suspect.preprocess, count=count, seed=seed)
    tell("read images", 1, 1, {})
    encoder = load_dual_encoder(suspect, device=device)
    split = label_images(drawn, encoder, classes, shots=shots, seed=seed)
    tell("label images", 1, 1, {})
    if suspect.activation_is_guessed:
        suspect = replace(suspect, notes=(*suspect.notes, UNTRIED))
    return suspect, encoder, split


def _report(bundle: Bundle, split: CleanSplit, keep_images: bool, device: str) -> str:
    images, labels = split.heldout_images, split.heldout_labels
    if not len(images):
        images, labels = split.tune_images, split.tune_labels
    return bundle_report(bundle, images, labels, show_images=keep_images, device=device)


def read_method(name: str, path: str | Path | None = None, **overrides: Any) -> Method:
    """Make a method of its settings in a JSON file; overrides that are not None win.

    Raises:
        ConfigError: No such method; the file cannot be read, or has an unknown key or a bad value.
    """
    if name not in METHODS:
        raise ConfigError(
            expected="a method out of " + ", ".join(METHODS), got=name, fix="Choose one of them."
        )
    return METHODS[name].from_dict(read_settings(path, **overrides))


def _fingerprint(suspect: SuspectModel, trusted: Checkpoint | None, split: CleanSplit, method: Method) -> str:
    """SHA-256 over everything the stages depend on."""
    checkpoint = suspect.checkpoint
    parts: dict[str, Any] = {
        "checkpoint": checkpoint.sha256,
        "weights": checkpoint.weights_name,
        "model": checkpoint.model_config,
        "preprocess": checkpoint.preprocess.to_dict(),
        "classes": asdict(suspect.classes),
        "split": split.digest,
        "method": _described(method),
        "version": version("cbpt-runtime"),
    }
    if trusted is not None:
        parts["reference"] = [trusted.sha256, trusted.weights_name, trusted.model_config]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _described(method: Method) -> dict[str, Any]:
    """Return what a bundle says of how it was made; for a chain the settings of both."""
    described = {
        "name": method.name,
        "config": method.to_dict(),
        "seed": method.seed,
        "parameterization": method.parameterization,
    }
    return described | ({"defense_config": method.first.to_dict()} if isinstance(method, Chain) else {})


def _content(
    suspect: SuspectModel,
    split: CleanSplit,
    method: Method,
    result: Purified,
    prompts: PromptCheck,
    *,
    shots: int,
    notes: Sequence[str],
) -> BundleContent:
    about = {
        **_described(method),
        "shots": shots,
        "notes": list(notes),
        "tune_images": len(split.tune_images),
        "heldout_images": len(split.heldout_images),
        "split_digest": split.digest,
        "labelled_by": split.labelled_by,
    }
    if result.tower != "untouched":
        about |= {"encoder": result.tower, "trainable_parameters": result.trainable_parameters}
    classes, encoder = suspect.classes, result.encoder
    return BundleContent(
        verdict=result.verdict,
        model=_model(suspect.checkpoint),
        class_names=classes.names,
        templates=classes.templates,
        class_folders=classes.folders,
        method=about,
        suspects=result.suspects,
        metrics=result.metrics,
        stage_seconds=result.stage_seconds,
        evidence=result.evidence,
        prompts=prompts,
        alarm=None if result.alarm is None else result.alarm.to_dict(),
        versions={package: version(package) for package in _PACKAGES},
        class_embeddings=_array(result.class_embeddings),
        reference_embeddings=_array(result.reference_embeddings),
        logit_scale=encoder.logit_scale,
        logit_bias=encoder.logit_bias,
        contexts=None if result.contexts is None else _array(result.contexts),
        encoder=_arrays(encoder.image_tower_state()),
        triggers=_arrays(to_tensors(result.triggers)),
    )


def _model(suspect: Checkpoint) -> dict[str, Any]:
    kinds = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in suspect.state_dict.values())
    return {
        "config": suspect.model_config,
        "preprocess": suspect.preprocess.to_dict(),
        "source": suspect.source,
        "format": suspect.format,
        "sha256": suspect.sha256,
        "size_bytes": suspect.size_bytes,
        "dtype": kinds.most_common(1)[0][0],
    }


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: _array(tensor) for name, tensor in tensors.items()}
