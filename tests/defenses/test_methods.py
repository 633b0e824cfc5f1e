"""The maths of the methods."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cbpt_runtime.defenses.abd import Abd, PatchGenerator, backdoor_loss, brightened, with_patch
from cbpt_runtime.defenses.finetuning import Finetune, auto_augmented, check_finite, easily_augmented
from cbpt_runtime.defenses.rvpt import Rvpt, repulsion
from cbpt_runtime.errors import ConfigError, PurificationError
from cbpt_runtime.models.trainable import contrastive_loss, labelled_contrastive_loss
from cbpt_runtime.pipeline import METHODS


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=seeded(seed)), dim=-1)


@pytest.mark.parametrize("bias", [None, torch.tensor(-3.0)])
def test_the_labelled_loss_is_clips_own_where_no_class_comes_twice(bias: torch.Tensor | None) -> None:
    images, texts, scale = unit(5, 8), unit(5, 8, seed=1), torch.tensor(7.0)
    same = torch.eye(5, dtype=torch.bool)
    ours = labelled_contrastive_loss(images, texts, same, scale, bias)
    assert float(ours) == pytest.approx(float(contrastive_loss(images, texts, scale, bias)), rel=1e-5)


def test_pairs_of_one_class_are_not_pushed_apart() -> None:
    images, scale, same = unit(1, 8).expand(4, 8), torch.tensor(9.0), torch.ones(4, 4, dtype=torch.bool)
    loss = labelled_contrastive_loss(images, images, same, scale, None)
    assert float(loss) == pytest.approx(float(np.log(4)), rel=1e-5)  # as small as it can be
    assert float(labelled_contrastive_loss(images, unit(4, 8, seed=2), same, scale, None)) > float(loss)


def test_an_augmented_caption_keeps_to_its_own_words() -> None:
    text = "a bright photo of the green disc on a table."
    changed = [easily_augmented(text, np.random.default_rng(seed)) for seed in range(40)]
    assert all(set(other.split()) <= set(text.split()) for other in changed)
    assert {len(other.split()) for other in changed} == {9, 10, 11}
    assert easily_augmented("cat", np.random.default_rng(0)) in ("cat", "cat cat")
    assert changed[3] == easily_augmented(text, np.random.default_rng(3))


def test_augmented_images_depend_on_the_generator_alone() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3), dtype=np.uint8)
    state = torch.get_rng_state()
    first, again = auto_augmented(images, seeded()), auto_augmented(images, seeded())
    assert torch.equal(torch.get_rng_state(), state)
    assert (first == again).all()
    assert first.shape == images.shape
    assert (first != auto_augmented(images, seeded(1))).any()


def test_a_patch_covers_one_square_of_each_image() -> None:
    pixels, patch = torch.zeros(5, 3, 16, 20), torch.ones(3, 4, 4)
    shown = with_patch(pixels, patch, seeded())
    assert shown.sum(dim=(1, 2, 3)).tolist() == [48.0] * 5
    assert len({tuple(torch.nonzero(image[0])[0].tolist()) for image in shown}) > 1
    assert not pixels.any()


def test_the_backdoor_loss_rewards_gathered_features() -> None:
    origins, captions = unit(6, 8), unit(6, 8, seed=1)
    gathered = unit(1, 8, seed=2).expand(6, 8)
    scale = 10.0
    loss = backdoor_loss(gathered, origins, captions, scale)
    logits = np.stack(
        [np.ones(6), (gathered * origins).sum(1).numpy(), (gathered * captions).sum(1).numpy()], axis=1
    )
    powers = np.exp(scale * logits)
    assert float(loss) == pytest.approx(float(-np.log(powers[:, 0] / powers.sum(1)).mean()), rel=1e-4)
    assert float(loss) < float(backdoor_loss(origins, origins, captions, scale))


def test_a_patch_generator_is_made_by_its_seed() -> None:
    assert torch.equal(PatchGenerator(5, 0)(), PatchGenerator(5, 0)())
    assert not torch.equal(PatchGenerator(5, 0)(), PatchGenerator(5, 1)())
    patch = PatchGenerator(7, 0)()
    assert patch.shape == (3, 7, 7)
    assert patch.min() >= 0
    assert patch.max() <= 1


def test_brightening_never_darkens() -> None:
    images = np.random.default_rng(0).integers(0, 200, (4, 8, 8, 3), dtype=np.uint8)
    plain = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    brighter = brightened(images, 1.5, seeded())
    assert (brighter >= plain - 1e-6).all()
    assert brighter.max() <= 1


def test_repulsion_is_the_mean_cosine() -> None:
    one, other = torch.randn(3, 4, generator=seeded()), torch.randn(3, 4, generator=seeded(1))
    assert float(repulsion([one, one], [one, -one])) == pytest.approx(0.0, abs=1e-6)
    expected = torch.nn.functional.cosine_similarity(one, other, dim=-1).mean()
    assert float(repulsion([one], [other])) == pytest.approx(float(expected))


def test_a_loss_that_is_not_finite_ends_the_work() -> None:
    check_finite(torch.tensor(1.0))
    with pytest.raises(PurificationError, match="learning_rate"):
        check_finite(torch.tensor(float("nan")))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (Finetune, {"epochs": 0}, "epochs to be a whole number from 1"),
        (Finetune, {"learning_rate": "fast"}, "learning_rate to be a number"),
        (Abd, {"patch_area_rate": 0.9}, "patch_area_rate to be a number from 0.0001 to 0.5"),
        (Rvpt, {"tokens": True}, "tokens to be a whole number"),
        (Rvpt, {"precision": "fp64"}, "precision to be one of auto, fp32, bf16"),
        (Rvpt, {"seed": -1}, "seed to be a whole number from 0"),
    ],
)
def test_bad_numbers_are_refused(kind: type, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**changes)


@pytest.mark.parametrize("method", METHODS)
def test_configurations_round_trip_and_refuse_unknown_keys(method: str) -> None:
    config = METHODS[method](seed=4)
    assert METHODS[method].from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="keys out of seed"):
        METHODS[method].from_dict({"sede": 1})
