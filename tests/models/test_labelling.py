from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cbpt_runtime.errors import ConfigError, ImageDataError
from cbpt_runtime.models.clip import DualEncoder
from cbpt_runtime.models.data import ClassList
from cbpt_runtime.models.image_folder import UnlabelledImages
from cbpt_runtime.models.labelling import (
    images_to_draw,
    label_images,
    reference_probabilities,
    split_by_confidence,
)

NAMES = ("cat", "dog", "owl")


def unlabelled(n: int) -> UnlabelledImages:
    """Images whose pixels are all their number."""
    images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 32, 32, 3)).copy()
    files = tuple(f"{index}.png" for index in range(n))
    return UnlabelledImages(images=images, files=files, digests=files, found=n + 5, notes=("a note",))


def calls(*rows: tuple[int, float]) -> np.ndarray:
    """Probabilities of three classes from the likeliest class and its ratio to each of the others."""
    table = np.ones((len(rows), 3), np.float32)
    for row, (label, ratio) in enumerate(rows):
        table[row, label] = ratio
    return table / table.sum(axis=1, keepdims=True)


def test_only_images_the_head_is_sure_of_are_used() -> None:
    sure = calls((0, 3), (0, 1.9), (1, 9), (1, 2.1), (2, 1.2), (0, 5))
    split = split_by_confidence(unlabelled(6), sure, NAMES, shots=4, heldout_shots=0)
    assert sorted(split.tune_images[:, 0, 0, 0].tolist()) == [0, 2, 3, 5]
    assert split.tune_labels.tolist() == [0, 0, 1, 1]
    assert split.tune_labels.dtype == np.int64
    assert split.labelled_by == "suspect"


def test_the_surest_images_of_a_class_come_first() -> None:
    sure = calls(*((label, 2 + rank) for label in (0, 1) for rank in range(1, 6)))
    split = split_by_confidence(unlabelled(10), sure, NAMES, shots=2, heldout_shots=1)
    used = np.concatenate([split.tune_images, split.heldout_images])[:, 0, 0, 0]
    assert sorted(used.tolist()) == [2, 3, 4, 7, 8, 9]
    assert split.heldout_labels.tolist() == [0, 1]


def test_the_seed_decides_which_images_are_held_out() -> None:
    sure = calls(*((label, 2 + rank) for label in (0, 1) for rank in range(1, 21)))
    first, again, other = (
        split_by_confidence(unlabelled(40), sure, NAMES, shots=12, heldout_shots=8, seed=seed)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first.tune_images, again.tune_images)
    assert first.digest == again.digest != other.digest
    assert not set(first.tune_images[:, 0, 0, 0]) & set(first.heldout_images[:, 0, 0, 0])


def test_the_digest_follows_names_bytes_and_labels() -> None:
    drawn, sure = unlabelled(4), calls((0, 9), (0, 9), (1, 9), (1, 9))

    def digest(images: UnlabelledImages, probabilities: np.ndarray) -> str:
        return split_by_confidence(images, probabilities, NAMES, shots=2, heldout_shots=0).digest

    original = digest(drawn, sure)
    assert digest(replace(drawn, files=("x", *drawn.files[1:])), sure) != original
    assert digest(replace(drawn, digests=("x", *drawn.digests[1:])), sure) != original
    assert digest(drawn, sure[:, [0, 2, 1]]) != original
    assert digest(replace(drawn, notes=()), sure) == original


def test_the_notes_count_what_was_used_and_what_was_left_out() -> None:
    sure = calls((0, 9), (0, 9), (0, 9), (0, 9), (1, 9), (2, 1.5))
    note, meaning, counts, per_class, none = split_by_confidence(
        unlabelled(6), sure, NAMES, shots=2, heldout_shots=1
    ).notes
    assert note == "a note"
    assert "not how often it is right" in meaning
    assert counts.startswith("of 11 images 6 were looked at, 4 are used, 1 were left out as unsure")
    assert counts.endswith("and 1 as more than 2 + 1 held out of a class")
    assert per_class == "images used per class, fewest first: dog 1, cat 3"
    assert none == "no images of 1 of 3 classes: owl"


@pytest.mark.parametrize(
    ("rows", "message"),
    [(((0, 9.0), (0, 9.0)), "got sure images of cat only"), (((0, 1.5), (1, 1.0)), "got none it is sure of")],
)
def test_images_of_fewer_than_two_classes_are_refused(
    rows: tuple[tuple[int, float], ...], message: str
) -> None:
    with pytest.raises(ImageDataError, match=f"two or more classes .*{message}.*one folder per class"):
        split_by_confidence(unlabelled(2), calls(*rows), NAMES, shots=2)


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected shots of at least 1"):
        split_by_confidence(unlabelled(1), calls((0, 9)), NAMES, shots=0)


def test_small_class_lists_still_have_sixty_four_images_looked_at() -> None:
    assert images_to_draw(2, shots=4, heldout_shots=4) == 64
    assert images_to_draw(100, shots=16, heldout_shots=8) == 2400


def test_the_head_that_labels_is_the_zero_shot_head_of_the_model(tiny_encoder: DualEncoder) -> None:
    classes = ClassList(names=NAMES, templates=(("a photo of a {}.",),) * 3)
    drawn = unlabelled(20)
    pixels = torch.as_tensor(drawn.images).permute(0, 3, 1, 2).float() / 255
    cosines = tiny_encoder.encode_images(pixels) @ tiny_encoder.class_embeddings(classes).T
    expected = (tiny_encoder.logit_scale * cosines).softmax(dim=1).numpy()
    found = reference_probabilities(drawn, tiny_encoder, classes)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_no_images_the_model_is_sure_of_is_an_error_with_a_way_out(tiny_encoder: DualEncoder) -> None:
    classes = ClassList(names=NAMES, templates=(("a photo of a thing.",),) * 3)
    with pytest.raises(ImageDataError, match=r"among 20; got none it is sure of\. Add images"):
        label_images(unlabelled(20), tiny_encoder, classes)
