from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cbpt_runtime.bundle import Concept, Evidence
from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import DualEncoder, load_dual_encoder
from cbpt_runtime.models.data import ClassList, draw_clean_split
from cbpt_runtime.purification import cbpt as purification
from cbpt_runtime.purification import vocabulary
from cbpt_runtime.purification.cbpt import purify
from cbpt_runtime.purification.clean_features import encode_clean
from cbpt_runtime.purification.config import PurifyConfig
from cbpt_runtime.purification.reference import comparison, reference_notes
from cbpt_runtime.purification.search import Reference, SearchInput

CLASSES = ClassList(names=("red_square", "green disc", "Blue Stripes"), templates=(("a {}.",),) * 3)


@pytest.fixture(autouse=True)
def _few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    words = vocabulary.background_words()[:200:8]
    monkeypatch.setattr(vocabulary, "background_words", lambda: words)


@pytest.fixture(scope="module")
def relative(tiny_relative_folder: Path) -> DualEncoder:
    return load_dual_encoder(read_checkpoint(tiny_relative_folder))


def asked(encoder: DualEncoder, classes: ClassList | None) -> SearchInput:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    clean = encode_clean(encoder.image_encoder, pixels, np.zeros(8, np.int64))
    texts = None if classes is None else encoder.class_embeddings(classes)
    return SearchInput(
        encoder=encoder.image_encoder,
        vocabulary=vocabulary.build_vocabulary(encoder, classes, texts, 8),
        scale=encoder.logit_scale,
        clean=clean.part(torch.arange(8) > 2),
        heldout=clean.part(torch.arange(8) <= 2),
    )


@pytest.mark.parametrize("classes", [None, CLASSES])
def test_a_reference_has_the_same_concepts_in_its_own_texts(
    tiny_encoder: DualEncoder, relative: DualEncoder, classes: ClassList | None
) -> None:
    suspect = asked(tiny_encoder, classes)
    other = comparison(relative, classes, suspect)
    assert other.vocabulary.names == suspect.vocabulary.names
    assert torch.equal(other.vocabulary.concepts, suspect.vocabulary.concepts)
    assert other.vocabulary.n_listed == suspect.vocabulary.n_listed
    alone = asked(relative, classes)
    torch.testing.assert_close(other.vocabulary.texts, alone.vocabulary.texts)
    assert not torch.equal(other.vocabulary.texts, suspect.vocabulary.texts)


def test_a_model_that_places_images_elsewhere_is_no_reference(
    tiny_encoder: DualEncoder, tiny_resnet_folder: Path
) -> None:
    stranger = load_dual_encoder(read_checkpoint(tiny_resnet_folder))
    with pytest.raises(CheckpointError, match="not fine-tuned from it"):
        comparison(stranger, CLASSES, asked(tiny_encoder, CLASSES))


@pytest.mark.parametrize(("concepts", "told"), [(0, False), (1, True), (23, True), (24, False)])
def test_a_verdict_among_few_concepts_says_how_weak_it_is(
    concepts: int, told: bool, tiny_relative_folder: Path
) -> None:
    one = Concept(word="cat", score=1.0, p_value=1.0, family="patch", success=0.0)
    evidence = Evidence(p_value=1.0, concepts=(one,) * concepts, words=concepts)
    notes = reference_notes(None, evidence)
    assert [f"only {concepts} groups" in note for note in notes] == [True] * told
    (beside,) = reference_notes(read_checkpoint(tiny_relative_folder), evidence)
    assert beside.startswith(f"compared with the reference {tiny_relative_folder}, SHA-256 ")
    assert reference_notes(None, Evidence()) == []


def test_a_purification_searches_beside_its_reference(
    tiny_encoder: DualEncoder,
    relative: DualEncoder,
    tiny_image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    split = draw_clean_split(tiny_image_folder, CLASSES, tiny_encoder.preprocess, shots=4)
    config = PurifyConfig(search_concepts=8, search_steps=2, search_batch=2, suspect_p_value=1e-9)
    seen: list[Reference | None] = []
    real: Callable = purification.search

    def listening(*args: object, reference: Reference | None = None, **others: object) -> object:
        seen.append(reference)
        return real(*args, reference=reference, **others)

    monkeypatch.setattr(purification, "search", listening)
    alone = purify(tiny_encoder, CLASSES, split, config)
    beside = purify(tiny_encoder, CLASSES, split, config, reference=relative)
    assert [subject is None for subject in seen] == [True, False]
    assert alone.verdict == beside.verdict == "clean"
    alone_scores, beside_scores = (
        {concept.score for concept in found.evidence.concepts} for found in (alone, beside)
    )
    assert alone_scores != beside_scores
