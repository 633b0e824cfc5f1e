from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cbpt_runtime.models.clip import ImageEncoder
from cbpt_runtime.purification.clean_features import Clean, Evidence, Views
from cbpt_runtime.purification.targets import Target
from cbpt_runtime.purification.triggered_features import (
    STRENGTHS,
    directions,
    judged,
    of_other_classes,
    rehearse,
    strongest_success,
    tuning_data,
)

SIDE = 4


class Flat:
    """An encoder whose features are the pixels."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        return normalize(pixels.flatten(1), dim=1)


def evidence() -> Evidence:
    """Three classes of dark images; class 1 is whatever is bright in its last pixel."""
    images = torch.zeros(12, 3, SIDE, SIDE, dtype=torch.uint8)
    labels = torch.arange(3).repeat(4)
    for index, label in enumerate(labels.tolist()):
        images[index, label, 0, 0] = 60
    features = Flat().encode_images(images.float() / 255)
    clean = Clean(images=images, labels=labels, features=features)
    texts = torch.zeros(3, 3, SIDE, SIDE)
    for label in range(3):
        texts[label, label, 0, 0] = 1.0
    texts[1, :, -1, -1] = 1.0
    encoder: ImageEncoder = Flat()  # type: ignore[assignment]
    return Evidence(
        encoder=encoder,
        texts=normalize(texts.flatten(1), dim=1),
        scale=10.0,
        tune=clean,
        views=Views(features=features, labels=labels),
        heldout=clean,
    )


def target(text: Tensor | None = None) -> Target:
    """Class 1; with a text, something else that class 1 takes the images of."""
    return Target(
        index=1,
        name="one" if text is None else "other",
        text=evidence().texts[1] if text is None else text,
        on_list=text is None,
        score=9.0,
        p_value=0.001,
        family="patch",
    )


def triggers() -> dict[str, Tensor]:
    """A patch that lights the last pixel, a mask that covers nothing, a blend that is too grey to work."""
    lit = torch.zeros(1, SIDE, SIDE)
    lit[..., -1, -1] = 1.0
    return {
        "patch.1.mask": lit,
        "patch.1.pattern": torch.ones(3, SIDE, SIDE),
        "small-patch.1.mask": torch.zeros(1, SIDE, SIDE),
        "small-patch.1.pattern": torch.ones(3, SIDE, SIDE),
        "mask.1.mask": torch.zeros(1, SIDE, SIDE),
        "mask.1.pattern": torch.ones(3, SIDE, SIDE),
        "blend.1.pattern": torch.full((3, SIDE, SIDE), -5.0),
    }


def test_only_dummy_triggers_that_work_are_rehearsed() -> None:
    found = rehearse(evidence(), [target()], triggers(), seed=0)
    assert len(found) == len(STRENGTHS)
    assert strongest_success(evidence(), 1, found, evidence().texts) == 1.0


def test_the_best_is_rehearsed_where_none_works() -> None:
    weak = triggers() | {"patch.1.mask": torch.zeros(1, SIDE, SIDE)}
    assert len(rehearse(evidence(), [target()], weak, seed=0)) >= len(STRENGTHS)


def test_images_of_the_suspected_class_are_left_out() -> None:
    known = evidence()
    rehearsals = rehearse(known, [target()], triggers(), seed=0)
    features, labels, suspects = of_other_classes(rehearsals, known.tune.labels)
    assert features.shape == (8 * len(STRENGTHS), 3 * SIDE * SIDE)
    assert sorted(labels.unique().tolist()) == [0, 2]
    assert suspects.tolist() == [1] * len(labels)


def test_directions_are_orthonormal_and_what_the_trigger_adds() -> None:
    known = evidence()
    rehearsals = rehearse(known, [target()], triggers(), seed=0)
    twice = [*rehearsals, *(replace(one, suspect=2, tune=known.tune.features) for one in rehearsals[:1])]
    basis = directions([1, 2], twice)
    assert torch.allclose(basis @ basis.T, torch.eye(2), atol=1e-5)
    added = torch.zeros(3, SIDE, SIDE)
    added[:, -1, -1] = 3**-0.5
    assert abs(float(basis[0] @ added.flatten())) > 0.9


def test_a_head_is_accepted_when_dummy_triggers_fail_and_the_suspect_is_not_overcalled() -> None:
    known = evidence()
    rehearsals = rehearse(known, [target()], triggers(), seed=0)
    assert judged(known, [1], rehearsals, known.texts, 0.0) == "unsafe"
    deaf = known.texts.clone()
    deaf[1].view(3, SIDE, SIDE)[:, -1, -1] = -1.0
    assert judged(known, [1], rehearsals, deaf, 0.0) == "accepted"
    everything = known.texts.clone()
    everything[1] = 10 * known.tune.features.sum(dim=0)
    assert judged(known, [1], rehearsals, everything, 0.0) == "overcalled"


def test_a_target_off_the_list_counts_as_reached_where_its_own_text_is() -> None:
    known = evidence()
    deaf = known.texts.clone()
    deaf[1].view(3, SIDE, SIDE)[:, -1, -1] = 0.0  # the class itself cannot be forced
    lit = torch.zeros(3, SIDE, SIDE)
    lit[:, -1, -1] = 3**-0.5
    found = rehearse(replace(known, texts=deaf), [target(lit.flatten())], triggers(), seed=0)
    assert len(found) == len(STRENGTHS)
    tuned_on = found[0].tune @ lit.flatten()
    assert (tuned_on > 0.9).all()


def test_images_leave_whatever_class_a_target_off_the_list_sends_them_to() -> None:
    known = evidence()
    targets = [target()], [target(known.texts[1])]
    listed, other = (
        tuning_data(known, some, rehearse(known, some, triggers(), seed=0), seed=0) for some in targets
    )
    assert (listed.triggered_suspects == 1).all()
    assert (other.triggered_suspects != other.triggered_labels).all()
    cosines = (other.triggered @ known.texts.T).scatter(1, other.triggered_labels.unsqueeze(1), -1.0)
    assert torch.equal(other.triggered_suspects, cosines.argmax(dim=1))
    assert other.suspects == (1,)
