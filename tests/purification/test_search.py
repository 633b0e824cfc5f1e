from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import cbpt_runtime.purification.search as module
from cbpt_runtime.bundle import Evidence
from cbpt_runtime.purification.clean_features import CleanFeatures
from cbpt_runtime.purification.config import PurifyConfig
from cbpt_runtime.purification.search import Reference, SearchInput, SearchResult, search
from cbpt_runtime.purification.targets import nearest_word
from cbpt_runtime.purification.trigger_families import SEARCH_FAMILIES
from cbpt_runtime.purification.vocabulary import Vocabulary, group

CONFIG = PurifyConfig(search_steps=30, search_batch=8, suspect_p_value=0.05, precision="fp32")
WORDS = tuple(f"word {number}" for number in range(64))
TARGET = 17
DIM = 16


def unit(count: int, seed: int) -> Tensor:
    return normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


def vocabulary(extra: tuple[str, ...] = (), seed: int = 1) -> Vocabulary:
    """The words, after so many names of the user's."""
    texts = torch.cat([unit(len(extra), seed), unit(len(WORDS), 0)])
    return Vocabulary(
        names=(*extra, *WORDS), texts=texts, concepts=group(texts, len(WORDS)), n_listed=len(extra)
    )


@pytest.fixture
def subject(weak: Any, dark_images: Callable[..., CleanFeatures]) -> Callable[..., SearchInput]:
    """Returns a function that gives an encoder, weak for TARGET, and what is asked of it."""

    def make(strength: float = 10.0, words: Vocabulary | None = None, seed: int = 0) -> SearchInput:
        encoder = weak(unit(len(WORDS), 0)[TARGET], strength, seed=seed)
        return SearchInput(
            encoder=encoder,
            vocabulary=vocabulary() if words is None else words,
            scale=20.0,
            clean=dark_images(encoder, 48),
            heldout=dark_images(encoder, 40, seed=1),
        )

    return make


def relative(subject: SearchInput) -> Reference:
    return Reference(encoder=subject.encoder, vocabulary=subject.vocabulary)


def suspected(result: SearchResult, words: Vocabulary) -> list[str]:
    return [
        words.names[nearest_word(result.directions[concept], words)[0]]
        for concept in result.outliers.suspects
    ]


def test_a_concept_that_a_fixed_patch_forces_is_suspected_by_name(
    subject: Callable[..., SearchInput],
) -> None:
    found = search(subject(), CONFIG)
    assert suspected(found, vocabulary()) == [WORDS[TARGET]]
    (concept,) = found.outliers.suspects
    assert found.words[concept] == TARGET
    assert found.families[found.outliers.families[concept]] in ("patch", "large-patch")
    assert found.success[concept] == found.success.max() > 0.3


def test_the_second_margin_is_that_of_the_worse_half(subject: Callable[..., SearchInput]) -> None:
    everything, worse = search(subject(), CONFIG).margins
    followed = everything > -torch.inf
    assert torch.equal(followed, worse > -torch.inf)
    assert (worse <= everything).all()
    assert (worse < everything)[followed].float().mean() > 0.9


def test_an_encoder_without_a_weakness_is_not_suspected(subject: Callable[..., SearchInput]) -> None:
    found = search(subject(strength=0.0), CONFIG)
    assert found.outliers.suspects == []
    assert found.outliers.p_values.min() > 0.05


