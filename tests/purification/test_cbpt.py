from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cbpt_runtime.bundle import Concept, Evidence, Suspect
from cbpt_runtime.evaluation import evaluate
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import DualEncoder, load_dual_encoder
from cbpt_runtime.models.data import ClassList, CleanSplit
from cbpt_runtime.pipeline import purify_checkpoint
from cbpt_runtime.purification import search, vocabulary
from cbpt_runtime.purification.cbpt import Findings, purify
from cbpt_runtime.purification.config import PurifyConfig
from cbpt_runtime.purification.detection import Outliers
from cbpt_runtime.purification.stages import StageStore
from cbpt_runtime.purification.targets import Target

NAMES = ("cat", "dog", "fire truck", "banana")
QUICK = PurifyConfig(
    search_concepts=12,
    search_steps=2,
    search_batch=2,
    inversion_steps=2,
    inversion_batch=2,
    tuning_steps=3,
)
SUSPICIOUS = dataclasses.replace(QUICK, suspect_p_value=2.0)  # every concept is suspect


@pytest.fixture
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty background words instead of a thousand."""
    words = vocabulary.background_words()[:40]
    monkeypatch.setattr(vocabulary, "background_words", lambda: words)


def classes() -> ClassList:
    return ClassList(names=NAMES, templates=(("a photo of a {}.", "a {}."),) * len(NAMES))


def clean_split(heldout: int = 2) -> CleanSplit:
    rng = np.random.default_rng(0)
    return CleanSplit(
        tune_images=rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8),
        tune_labels=np.arange(12) % 4,
        heldout_images=rng.integers(0, 256, (4 * heldout, 32, 32, 3), dtype=np.uint8),
        heldout_labels=np.arange(4 * heldout) % 4,
        digest="x",
    )


@pytest.mark.usefixtures("few_words")
@pytest.mark.parametrize("parameterization", ["prompt", "embedding"])
def test_the_same_seed_gives_the_same_head(tiny_encoder: DualEncoder, parameterization: str) -> None:
    config = dataclasses.replace(SUSPICIOUS, parameterization=parameterization)
    first = purify(tiny_encoder, classes(), clean_split(), config)
    second = purify(tiny_encoder, classes(), clean_split(), config)
    assert first.verdict == "backdoored"
    assert 1 <= len(first.suspects) <= len(NAMES) // 2
    assert torch.equal(first.class_embeddings, second.class_embeddings)
    assert not torch.equal(first.class_embeddings, first.reference_embeddings)
    assert (first.contexts is None) == (parameterization == "embedding")
    families = ("blend", "mask", "patch", "small-patch")
    expected = sorted((family, suspect.index) for suspect in first.suspects for family in families)
    assert sorted((trigger.family, trigger.target) for trigger in first.triggers) == expected


@pytest.mark.usefixtures("few_words")
def test_bfloat16_searches_like_float32(tiny_encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    margins = []
    tested = search.find_outliers

    def noted(values: torch.Tensor, *more: Any, **others: Any) -> Outliers:
        margins.append(values)
        return tested(values, *more, **others)

    monkeypatch.setattr(search, "find_outliers", noted)
    for precision in ("fp32", "bf16"):
        purify(tiny_encoder, classes(), clean_split(), dataclasses.replace(QUICK, precision=precision))
    exact, mixed = margins
    both = (exact > -torch.inf) & (mixed > -torch.inf)
    assert both.float().mean() > 0.4
    assert not torch.equal(exact, mixed)
    assert torch.allclose(exact[both], mixed[both], atol=0.02)


@pytest.mark.usefixtures("few_words")
def test_a_clean_verdict_leaves_the_head_bit_identical(tiny_encoder: DualEncoder) -> None:
    config = dataclasses.replace(QUICK, suspect_p_value=1e-12)
    result = purify(tiny_encoder, classes(), clean_split(), config)
    assert (result.verdict, result.suspects, result.triggers) == ("clean", (), ())
    assert torch.equal(result.class_embeddings, result.reference_embeddings)
    assert result.metrics["heldout_ca_before"] == result.metrics["heldout_ca_after"]
    assert result.evidence.words == len(NAMES) + 40
    assert result.evidence.concepts[0].p_value == result.evidence.p_value > 1e-12


@pytest.mark.usefixtures("few_words")
def test_without_held_out_images_the_tune_images_are_measured(tiny_encoder: DualEncoder) -> None:
    result = purify(tiny_encoder, classes(), clean_split(heldout=0), QUICK)
    assert result.metrics["heldout_images"] == 12


@pytest.mark.usefixtures("few_words")
def test_finished_stages_are_not_run_again(tiny_encoder: DualEncoder, tmp_path: Path) -> None:
    store, seen = StageStore(tmp_path, "x"), []

    def watch(stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        seen.append(stage)

    first = purify(tiny_encoder, classes(), clean_split(), SUSPICIOUS, progress=watch, stages=store)
    assert seen
    seen.clear()
    again = purify(tiny_encoder, classes(), clean_split(), SUSPICIOUS, progress=watch, stages=store)
    assert seen == []
    assert torch.equal(first.class_embeddings, again.class_embeddings)
    assert first.suspects == again.suspects


@pytest.mark.usefixtures("few_words")
@pytest.mark.parametrize("kind", ["vit", "resnet", "custom-text", "siglip"])
def test_every_kind_of_tower_can_be_purified(kind: str, tiny_folder: Callable[..., Path]) -> None:
    encoder = load_dual_encoder(read_checkpoint(tiny_folder(kind)))
    result = purify(encoder, classes(), clean_split(), SUSPICIOUS)
    assert result.class_embeddings.isfinite().all()


@pytest.mark.nightly
def test_a_real_backdoor_is_named_and_stopped(shared_data: Path, tmp_path: Path) -> None:
    victim = shared_data / "victims" / "tiny-badnet"
    for archive in (shared_data / "data" / "tiny-imagenet-100.zip", victim / "test-triggered.zip"):
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(tmp_path / archive.stem)
    images = tmp_path / "tiny-imagenet-100" / "tiny-imagenet-100"
    names = sorted(folder.name for folder in (images / "train").iterdir())
    (tmp_path / "classes.txt").write_text("\n".join(names))
    bundle = purify_checkpoint(victim, tmp_path / "classes.txt", images / "train", tmp_path / "bundle")
    attack = json.loads((victim / "attack.json").read_text())
    result = evaluate(bundle, images / "val", tmp_path / "test-triggered", attack["target"])
    assert result.suspects[:1] == (attack["target"],)
    assert result.before.attack_success_rate is not None
    assert result.after.attack_success_rate is not None
    before, after = result.before.attack_success_rate.rate, result.after.attack_success_rate.rate
    assert before is not None
    assert after is not None
    assert before > 0.99
    assert after < 0.05
    assert result.before.clean_accuracy.rate is not None
    assert result.after.clean_accuracy.rate is not None
    assert result.after.clean_accuracy.rate > result.before.clean_accuracy.rate - 0.015
    assert result.alarm_auroc is not None
    assert result.alarm_auroc > 0.95


@pytest.mark.parametrize("count", [0, 2])
def test_what_the_search_found_is_the_same_after_a_resume(count: int, tmp_path: Path) -> None:
    texts = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    suspects = [
        Suspect(index=place, name=f"word {place}", on_list=False, score=9.0, p_value=0.001, family="patch")
        for place in range(count)
    ]
    concept = Concept(word="word 0", score=9.0, p_value=0.001, family="patch", success=1.0)
    found = Findings(
        targets=[Target(suspect=suspect, text=text) for suspect, text in zip(suspects, texts, strict=True)],
        evidence=Evidence(p_value=0.001, concepts=(concept,), words=40),
    )
    store = StageStore(tmp_path, "a")
    store.save("search", *found.to_stage())
    left = store.load("search")
    assert left is not None
    again = Findings.from_stage(*left)
    assert again.evidence == found.evidence
    assert [target.suspect for target in again.targets] == suspects
    assert all(torch.equal(target.text, text) for target, text in zip(again.targets, texts, strict=True))
