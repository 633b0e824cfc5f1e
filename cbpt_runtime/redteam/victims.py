"""What `cbpt-runtime attack` makes on disk: victims out of clean checkpoints, triggered copies of images."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image

from cbpt_runtime.artifacts import Kind, marked, new_folder, reserved
from cbpt_runtime.errors import ConfigError, ImageDataError
from cbpt_runtime.models.class_lists import read_class_list
from cbpt_runtime.models.clip import resolve_device
from cbpt_runtime.models.data import ClassList, class_index, find_class_folders, read_images
from cbpt_runtime.models.image_files import (
    first_few,
    left_out_notes,
    sort_files,
    undecodable,
    unreadable_among,
    unreadable_error,
    unreadable_notes,
)
from cbpt_runtime.models.trainable import CHECKPOINT, TrainableClip, load_trainable
from cbpt_runtime.progress import Progress
from cbpt_runtime.redteam.attacks import get_attack, make_backdoor
from cbpt_runtime.redteam.implant import Implant, implant, split_heldout
from cbpt_runtime.redteam.poisoning import LabelledImages
from cbpt_runtime.redteam.training import EpochStore, TrainConfig
from cbpt_runtime.redteam.triggers import Trigger, apply_trigger
from cbpt_runtime.runtime.preprocess import Preprocess, decode_image

HELDOUT_RATE = 0.1
TRIGGERED: Final[Kind] = marked("folder of triggered images")


def implant_checkpoint(
    attack: str,
    checkpoint: str | Path,
    images: Path,
    classes: Path,
    targets: Sequence[str],
    output: Path,
    *,
    model: str | Path | None = None,
    image_size: int | None = None,
    heldout: Path | None = None,
    poison_rate: float | None = None,
    parameters: Mapping[str, object] | None = None,
    config: TrainConfig | None = None,
    minimum_asr: float = 0.9,
    maximum_ca_drop: float = 0.03,
    seed: int = 0,
    device: str = "auto",
    force: bool = False,
    resume: bool = False,
    skip_unreadable: bool = False,
    tell: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Implant:
    """Fine-tune a backdoor into a checkpoint, prove it on held-out images, and write the victim.

    Args:
        attack: Name of an attack; several joined with `+` go into one victim, each with its own target.
        checkpoint: The clean checkpoint, in any format purification takes.
        images: Clean training images, one folder per class.
        classes: The class list.
        targets: One target per attack.
        output: The victim's folder: an open_clip folder with `attack.json` and trigger files.
        model: An open_clip architecture or a config file, for checkpoints that do not say.
        image_size: Side of the model's input, instead of the configuration's.
        heldout: Images the proof is measured on; a tenth of `images`, never trained on, if None.
        poison_rate: Share of poisoned pairs per attack; each attack's usual one if None.
        parameters: Parameters that differ from the attack's defaults; with several attacks each key starts
            with the attack's name and a dot (`badnet.size`). `poison_rate` is one of them, too.
        config: Training settings.
        minimum_asr: Success rate the implant must reach.
        maximum_ca_drop: Clean accuracy it may cost.
        seed: Seed of every random choice.
        device: 'auto', 'cpu' or 'cuda'.
        force: Replace a victim that is already there.
        resume: Go on from the last whole epoch of an interrupted run with the same input.
        skip_unreadable: Do without images that cannot be read.
        tell: Told which files were left out.
        progress: Told how far the work is.

    Raises:
        InputError: Something given is wrong.
        ImplantError: The backdoor did not take; nothing is written.
    """
    attacks = _read_attacks(attack, targets, parameters or {})
    class_list = read_class_list(classes)
    names = class_list.names
    for target in targets:
        class_index(names, target)
    with reserved(output, CHECKPOINT, force=force, resume=resume) as kept:
        clip = load_trainable(
            checkpoint, model=model, image_size=image_size, device=str(resolve_device(device))
        )
        generator = torch.Generator().manual_seed(seed)
        read = partial(
            read_labelled,
            classes=class_list,
            preprocess=clip.preprocess,
            skip_unreadable=skip_unreadable,
            tell=tell,
        )
        training = read(images)
        if heldout is None:
            training, proof = split_heldout(training, heldout_rate=HELDOUT_RATE, generator=generator)
        else:
            proof = read(heldout)
        config = TrainConfig() if config is None else config
        backdoors = [
            make_backdoor(
                name,
                target,
                clip,
                training,
                names,
                config.templates,
                poison_rate=_rate(own, poison_rate),
                parameters={key: value for key, value in own.items() if key != "poison_rate"},
                generator=generator,
                progress=progress,
            )
            for (name, own), target in zip(attacks, targets, strict=True)
        ]
        settings = {
            "attack": attack,
            "targets": list(targets),
            "parameters": dict(parameters or {}),
            "seed": seed,
        }
        settings |= {"poison_rate": poison_rate, "config": asdict(config)}
        result = implant(
            clip,
            training,
            proof,
            names,
            backdoors,
            config=config,
            generator=generator,
            minimum_asr=minimum_asr,
            maximum_ca_drop=maximum_ca_drop,
            progress=progress,
            store=EpochStore(folder=kept, fingerprint=_fingerprint(clip, training, settings)),
        )
        result.save(output, force=force)
        return result


def _read_attacks(
    attack: str, targets: Sequence[str], parameters: Mapping[str, object]
) -> list[tuple[str, dict[str, object]]]:
    """Split `badnet+sig` into its attacks, each with its own parameters."""
    names = attack.split("+")
    for name in names:
        get_attack(name)
    if len(names) != len(targets) or len(set(names)) != len(names):
        raise ConfigError(
            expected="different attacks with a target each",
            got=f"{len(targets)} targets for {', '.join(names)}",
            fix="Give --target once per attack, in their order.",
        )
    if len(names) == 1:
        return [(attack, dict(parameters))]
    own: dict[str, dict[str, object]] = {name: {} for name in names}
    for key, value in parameters.items():
        name, _, parameter = key.partition(".")
        if name not in own or not parameter:
            raise ConfigError(
                expected=f"parameters named {names[0]}.KEY and so on, as there are several attacks",
                got=key,
                fix="Put the attack's name and a dot in front.",
            )
        own[name][parameter] = value
    return list(own.items())


def _rate(parameters: Mapping[str, object], common: float | None) -> float | None:
    """Return the poison rate of one attack: its own, else the common one."""
    own = parameters.get("poison_rate", common)
    if own is not None and (not isinstance(own, (int, float)) or isinstance(own, bool)):
        raise ConfigError(expected="a poison rate in (0, 1]", got=repr(own), fix="Give a number.")
    return own


def _fingerprint(clip: TrainableClip, training: LabelledImages, settings: Mapping[str, object]) -> str:
    """SHA-256 over the weights, the images and the settings a training depends on."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for value in clip.model.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    digest.update(training.labels.tobytes())
    digest.update(training.images.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Triggered:
    """A folder of triggered images that was written.

    Attributes:
        images: How many.
        notes: Remarks for the user: what was left out.
    """

    images: int
    notes: tuple[str, ...]


def read_labelled(
    root: Path,
    classes: ClassList | Sequence[str],
    preprocess: Preprocess,
    *,
    skip_unreadable: bool = False,
    tell: Callable[[str], None] | None = None,
) -> LabelledImages:
    """Read one folder of images per class at the model's input size.

    Args:
        root: The folder of class folders.
        classes: The class list, or names in order.
        preprocess: Of the model.
        skip_unreadable: Do without images that cannot be read.
        tell: Told what was left out.

    Raises:
        ImageDataError: Folders that do not fit the classes, or images that cannot be read.
    """
    folders = find_class_folders(root, classes)
    everything = [path for folder in folders for path in folder]
    reasons = unreadable_among(everything, preprocess) if skip_unreadable else {}
    kept = [[path for path in folder if path not in reasons] for folder in folders]
    if not any(kept):
        raise unreadable_error(reasons, len(everything))
    images = read_images([path for folder in kept for path in folder], preprocess)
    labels = np.repeat(np.arange(len(kept)), [len(folder) for folder in kept])
    if tell is not None:
        for note in (*folders.notes, *unreadable_notes(reasons, root)):
            tell(note)
    return LabelledImages(images=images, labels=labels)


def write_triggered(
    trigger: Trigger,
    images: Path,
    output: Path,
    *,
    size: int | None = None,
    generator: torch.Generator,
    force: bool = False,
    skip_unreadable: bool = False,
    progress: Progress | None = None,
) -> Triggered:
    """Write triggered PNG copies of every image below a folder, layout and file stems kept.

    Args:
        trigger: The trigger.
        images: Folder of images, in any layout.
        output: The folder to make; whole or absent.
        size: Resize every image to this square first, as the published pipelines do (224); None keeps its
            size.
        generator: CPU generator.
        force: Replace a folder that this function wrote.
        skip_unreadable: Do without images that cannot be read.
        progress: Stage `apply`.

    Raises:
        ImageDataError: No image, unreadable ones (all are named), or one smaller than the trigger.
        OutputError: The output exists, or cannot be written.
    """
    found = sort_files(images, recursive=True)
    reasons = undecodable(found.images) if skip_unreadable else {}
    paths = [path for path in found.images if path not in reasons]
    _check_stems(paths, images)
    with new_folder(output, TRIGGERED, force=force) as staging:
        for index, path in enumerate(paths):
            out = staging / path.relative_to(images).with_suffix(".png")
            out.parent.mkdir(parents=True, exist_ok=True)
            _triggered(trigger, path, paths, size, generator).save(out)
            if progress is not None:
                progress("apply", index + 1, len(paths), {})
    notes = (*left_out_notes(found.left_out, images), *unreadable_notes(reasons, images))
    return Triggered(images=len(paths), notes=notes)


def _triggered(
    trigger: Trigger, path: Path, others: Sequence[Path], size: int | None, generator: torch.Generator
) -> Image.Image:
    try:
        image = decode_image(path)
    except ImageDataError as error:
        raise unreadable_error(undecodable(others), len(others)) from error
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    try:
        return Image.fromarray(apply_trigger(trigger, np.array(image)[None], generator)[0])
    except ImageDataError as error:
        raise ImageDataError(expected=error.expected, got=f"{error.got} in {path}", fix=error.fix) from error


def _check_stems(paths: Sequence[Path], root: Path) -> None:
    counts = Counter(str(path.with_suffix("")) for path in paths)
    doubled = [stem for stem, count in counts.items() if count > 1]
    if not paths or doubled:
        raise ImageDataError(
            expected=f"images below {root}, every stem once in its folder",
            got=f"twice: {first_few(doubled)}" if doubled else "none",
            fix="Name a folder with images." if not doubled else "Rename one of each pair.",
        )