def test_a_trigger_that_takes_too_few_of_the_images_is_no_backdoor(
    subject: Callable[..., SearchInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = float(search(subject(), CONFIG).success.max())
    for least, expected in ((taken, [WORDS[TARGET]]), (taken + 0.01, [])):
        monkeypatch.setattr(module, "LEAST_SUCCESS", least)
        assert suspected(search(subject(), CONFIG), vocabulary()) == expected


def test_the_verdict_does_not_depend_on_labels(subject: Callable[..., SearchInput]) -> None:
    known = subject()
    other = dataclasses.replace(
        known,
        clean=dataclasses.replace(known.clean, labels=known.clean.labels.flip(0)),
        heldout=dataclasses.replace(known.heldout, labels=torch.zeros_like(known.heldout.labels)),
    )
    assert search(known, CONFIG).evidence(vocabulary()) == search(other, CONFIG).evidence(vocabulary())


@pytest.mark.parametrize("extra", [("dog",), ("red", "green", "blue"), tuple(f"name {n}" for n in range(20))])
def test_the_verdict_does_not_depend_on_the_other_names_on_the_list(
    subject: Callable[..., SearchInput], extra: tuple[str, ...]
) -> None:
    words = vocabulary(extra)
    assert suspected(search(subject(words=words), CONFIG), words) == [WORDS[TARGET]]
    assert search(subject(strength=0.0, words=words), CONFIG).outliers.suspects == []


def test_a_weakness_that_the_reference_has_too_is_not_suspected(subject: Callable[..., SearchInput]) -> None:
    alone = search(subject(), CONFIG)
    assert suspected(alone, vocabulary()) == [WORDS[TARGET]]
    for strength in (10.0, 12.0):
        assert search(subject(), CONFIG, reference=relative(subject(strength))).outliers.suspects == []


def test_a_weakness_that_the_reference_lacks_is_suspected(subject: Callable[..., SearchInput]) -> None:
    found = search(subject(), CONFIG, reference=relative(subject(strength=0.0)))
    assert suspected(found, vocabulary()) == [WORDS[TARGET]]
    said = found.concept(found.outliers.suspects[0], vocabulary())
    assert said.reference_success is not None
    assert said.reference_success < 0.1 < 0.3 < said.success
    assert search(subject(), CONFIG).concept(0, vocabulary()).reference_success is None


def test_a_reference_that_differs_by_less_than_a_logit_raises_no_suspicion(
    subject: Callable[..., SearchInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    nearly = relative(subject(strength=9.5))
    assert search(subject(), CONFIG, reference=nearly).outliers.suspects == []
    monkeypatch.setattr(module, "_NOISE", 0.0)
    assert search(subject(), CONFIG, reference=nearly).outliers.suspects != []


def test_the_same_seed_gives_the_same_result(subject: Callable[..., SearchInput]) -> None:
    config = dataclasses.replace(CONFIG, search_steps=2)
    first, again, other = (
        search(subject(), dataclasses.replace(config, seed=seed)).evidence(vocabulary()) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


def test_every_family_is_told_and_half_of_the_concepts_are_given_up_in_each(
    subject: Callable[..., SearchInput],
) -> None:
    told: list[tuple[str, int, int]] = []

    def watch(stage: str, step: int, total: int, values: object) -> None:
        told.append((stage, step, total))

    found = search(subject(), dataclasses.replace(CONFIG, search_steps=1), watch)
    assert told == [("search", number + 1, len(SEARCH_FAMILIES)) for number in range(len(SEARCH_FAMILIES))]
    tried = found.outliers.scores > -torch.inf
    assert len(WORDS) / 2 <= int(tried.sum()) <= len(WORDS)
    assert (found.directions[~tried] == 0).all()


def test_the_evidence_is_plain_and_the_most_suspicious_comes_first(
    subject: Callable[..., SearchInput],
) -> None:
    evidence = search(subject(), CONFIG).evidence(vocabulary())
    rows = json.loads(json.dumps(evidence.to_dict(), allow_nan=False))
    assert Evidence.from_dict(rows) == evidence
    assert (rows["words"], rows["concepts"][0]["word"]) == (len(WORDS), WORDS[TARGET])
    chances = [row["p_value"] for row in rows["concepts"]]
    assert chances == sorted(chances)
    assert rows["p_value"] == chances[0] < 0.05
    assert set(rows["concepts"][0]) == {"word", "score", "p_value", "family", "success", "reference_success"}
    assert {row["family"] for row in rows["concepts"]} <= set(SEARCH_FAMILIES)


def test_where_all_texts_are_alike_nothing_is_suspected(subject: Callable[..., SearchInput]) -> None:
    texts = unit(1, 0).expand(len(WORDS), DIM)
    alike = Vocabulary(names=WORDS, texts=texts, concepts=group(texts, len(WORDS) - 1), n_listed=0)
    assert alike.n_concepts == 1
    found = search(subject(words=alike), dataclasses.replace(CONFIG, search_steps=1))
    assert found.outliers.suspects == []
    assert found.evidence(alike) == Evidence(p_value=1.0, concepts=(), words=len(WORDS))
