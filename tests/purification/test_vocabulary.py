from __future__ import annotations

import hashlib
import time

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cbpt_runtime.models.clip import DualEncoder
from cbpt_runtime.models.data import ClassList, spoken
from cbpt_runtime.purification import vocabulary as module
from cbpt_runtime.purification.vocabulary import NEAR, Vocabulary, background_words, build_vocabulary, group

LISTED = ("Fire_Truck", "sea slug", "made-up thing")
DIM = 32


class Hashed:
    """Texts as vectors: each word has a random one of its own."""

    def __init__(self) -> None:
        self.asked: list[ClassList] = []

    def class_embeddings(self, classes: ClassList) -> Tensor:
        self.asked.append(classes)
        rows = []
        for name in classes.names:
            seed = int.from_bytes(hashlib.sha256(spoken(name).encode()).digest()[:4], "big")
            rows.append(torch.randn(DIM, generator=torch.Generator().manual_seed(seed)))
        return normalize(torch.stack(rows), dim=1)


def classes(*names: str) -> ClassList:
    return ClassList(names=names, templates=(("a drawing of a {}.",),) * len(names))


def built(
    names: tuple[str, ...] = LISTED, n_concepts: int = 40, like: Vocabulary | None = None
) -> Vocabulary:
    encoder, listed = Hashed(), classes(*names)
    return build_vocabulary(
        encoder,  # type: ignore[arg-type]
        listed,
        encoder.class_embeddings(listed),
        n_concepts,
        like=like,
    )


def clustered(n_clusters: int, per_cluster: int, alone: int, seed: int = 0) -> Tensor:
    """Clusters of near texts, then texts that are near nothing."""
    generator = torch.Generator().manual_seed(seed)
    centres = normalize(torch.randn(n_clusters, DIM, generator=generator), dim=1)
    noise = torch.randn(n_clusters * per_cluster, DIM, generator=generator) / DIM**0.5
    crowd = centres.repeat_interleave(per_cluster, dim=0) + 0.3 * noise
    return normalize(torch.cat([crowd, torch.randn(alone, DIM, generator=generator)]), dim=1)


def same_concept(concepts: Tensor) -> Tensor:
    return concepts.unsqueeze(0) == concepts.unsqueeze(1)


def test_the_users_classes_come_first_as_the_user_writes_them() -> None:
    found = built()
    assert found.names[:3] == LISTED
    assert found.n_listed == 3
    assert len(found.names) == len(found.texts) == len(found.concepts) > 900
    assert torch.equal(found.texts[:3], Hashed().class_embeddings(classes(*LISTED)))


def test_a_background_word_that_equals_a_class_is_dropped() -> None:
    spoken_names = [spoken(name).casefold() for name in built().names]
    assert "fire truck" in {word.casefold() for word in background_words()}
    assert spoken_names.count("fire truck") == spoken_names.count("sea slug") == 1
    assert len(spoken_names) == len(set(spoken_names)) == len(background_words()) + 1


def test_background_words_are_there_once_each() -> None:
    words = [word.casefold() for word in background_words()]
    assert len(words) == len(set(words)) > 900


def test_background_words_are_put_into_some_of_the_users_templates() -> None:
    encoder = Hashed()
    listed = ClassList(names=LISTED, templates=(tuple(f"{number} {{}}" for number in range(10)),) * 3)
    build_vocabulary(encoder, listed, torch.eye(3, DIM), 40)  # type: ignore[arg-type]
    (background,) = encoder.asked
    assert set(background.templates) == {("0 {}", "3 {}", "6 {}", "9 {}")}


def test_without_a_class_list_there_are_background_words_alone() -> None:
    found = build_vocabulary(Hashed(), None, None, 40)  # type: ignore[arg-type]
    assert found.names == background_words()
    assert found.n_listed == 0


def test_every_word_has_one_concept_and_every_concept_a_word() -> None:
    found = built(n_concepts=40)
    assert found.n_concepts <= 40
    assert (found.members().sum(dim=0) == 1).all()
    assert found.members().any(dim=1).all()


def test_another_encoder_can_be_asked_for_the_same_concepts() -> None:
    found = built()
    shuffled = found.concepts[torch.randperm(len(found.concepts), generator=torch.Generator().manual_seed(0))]
    first = Vocabulary(names=found.names, texts=found.texts, concepts=shuffled, n_listed=3)
    assert torch.equal(built(like=first).concepts, shuffled)


def test_real_text_towers_give_unit_texts(tiny_encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "background_words", lambda: ("tench", "kite", "fire truck"))
    listed = classes(*LISTED)
    found = build_vocabulary(tiny_encoder, listed, tiny_encoder.class_embeddings(listed), 96)
    assert found.names == (*LISTED, "tench", "kite")
    assert torch.allclose(found.texts.norm(dim=1), torch.ones(5), atol=1e-5)
    assert found.concepts.tolist() == [0, 1, 2, 3, 4]  # fewer words than concepts: one each


def test_texts_far_from_all_others_get_concepts_of_their_own() -> None:
    texts = clustered(10, 50, alone=10)
    concepts = group(texts, 20)
    together = same_concept(concepts)
    assert (together[500:].sum(dim=1) == 1).all()
    assert together[:500, :500].sum() == 10 * 50**2  # and the clusters are whole


def test_the_concepts_hardly_change_with_the_list() -> None:
    background = clustered(40, 20, alone=40)
    first = same_concept(group(background, 80))
    for seed in (1, 2, 3):
        listed = clustered(2, 4, alone=2, seed=seed)
        again = same_concept(group(torch.cat([listed, background]), 80)[len(listed) :])
        kept = (first & again).sum(dim=1) / (first | again).sum(dim=1)  # company that a word keeps
        assert kept.mean() > 0.9


def test_the_same_texts_give_the_same_concepts() -> None:
    texts = clustered(10, 20, alone=5)
    assert torch.equal(group(texts, 16), group(texts.clone(), 16))


def test_equal_texts_are_grouped_without_empty_concepts() -> None:
    concepts = group(torch.eye(3, DIM).repeat(20, 1), 10)
    assert sorted(concepts.unique().tolist()) == list(range(int(concepts.max()) + 1))
    assert int(concepts.max()) + 1 == 3


def test_rivals_are_all_words_but_those_near_one_of_the_concepts_own() -> None:
    def at(cosine: float) -> Tensor:
        return torch.tensor([cosine, (1 - cosine**2) ** 0.5, 0.0])

    texts = torch.stack([at(1.0), at(NEAR + 0.05), at(NEAR - 0.05), torch.tensor([0.0, 0.0, 1.0])])
    found = Vocabulary(names=tuple("abcd"), texts=texts, concepts=torch.tensor([0, 1, 2, 2]), n_listed=0)
    rivals = found.rivals()
    assert rivals[0].tolist() == [False, False, True, True]
    assert rivals[2].tolist() == [True, False, False, False]  # b is near c
    assert not (rivals & found.members()).any()


def test_all_others_are_rivals_where_every_text_is_near_every_other() -> None:
    texts = normalize(torch.eye(4) + 3, dim=1)
    found = Vocabulary(names=tuple("abcd"), texts=texts, concepts=torch.tensor([0, 1, 2, 2]), n_listed=0)
    assert (texts @ texts.T).min() > NEAR
    assert torch.equal(found.rivals(), ~found.members())


def test_twenty_thousand_words_are_grouped_in_seconds() -> None:
    texts = normalize(torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    start = time.process_time()
    concepts = group(texts, 96)
    assert time.process_time() - start < 20
    assert int(concepts.max()) + 1 == 96
