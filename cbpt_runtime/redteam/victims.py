"""From a clean checkpoint on disk to a victim on disk: what `cbpt-runtime attack implant` runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from cbpt_runtime.artifacts import reserved
from cbpt_runtime.errors import ConfigError
from cbpt_runtime.models.class_lists import read_class_list
from cbpt_runtime.models.clip import resolve_device
from cbpt_runtime.models.data import class_index
from cbpt_runtime.models.trainable import CHECKPOINT, TrainableClip, load_trainable
from cbpt_runtime.progress import Progress
from cbpt_runtime.redteam.attacks import get_attack, make_backdoor
from cbpt_runtime.redteam.folders import read_labelled
from cbpt_runtime.redteam.implant import Implant, implant, split_heldout
from cbpt_runtime.redteam.poisoning import LabelledImages
from cbpt_runtime.redteam.training import EpochStore, TrainConfig

HELDOUT_RATE = 0.1


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
