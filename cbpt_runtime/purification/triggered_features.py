"""Features of clean images under the dummy triggers: the attack as a defender can rehearse it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cbpt_runtime.models.clip import ImageEncoder
from cbpt_runtime.purification.augmentation import augment
from cbpt_runtime.purification.clean_features import CleanFeatures, DefenderData, with_synthetic_features
from cbpt_runtime.purification.dummy_triggers import DummyTrigger
from cbpt_runtime.purification.inversion import encode_triggered, margins
from cbpt_runtime.purification.targets import Target
from cbpt_runtime.purification.tuning import HeadCheck, TuningData

STRENGTHS = (1.0, 0.75, 0.5, 0.35)
"""Shares of the way from the clean to the dummy-triggered image; attackers' triggers are not all strong.

Each goes with its own augmentation of the tune images: the first with the images as they are.
"""

WORKING_SUCCESS = 0.9
"""Held-out success at full strength from which on a dummy trigger is taken for like the attacker's."""


MOST_REHEARSED = 2000
"""Images to tune on, and held-out ones, that dummy triggers are put on; more cost, and tell little more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TriggeredFeatures:
    """One dummy trigger of one suspected class at one strength.

    Attributes:
        target: Class index.
        tune: Features of tune images under it.
        tune_labels: Their own classes.
        heldout: Features of held-out images under it.
        heldout_labels: Their own classes.
    """

    target: int
    tune: Float[Tensor, "batch dim"]
    tune_labels: Int[Tensor, " batch"]
    heldout: Float[Tensor, "heldout dim"]
    heldout_labels: Int[Tensor, " heldout"]


def compute_triggered_features(
    defender: DefenderData, targets: Sequence[Target], triggers: Sequence[DummyTrigger], seed: int
) -> list[TriggeredFeatures]:
    """Encode images under the dummy triggers that work (the best if none does), at every strength.

    Of many classes a part of the images, as many of one class as of another.
    """
    generator = torch.Generator().manual_seed(seed)
    tune, heldout = _drawn(defender.tune, generator), _drawn(defender.heldout, generator)
    return [
        triggered_set
        for target in targets
        for trigger in _working(defender, heldout, target, triggers)
        for triggered_set in _at_all_strengths(defender.encoder, tune, heldout, trigger, seed)
    ]


def _drawn(clean: CleanFeatures, generator: torch.Generator) -> CleanFeatures:
    """Return all images if they are few; else as many of each class as fit, drawn at random."""
    if len(clean.labels) <= MOST_REHEARSED:
        return clean
    order = torch.randperm(len(clean.labels), generator=generator)
    labels = clean.labels.cpu()[order]
    by_class, counts = labels.argsort(stable=True), labels.bincount()
    place = torch.arange(len(labels)) - (counts.cumsum(dim=0) - counts)[labels[by_class]]  # in its class
    return clean.part(order[by_class[place.argsort(stable=True)[:MOST_REHEARSED]]].sort().values)


def _working(
    defender: DefenderData, heldout: CleanFeatures, target: Target, triggers: Sequence[DummyTrigger]
) -> list[DummyTrigger]:
    """Return the dummy triggers that take held-out images to the target's text rather than to a class."""
    head = defender.texts.clone()
    head[target.index] = target.text
    own = [trigger for trigger in triggers if trigger.target == target.index]
    success = [
        success_rate(
            encode_triggered(defender.encoder, trigger.apply, heldout.images),
            heldout.labels,
            target.index,
            head,
        )
        for trigger in own
    ]
    least = min(WORKING_SUCCESS, max(success))
    return [trigger for trigger, rate in zip(own, success, strict=True) if rate >= least]


def _at_all_strengths(
    encoder: ImageEncoder, tune: CleanFeatures, heldout: CleanFeatures, trigger: DummyTrigger, seed: int
) -> list[TriggeredFeatures]:
    generator = torch.Generator().manual_seed(seed)
    triggered_sets = []
    for number, strength in enumerate(STRENGTHS):
        seen = tune.images
        if number:
            seen = torch.cat([(part * 255).round().byte() for part in augment(seen, number, generator)])
        apply = partial(trigger.apply, strength=strength)
        triggered_sets.append(
            TriggeredFeatures(
                target=trigger.target,
                tune=encode_triggered(encoder, apply, seen),
                tune_labels=tune.labels,
                heldout=encode_triggered(encoder, apply, heldout.images),
                heldout_labels=heldout.labels,
            )
        )
    return triggered_sets


