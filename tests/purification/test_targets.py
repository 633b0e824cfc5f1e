from __future__ import annotations

import torch
from torch.nn.functional import normalize

from cbpt_runtime.bundle import Suspect
from cbpt_runtime.purification.targets import Target, landing, nearest_word, with_words
from cbpt_runtime.purification.vocabulary import Vocabulary

NAMES = ("dog", "car", "zebra", "puppy", "tench", "kite", "bread", "lamp")


def vocabulary(n_listed: int = 2) -> Vocabulary:
    """One axis per word, but a puppy is nearly a dog."""
    texts = torch.eye(len(NAMES))
    texts[3] = normalize(texts[0] + 0.4 * texts[3], dim=0)
    return Vocabulary(names=NAMES, texts=texts, concepts=torch.arange(len(NAMES)), n_listed=n_listed)


def towards(*weights: float) -> torch.Tensor:
    """A direction: so much of each axis, the rest little."""
    return normalize(torch.tensor([*weights, *[0.1] * (len(NAMES) - len(weights))]), dim=0)


def test_a_class_of_the_list_is_named_where_images_go_to_its_text() -> None:
    assert nearest_word(towards(0.1, 1.0), vocabulary()) == (1, True)


def test_a_word_off_the_list_is_named_where_no_class_is_as_near() -> None:
    assert nearest_word(towards(0.1, 0.5, 1.0), vocabulary()) == (2, False)


def test_a_class_that_is_nearly_as_near_as_any_word_is_preferred() -> None:
    assert nearest_word(towards(0.1, 0.95, 1.0), vocabulary()) == (1, True)


def test_a_near_text_of_a_class_counts_as_the_class() -> None:
    near, twin = vocabulary(), vocabulary().texts[3]
    direction = normalize(twin - 0.8 * near.texts[0], dim=0)  # far nearer to the puppy than to the dog
    assert int((near.texts @ direction).argmax()) == 3
    assert nearest_word(direction, near) == (0, True)


def test_without_a_list_the_nearest_word_is_named() -> None:
    assert nearest_word(towards(0.1, 1.0), vocabulary(n_listed=0)) == (1, False)


def test_images_land_in_the_nearest_class() -> None:
    assert landing(towards(0.1, 0.5, 1.0), vocabulary().texts[:2]) == 1


def test_texts_of_targets_off_the_list_follow_the_classes() -> None:
    known = vocabulary()
    found = [(2, False), (1, True), (4, False)]
    targets = [
        Target(
            suspect=Suspect(index=word if on_list else 0, name=NAMES[word], on_list=on_list),
            text=known.texts[word],
        )
        for word, on_list in found
    ]
    texts, rows = with_words(known.texts[:2], targets)
    assert rows == [2, 1, 3]
    assert torch.equal(texts, known.texts[[0, 1, 2, 4]])
    assert torch.equal(with_words(known.texts[:2], [])[0], known.texts[:2])
