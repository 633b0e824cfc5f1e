from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cbpt_runtime.bundle import Suspect
from cbpt_runtime.models.clip import ImageEncoder
from cbpt_runtime.purification import triggered_features as module
from cbpt_runtime.purification.clean_features import AugmentedFeatures, CleanFeatures, DefenderData
from cbpt_runtime.purification.dummy_triggers import DummyTrigger, from_tensors
from cbpt_runtime.purification.targets import Target
from cbpt_runtime.purification.triggered_features import (
    STRENGTHS,
    check_head,
    compute_triggered_features,
    directions,
    of_other_classes,
    strongest_success,
    tuning_data,
)

SIDE = 4


class Flat:
    """An encoder whose features are the pixels."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        return normalize(pixels.flatten(1), dim=1)


def defender() -> DefenderData:
    """Three classes of dark images; class 1 is whatever is bright in its last pixel."""
    images = torch.zeros(12, 3, SIDE, SIDE, dtype=torch.uint8)
    labels = torch.arange(3).repeat(4)
    for index, label in enumerate(labels.tolist()):
        images[index, label, 0, 0] = 60
    features = Flat().encode_images(images.float() / 255)
    clean = CleanFeatures(images=images, labels=labels, features=features)
    texts = torch.zeros(3, 3, SIDE, SIDE)
    for label in range(3):
        texts[label, label, 0, 0] = 1.0
    texts[1, :, -1, -1] = 1.0
    encoder: ImageEncoder = Flat()  # type: ignore[assignment]
    return DefenderData(
        encoder=encoder,
        texts=normalize(texts.flatten(1), dim=1),
        scale=10.0,
        tune=clean,
        augmented=AugmentedFeatures(features=features, labels=labels),
        heldout=clean,
    )


def target(text: Tensor | None = None) -> Target:
    """Class 1; with a text, something else that class 1 takes the images of."""
    return Target(
        suspect=Suspect(index=1, name="one" if text is None else "other", on_list=text is None),
        text=defender().texts[1] if text is None else text,
    )


def triggers(**masks: Tensor) -> list[DummyTrigger]:
    """A patch that lights the last pixel, masks that cover nothing, a blend that is too grey to work."""
    lit = torch.zeros(1, SIDE, SIDE)
    lit[..., -1, -1] = 1.0
    nothing, white = torch.zeros(1, SIDE, SIDE), torch.ones(3, SIDE, SIDE)
    masks = {"mask": nothing, "patch": lit, "small-patch": nothing} | masks
    return from_tensors(
        {"blend.1.pattern": -5.0 * white}
        | {f"{family}.1.mask": mask for family, mask in masks.items()}
        | {f"{family}.1.pattern": white for family in masks}
    )


def test_only_dummy_triggers_that_work_are_rehearsed() -> None:
    found = compute_triggered_features(defender(), [target()], triggers(), seed=0)
    assert len(found) == len(STRENGTHS)
    assert strongest_success(1, found, defender().texts) == 1.0


def test_the_best_is_rehearsed_where_none_works() -> None:
    weak = triggers(patch=torch.zeros(1, SIDE, SIDE))
    assert len(compute_triggered_features(defender(), [target()], weak, seed=0)) >= len(STRENGTHS)


def test_images_of_the_suspected_class_are_left_out() -> None:
    known = defender()
    triggered_sets = compute_triggered_features(known, [target()], triggers(), seed=0)
    features, labels, targets = of_other_classes(triggered_sets)
    assert features.shape == (8 * len(STRENGTHS), 3 * SIDE * SIDE)
    assert sorted(labels.unique().tolist()) == [0, 2]
    assert targets.tolist() == [1] * len(labels)


def test_of_many_images_some_of_every_class_are_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_REHEARSED", 6)
    found = compute_triggered_features(defender(), [target()], triggers(), seed=0)
    for one in found:
        assert torch.equal(one.tune_labels.bincount(), torch.tensor([2, 2, 2]))
        assert torch.equal(one.heldout_labels.bincount(), torch.tensor([2, 2, 2]))
        assert len(one.tune) == len(one.heldout) == 6
    brightest = found[0].tune.view(6, 3, SIDE, SIDE)[:, :, 0, 0].argmax(dim=1)  # each image shows its class
    assert torch.equal(brightest, found[0].tune_labels)
    assert check_head(defender(), [1], found, defender().texts, 0.0) == "trigger_survives"
    monkeypatch.setattr(module, "MOST_REHEARSED", 4)  # four of three classes
    odd = compute_triggered_features(defender(), [target()], triggers(), seed=0)[0]
    assert sorted(odd.tune_labels.bincount().tolist()) == [1, 1, 2]


def test_directions_are_orthonormal_and_what_the_trigger_adds() -> None:
    known = defender()
    triggered_sets = compute_triggered_features(known, [target()], triggers(), seed=0)
    twice = [
        *triggered_sets,
        *(replace(one, target=2, tune=known.tune.features) for one in triggered_sets[:1]),
    ]
    basis = directions([1, 2], twice)
    assert torch.allclose(basis @ basis.T, torch.eye(2), atol=1e-5)
    added = torch.zeros(3, SIDE, SIDE)
    added[:, -1, -1] = 3**-0.5
    assert abs(float(basis[0] @ added.flatten())) > 0.9


def test_a_head_is_accepted_when_dummy_triggers_fail_and_the_suspect_is_not_overcalled() -> None:
    known = defender()
    triggered_sets = compute_triggered_features(known, [target()], triggers(), seed=0)
    assert check_head(known, [1], triggered_sets, known.texts, 0.0) == "trigger_survives"
    deaf = known.texts.clone()
    deaf[1].view(3, SIDE, SIDE)[:, -1, -1] = -1.0
    assert check_head(known, [1], triggered_sets, deaf, 0.0) == "accepted"
    everything = known.texts.clone()
    everything[1] = 10 * known.tune.features.sum(dim=0)
    assert check_head(known, [1], triggered_sets, everything, 0.0) == "false_positives"


def test_a_target_off_the_list_counts_as_reached_where_its_own_text_is() -> None:
    known = defender()
    deaf = known.texts.clone()
    deaf[1].view(3, SIDE, SIDE)[:, -1, -1] = 0.0  # the class itself cannot be forced
    lit = torch.zeros(3, SIDE, SIDE)
    lit[:, -1, -1] = 3**-0.5
    found = compute_triggered_features(
        replace(known, texts=deaf), [target(lit.flatten())], triggers(), seed=0
    )
    assert len(found) == len(STRENGTHS)
    tuned_on = found[0].tune @ lit.flatten()
    assert (tuned_on > 0.9).all()


def test_images_leave_whatever_class_a_target_off_the_list_sends_them_to() -> None:
    known = defender()
    targets = [target()], [target(known.texts[1])]
    listed, other = (
        tuning_data(known, some, compute_triggered_features(known, some, triggers(), seed=0), seed=0)
        for some in targets
    )
    assert (listed.triggered_targets == 1).all()
    assert (other.triggered_targets != other.triggered_labels).all()
    cosines = (other.triggered @ known.texts.T).scatter(1, other.triggered_labels.unsqueeze(1), -1.0)
    assert torch.equal(other.triggered_targets, cosines.argmax(dim=1))
    assert other.targets == (1,)
