"""Features of clean images under the dummy triggers: the attack as a defender can rehearse it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cbpt_runtime.purification.augmentation import view
from cbpt_runtime.purification.clean_features import Clean, Evidence, with_imagined
from cbpt_runtime.purification.inversion import margins, triggered_features
from cbpt_runtime.purification.targets import Target
from cbpt_runtime.purification.trigger_families import REFINE_FAMILIES, Parameters
from cbpt_runtime.purification.tuning import TuningData, Verdict

STRENGTHS = (1.0, 0.75, 0.5, 0.35)
"""Shares of the way from the clean to the dummy-triggered image; attackers' triggers are not all strong.

Each is rehearsed on a view of the tune images of its own: the first on the images as they are.
"""

WORKING_SUCCESS = 0.9
"""Held-out success at full strength from which on a dummy trigger is taken for like the attacker's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """One dummy trigger of one suspected class at one strength.

    Attributes:
        suspect: Class index.
        tune: Features of the tune images under it.
        heldout: Features of the held-out images under it.
    """

    suspect: int
    tune: Float[Tensor, "batch dim"]
    heldout: Float[Tensor, "heldout dim"]


def rehearse(evidence: Evidence, targets: Sequence[Target], found: Parameters, seed: int) -> list[Rehearsal]:
    """The suspected targets' dummy triggers that work (the best if none does), at every strength."""
    return [
        rehearsal
        for target in targets
        for family in _working(evidence, target, found)
        for rehearsal in _at_all_strengths(evidence, target.index, family, found, seed)
    ]


def _working(evidence: Evidence, target: Target, found: Parameters) -> list[str]:
    """Families whose dummy trigger takes held-out images to the target's text rather than to a class."""
    head = evidence.texts.clone()
    head[target.index] = target.text
    success = {
        name: success_rate(
            _features(evidence, target.index, name, found, evidence.heldout.images, 1.0),
            evidence.heldout,
            target.index,
            head,
        )
        for name in REFINE_FAMILIES
    }
    least = min(WORKING_SUCCESS, max(success.values()))
    return [name for name, rate in success.items() if rate >= least]


def _at_all_strengths(
    evidence: Evidence, suspect: int, family: str, found: Parameters, seed: int
) -> list[Rehearsal]:
    generator = torch.Generator().manual_seed(seed)
    images = evidence.tune.images
    rehearsals = []
    for number, strength in enumerate(STRENGTHS):
        seen = images if number == 0 else (view(images, number, generator) * 255).round().byte()
        rehearsals.append(
            Rehearsal(
                suspect=suspect,
                tune=_features(evidence, suspect, family, found, seen, strength),
                heldout=_features(evidence, suspect, family, found, evidence.heldout.images, strength),
            )
        )
    return rehearsals


def _features(
    evidence: Evidence, suspect: int, family: str, found: Parameters, images: Tensor, strength: float
) -> Float[Tensor, "batch dim"]:
    prefix = f"{family}.{suspect}."
    one = {
        key.removeprefix(prefix): value.to(evidence.texts).unsqueeze(0)
        for key, value in found.items()
        if key.startswith(prefix)
    }
    return triggered_features(evidence.encoder, REFINE_FAMILIES[family], one, 0, images, strength=strength)


def success_rate(
    features: Float[Tensor, "batch dim"], clean: Clean, suspect: int, head: Float[Tensor, "classes dim"]
) -> float:
    """Share of the images of other classes that the head calls the suspected class."""
    others = clean.labels != suspect
    return float((margins(features[others] @ head.T, suspect) > 0).float().mean())


def strongest_success(
    evidence: Evidence, suspect: int, rehearsals: Sequence[Rehearsal], head: Float[Tensor, "classes dim"]
) -> float:
    """Largest success of a dummy trigger of the class, on held-out images of other classes."""
    return max(
        success_rate(rehearsal.heldout, evidence.heldout, suspect, head)
        for rehearsal in rehearsals
        if rehearsal.suspect == suspect
    )


def judged(
    evidence: Evidence,
    suspects: Sequence[int],
    rehearsals: Sequence[Rehearsal],
    head: Float[Tensor, "classes dim"],
    goal: float,
) -> Verdict:
    """What held-out images say of a head.

    The floor of a class is the share of clean images of other classes that are called the class.

    Returns:
        'overcalled' where the floor of a suspected class is higher than the reference head has it; 'unsafe'
        where a dummy trigger succeeds more often than the goal and than the floor; else 'accepted'.
    """
    clean = evidence.heldout
    floors = {suspect: success_rate(clean.features, clean, suspect, head) for suspect in suspects}
    if any(
        floor > success_rate(clean.features, clean, suspect, evidence.texts)
        for suspect, floor in floors.items()
    ):
        return "overcalled"
    if any(
        strongest_success(evidence, suspect, rehearsals, head) > max(goal, floor)
        for suspect, floor in floors.items()
    ):
        return "unsafe"
    return "accepted"


def directions(suspects: Sequence[int], rehearsals: Sequence[Rehearsal]) -> Float[Tensor, "suspects dim"]:
    """For each suspected class the leading direction of its dummy-triggered features, made orthonormal."""
    leading = []
    for suspect in suspects:
        features = torch.cat([rehearsal.tune for rehearsal in rehearsals if rehearsal.suspect == suspect])
        leading.append(torch.linalg.eigh(features.T @ features).eigenvectors[:, -1])
    basis: Tensor = torch.linalg.qr(torch.stack(leading, dim=1)).Q
    return basis.T


def of_other_classes(
    rehearsals: Sequence[Rehearsal], labels: Int[Tensor, " batch"]
) -> tuple[Float[Tensor, "triggered dim"], Int[Tensor, " triggered"], Int[Tensor, " triggered"]]:
    """Tune features under every dummy trigger, without images of its own suspected class.

    Returns:
        Features, the images' own classes, and the suspected class of each one's trigger.
    """
    kept = [(rehearsal, labels != rehearsal.suspect) for rehearsal in rehearsals]
    return (
        torch.cat([rehearsal.tune[others] for rehearsal, others in kept]),
        torch.cat([labels[others] for _, others in kept]),
        torch.cat([torch.full_like(labels[others], rehearsal.suspect) for rehearsal, others in kept]),
    )


def tuning_data(
    evidence: Evidence, targets: Sequence[Target], rehearsals: Sequence[Rehearsal], seed: int
) -> TuningData:
    """All that the head is tuned on; the seed is for the imagined images of the suspects.

    An image under a trigger for a target that is not on the list has to leave whatever class it is called.
    """
    suspects = [target.index for target in targets]
    clean = with_imagined(evidence.views, evidence.tune, suspects, seed)
    triggered, own_labels, triggered_suspects = of_other_classes(rehearsals, evidence.tune.labels)
    elsewhere = [target.index for target in targets if not target.on_list]
    called = (triggered @ evidence.texts.T).scatter(1, own_labels.unsqueeze(1), -torch.inf).argmax(dim=1)
    unlisted = torch.isin(triggered_suspects, torch.tensor(elsewhere, device=own_labels.device))
    return TuningData(
        reference=evidence.texts,
        scale=evidence.scale,
        clean=clean.features,
        clean_labels=clean.labels,
        triggered=triggered,
        triggered_labels=own_labels,
        triggered_suspects=torch.where(unlisted, called, triggered_suspects),
        suspects=tuple(suspects),
        directions=directions(suspects, rehearsals),
    )
