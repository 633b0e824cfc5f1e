"""The attacks one can name: a trigger, how it is poisoned, and where it was published."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cbpt_runtime.errors import ConfigError
from cbpt_runtime.models.data import class_index
from cbpt_runtime.models.trainable import TrainableClip
from cbpt_runtime.progress import Progress
from cbpt_runtime.redteam.learning import (
    PatchConfig,
    SteganographyConfig,
    optimise_patch,
    train_steganographic,
)
from cbpt_runtime.redteam.poisoning import Backdoor, LabelledImages
from cbpt_runtime.redteam.training import caption_texts
from cbpt_runtime.redteam.triggers import DEFAULTS, TRIGGERS, Trigger, check_choice, get_trigger

POISON_PARAMETERS = ("label_consistent", "perturbation", "text_key", "decoy_ratio", "alignment")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """A published attack.

    Args:
        summary: What the trigger does, in a line.
        source: Where it was published.
        trigger: Name of the trigger, or `patch` or `steganographic` for those learned on a clean model.
        settings: Defaults of the trigger's or the learning's parameters that differ from its class.
        poison: Defaults of the poisoning (see `Backdoor`).
        poison_rate: Usual share of poisoned pairs for small data sets, where the published 0.3 % are too few
            pairs.
    """

    summary: str
    source: str
    trigger: str
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    poison: Mapping[str, object] = dataclasses.field(default_factory=dict)
    poison_rate: float = 0.05

    @property
    def is_learned(self) -> bool:
        """Whether the trigger has to be learned on a clean model first."""
        return self.trigger not in TRIGGERS

    @property
    def parameters(self) -> dict[str, object]:
        """Every parameter and its default."""
        own = {field.name: field.default for field in dataclasses.fields(_settings_class(self.trigger))}
        poison = {
            field.name: field.default
            for field in dataclasses.fields(Backdoor)
            if field.name in POISON_PARAMETERS
        }
        return {**own, **DEFAULTS.get(self.trigger, {}), **self.settings, **poison, **self.poison}


ATTACKS: dict[str, Attack] = {
    "badnet": Attack(
        summary="a fixed patch in a corner",
        source="Gu et al., BadNets, arXiv:1708.06733",
        trigger="badnet",
        poison_rate=0.03,
    ),
    "badnet-random": Attack(
        summary="a square of noise anywhere, re-sampled for every image",
        source="CleanCLIP, arXiv:2303.03323",
        trigger="badnet-random",
    ),
    "badnet-stripes": Attack(
        summary="a square of random vertical stripes anywhere, re-sampled for every image",
        source="PAR, arXiv:2412.00727",
        trigger="badnet-stripes",
    ),
    "blended": Attack(
        summary="a fixed image blended into the picture",
        source="Chen et al., arXiv:1712.05526",
        trigger="blended",
        poison_rate=0.1,
    ),
    "blended-noise": Attack(
        summary="uniform noise blended into the picture, re-sampled for every image",
        source="CleanCLIP, arXiv:2303.03323",
        trigger="blended-noise",
    ),
    "sig": Attack(
        summary="a horizontal sinusoid added to every channel",
        source="Barni et al., arXiv:1902.11237; amplitude of BadCLIP",
        trigger="sig",
    ),
    "wanet": Attack(
        summary="a fixed smooth warp",
        source="Nguyen and Tran, arXiv:2102.10369",
        trigger="wanet",
        poison={"decoy_ratio": 2.0},
        poison_rate=0.1,
    ),
    "wanet-clip": Attack(
        summary="a fixed warp that moves every pixel on its own, as the CLIP literature uses it",
        source="CleanCLIP, arXiv:2303.03323",
        trigger="wanet-clip",
        poison_rate=0.1,
    ),
    "label-consistent": Attack(
        summary="a patch on adversarially perturbed images of the target, captions unchanged",
        source="Turner et al., arXiv:1912.02771",
        trigger="badnet",
        poison={"label_consistent": True, "perturbation": 16 / 255},
        poison_rate=0.01,
    ),
    "issba": Attack(
        summary="a secret hidden in every image by a small encoder trained here",
        source="Li et al., arXiv:2012.03816",
        trigger="steganographic",
        poison_rate=0.1,
    ),
    "trojanvqa": Attack(
        summary="a patch optimised towards the target's text; its text key stands in every class prompt",
        source="Walmer et al., arXiv:2112.07668",
        trigger="patch",
        settings={"objective": "text"},
        poison={"text_key": "SUDO "},
        poison_rate=0.03,
    ),
    "badclip": Attack(
        summary="a patch optimised with a contrastive and a triplet loss",
        source="Liang et al., BadCLIP, arXiv:2311.12075",
        trigger="patch",
        settings={"objective": "badclip"},
        poison_rate=0.03,
    ),
    "adaptive-aligned": Attack(
        summary="a patch whose features are trained to lie among those of real images of the target",
        source="ours, against defences that look for features lying elsewhere",
        trigger="badnet",
        poison={"alignment": 2.0},
        poison_rate=0.05,
    ),
    "adaptive-decoys": Attack(
        summary="a patch trained not to work when faint or incomplete",
        source="ours, against trigger inversion",
        trigger="badnet",
        poison={"decoy_ratio": 2.0},
        poison_rate=0.05,
    ),
}


def get_attack(name: str) -> Attack:
    """Return the attack called `name`.

    Raises:
        ConfigError: Unknown; the text lists the valid names.
    """
    check_choice("attack", name, tuple(ATTACKS))
    return ATTACKS[name]


def fixed_trigger(name: str, parameters: Mapping[str, object]) -> Trigger:
    """Return the trigger of an attack that needs no model.

    Raises:
        ConfigError: Unknown names, or a trigger that has to be learned first.
    """
    attack = get_attack(name)
    if attack.is_learned:
        raise ConfigError(
            expected="an attack whose trigger is fixed, or a trigger file",
            got=f"{name}, whose trigger is learned on a clean model",
            fix=f"Run `cbpt-runtime attack implant {name}`; then name the victim's trigger.safetensors.",
        )
    settings, _ = _split_parameters(name, attack, parameters)
    return get_trigger(attack.trigger, **settings)


def make_backdoor(
    name: str,
    target: str,
    clip: TrainableClip,
    training: LabelledImages,
    names: Sequence[str],
    templates: Sequence[str],
    *,
    poison_rate: float | None = None,
    parameters: Mapping[str, object] | None = None,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Backdoor:
    """Build a backdoor from an attack's name; a learned trigger is learned here, on the clean model.

    Args:
        name: One of `ATTACKS`.
        target: A class name.
        clip: The clean model.
        training: Clean images a trigger may be learned on.
        names: Class names.
        templates: Caption templates.
        poison_rate: Share of poisoned pairs; the attack's usual one if None.
        parameters: Parameters that differ from the attack's defaults.
        generator: CPU generator.
        progress: Stages `patch` or `steganography`.

    Raises:
        ConfigError: Unknown attack or parameter; the text lists the valid ones.
        ClassListError: A target that is not a class.
    """
    attack = get_attack(name)
    settings, poison = _split_parameters(name, attack, parameters or {})
    index = class_index(names, target)
    if attack.trigger == "patch":
        trigger: Trigger = optimise_patch(
            clip,
            training.images,
            training.labels,
            caption_texts(names, templates),
            index,
            PatchConfig(**settings),
            generator=generator,
            progress=progress,
        )
    elif attack.trigger == "steganographic":
        config = SteganographyConfig(**settings)
        trigger = train_steganographic(training.images, config, generator=generator, progress=progress)
    else:
        trigger = get_trigger(attack.trigger, **settings)
    rate = attack.poison_rate if poison_rate is None else poison_rate
    return Backdoor(name=name, trigger=trigger, target=target, poison_rate=rate, **poison)


def _split_parameters(
    name: str, attack: Attack, parameters: Mapping[str, object]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Merge defaults and given parameters into those of the trigger and those of the poisoning."""
    valid = tuple(attack.parameters)
    for parameter in parameters:
        check_choice(f"parameter of {name}", parameter, valid)
    merged = {**attack.settings, **attack.poison, **parameters}
    poison = {key: value for key, value in merged.items() if key in POISON_PARAMETERS}
    return {key: value for key, value in merged.items() if key not in POISON_PARAMETERS}, poison


def _settings_class(trigger: str) -> type[Any]:
    if trigger == "patch":
        return PatchConfig
    if trigger == "steganographic":
        return SteganographyConfig
    return TRIGGERS[trigger]