def success_rate(
    features: Float[Tensor, "batch dim"],
    labels: Int[Tensor, " batch"],
    target: int,
    head: Float[Tensor, "classes dim"],
) -> float:
    """Share of the images of other classes that the head calls the suspected class."""
    others = labels != target
    return float((margins(features[others] @ head.T, target) > 0).float().mean())


def strongest_success(
    target: int, triggered_sets: Sequence[TriggeredFeatures], head: Float[Tensor, "classes dim"]
) -> float:
    """Largest success of a dummy trigger of the class, on held-out images of other classes."""
    return max(
        success_rate(one.heldout, one.heldout_labels, target, head)
        for one in triggered_sets
        if one.target == target
    )


def check_head(
    defender: DefenderData,
    targets: Sequence[int],
    triggered_sets: Sequence[TriggeredFeatures],
    head: Float[Tensor, "classes dim"],
    goal: float,
) -> HeadCheck:
    """Judge a head on held-out images.

    The floor of a class is the share of clean images of other classes that are called the class.

    Returns:
        'false_positives' where the floor of a suspected class is higher than the reference head has it;
        'trigger_survives' where a dummy trigger succeeds more often than the goal and than the floor; else
        'accepted'.
    """
    clean = defender.heldout
    floors = {target: success_rate(clean.features, clean.labels, target, head) for target in targets}
    if any(
        floor > success_rate(clean.features, clean.labels, target, defender.texts)
        for target, floor in floors.items()
    ):
        return "false_positives"
    if any(
        strongest_success(target, triggered_sets, head) > max(goal, floor) for target, floor in floors.items()
    ):
        return "trigger_survives"
    return "accepted"


def directions(
    targets: Sequence[int], triggered_sets: Sequence[TriggeredFeatures]
) -> Float[Tensor, "targets dim"]:
    """For each suspected class the leading direction of its dummy-triggered features, made orthonormal."""
    leading = []
    for target in targets:
        features = torch.cat(
            [triggered_set.tune for triggered_set in triggered_sets if triggered_set.target == target]
        )
        leading.append(torch.linalg.eigh(features.T @ features).eigenvectors[:, -1])
    basis: Tensor = torch.linalg.qr(torch.stack(leading, dim=1)).Q
    return basis.T


def of_other_classes(
    triggered_sets: Sequence[TriggeredFeatures],
) -> tuple[Float[Tensor, "triggered dim"], Int[Tensor, " triggered"], Int[Tensor, " triggered"]]:
    """Tune features under every dummy trigger, without images of its own suspected class.

    Returns:
        Features, the images' own classes, and the suspected class of each one's trigger.
    """
    kept = [(one, one.tune_labels != one.target) for one in triggered_sets]
    return (
        torch.cat([one.tune[others] for one, others in kept]),
        torch.cat([one.tune_labels[others] for one, others in kept]),
        torch.cat([torch.full_like(one.tune_labels[others], one.target) for one, others in kept]),
    )


def tuning_data(
    defender: DefenderData, targets: Sequence[Target], triggered_sets: Sequence[TriggeredFeatures], seed: int
) -> TuningData:
    """All that the head is tuned on; the seed is for the synthetic features of the targets' classes.

    An image under a trigger for a target that is not on the list has to leave whatever class it is called.
    """
    classes = [target.index for target in targets]
    clean = with_synthetic_features(defender.augmented, defender.tune, classes, seed)
    triggered, own_labels, triggered_targets = of_other_classes(triggered_sets)
    elsewhere = [target.index for target in targets if not target.on_list]
    called = (triggered @ defender.texts.T).scatter(1, own_labels.unsqueeze(1), -torch.inf).argmax(dim=1)
    unlisted = torch.isin(triggered_targets, torch.tensor(elsewhere, device=own_labels.device))
    return TuningData(
        reference=defender.texts,
        scale=defender.scale,
        clean=clean.features,
        clean_labels=clean.labels,
        triggered=triggered,
        triggered_labels=own_labels,
        triggered_targets=torch.where(unlisted, called, triggered_targets),
        targets=tuple(classes),
        directions=directions(classes, triggered_sets),
    )
