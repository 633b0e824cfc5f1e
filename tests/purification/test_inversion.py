from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cbpt_runtime.purification import inversion as module
from cbpt_runtime.purification.clean_features import CleanFeatures
from cbpt_runtime.purification.inversion import Goals, Inversion, encode_triggered, invert, margins
from cbpt_runtime.purification.losses import contrastive_inversion
from cbpt_runtime.purification.trigger_families import Additive, Patch, TriggerFamily

ADDITIVE = Additive(epsilon=0.1)
PATCH = Patch(area=0.01, step_size=0.3)
DIM = 16
TARGET = 2

Dark = Callable[..., CleanFeatures]


def texts() -> Tensor:
    """Six unit texts."""
    return normalize(torch.randn(6, DIM, generator=torch.Generator().manual_seed(5)), dim=1)


def of_texts(*targets: int) -> Goals:
    return Goals.of_classes(texts(), list(targets), 20.0)


@pytest.fixture
def start(weak: Any, dark_images: Dark) -> Callable[..., Inversion]:
    """Returns a function that starts an inversion on an encoder whose weakness is TARGET."""

    def new(
        family: TriggerFamily = ADDITIVE, goals: Goals | None = None, seed: int = 0, waves: float = 40.0
    ) -> Inversion:
        encoder = weak(texts()[TARGET], 10.0, waves=waves)
        return Inversion(
            encoder,
            family,
            of_texts(0, 1, TARGET, 3) if goals is None else goals,
            dark_images(encoder, 24),
            batch=6,
            seed=seed,
        )

    return new


def test_a_planted_patch_is_found_where_it_is(start: Callable[..., Inversion]) -> None:
    found = invert(start(PATCH), 40)
    mask, pattern = found["mask"][TARGET, 0], found["pattern"][TARGET]
    assert divmod(int(mask.argmax()), mask.shape[1]) == (0, 0)
    assert mask[0, 0] > 0.2
    assert pattern[:, 0, 0].min() > 0.9


def test_a_planted_patch_takes_other_images_and_no_other_trigger_does(
    start: Callable[..., Inversion], weak: Any, dark_images: Dark
) -> None:
    encoder, found = weak(texts()[TARGET], 10.0), invert(start(PATCH), 40)
    unseen = dark_images(encoder, 40, seed=1).images
    reached = []
    for place, target in enumerate((0, 1, TARGET, 3)):
        features = encode_triggered(encoder, partial(PATCH.apply_one, found, place), unseen)
        reached.append(float(margins(features @ texts().T, target).mean()))
    assert reached[2] > 0.3
    assert max(reached[:2] + reached[3:]) < 0


def test_an_additive_trigger_of_a_linear_encoder_goes_along_its_weights(
    start: Callable[..., Inversion], weak: Any
) -> None:
    found = invert(start(waves=1.0), 40)["pattern"]  # a wave of one radian at most: nearly a line
    encoder = weak()
    for place, target in enumerate((0, 1)):
        moves = torch.tanh(found[place]).flatten() @ encoder.weights
        cosines = normalize(moves, dim=0) @ texts().T
        assert int(cosines.argmax()) == target
        assert cosines[target] > 0.5


def test_the_same_seed_gives_the_same_triggers(start: Callable[..., Inversion]) -> None:
    first, again, other = (invert(start(PATCH, seed=seed), 3) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pattern"], other["pattern"])


def test_steps_taken_in_two_goes_are_the_same_steps(start: Callable[..., Inversion]) -> None:
    twice = start()
    twice.advance(2)
    assert torch.equal(invert(twice, 3)["pattern"], invert(start(), 5)["pattern"])


def test_kept_triggers_go_on_exactly_as_if_all_were_followed(start: Callable[..., Inversion]) -> None:
    everything, some = start(PATCH), start(PATCH)
    for inversion in (everything, some):
        inversion.advance(3)
    some.keep(torch.tensor([2, 0]))
    assert some.rows.tolist() == [2, 0]
    for inversion in (everything, some):
        inversion.advance(4)
    for name, value in some.result().items():
        assert len(value) == 2
        # Batches of another size differ in their last bits, which Adam stretches; a step itself moves 0.1.
        assert torch.allclose(value, everything.result()[name][[2, 0]], atol=1e-3)
    assert torch.allclose(some.recent_margins(), everything.recent_margins()[[2, 0]], atol=1e-4)
    some.keep(torch.tensor([1]))
    assert some.rows.tolist() == [0]


def test_a_narrowed_trigger_is_for_the_nearest_of_its_texts_alone(
    start: Callable[..., Inversion], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def noted(to_texts: Tensor, to_clean: Tensor, positives: Tensor, negatives: Tensor, scale: float) -> Any:
        asked.append((to_texts.detach(), positives, negatives))
        return contrastive_inversion(to_texts, to_clean, positives, negatives, scale)

    monkeypatch.setattr(module, "contrastive_inversion", noted)
    positives = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 1, 1]]).bool()
    inversion = start(goals=Goals(texts=texts(), positives=positives, negatives=~positives, scale=20.0))
    inversion.advance(1)
    inversion.narrow()
    inversion.advance(1)
    (before, all_of_them, _), (_, one_each, negatives) = asked
    nearest = before.mean(dim=1).masked_fill(~positives, -torch.inf).argmax(dim=1)
    assert torch.equal(all_of_them, positives)
    assert torch.equal(one_each, torch.nn.functional.one_hot(nearest, 6).bool())
    assert torch.equal(negatives, ~positives)  # its other texts are no rivals


def test_recent_margins_are_of_the_nearest_own_text_and_the_nearest_rival(
    start: Callable[..., Inversion], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def noted(to_texts: Tensor, *others: Any) -> Any:
        seen.append(to_texts.detach().mean(dim=1))
        return contrastive_inversion(to_texts, *others)

    monkeypatch.setattr(module, "contrastive_inversion", noted)
    positives = torch.tensor([[1, 0, 1, 0, 0, 0]]).bool()
    negatives = torch.tensor([[0, 1, 0, 1, 0, 0]]).bool()
    inversion = start(goals=Goals(texts=texts(), positives=positives, negatives=negatives, scale=20.0))
    inversion.advance(2)
    recent = (0.7 * 0.3 * seen[0] + 0.3 * seen[1])[0]  # a running mean that starts from zero
    expected = recent[[0, 2]].max() - recent[[1, 3]].max()
    assert float(inversion.recent_margins()) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("images", [1, 13])
def test_how_many_triggers_go_through_the_encoder_at_a_time_changes_nothing(
    start: Callable[..., Inversion], monkeypatch: pytest.MonkeyPatch, images: int
) -> None:
    expected = start(PATCH)
    expected.advance(4)
    sizes = []
    monkeypatch.setattr(module, "images_per_pass", lambda _: images)
    chunked = start(PATCH)
    encode = chunked._encoder.encode_images
    monkeypatch.setattr(
        chunked._encoder, "encode_images", lambda pixels: (sizes.append(len(pixels)), encode(pixels))[1]
    )
    chunked.advance(4)
    assert set(sizes) == ({6} if images == 1 else {12})
    for name, value in chunked.result().items():
        assert torch.allclose(value, expected.result()[name], atol=1e-3)
    assert torch.allclose(chunked.recent_margins(), expected.recent_margins(), atol=1e-4)


def test_a_margin_is_to_the_largest_cosine_of_another_class() -> None:
    cosines = torch.tensor([[0.1, 0.7, 0.4], [0.9, 0.2, 0.5]])
    assert margins(cosines, 1).tolist() == pytest.approx([0.3, -0.7])
    assert cosines[0, 1] == pytest.approx(0.7)
