"""The pipeline: find the suspected backdoor, tune the class prompts against it, measure what a defender can.

Source: class-wise backdoor prompt tuning (CBPT), Kong et al., "Neural Antidote", arXiv 2502.19269. The
paper's formulas are not public beyond its abstract: those used here are ours, see `docs/method.md`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cbpt_runtime.config import is_mixed
from cbpt_runtime.models.clip import DualEncoder
from cbpt_runtime.models.data import ClassList, CleanSplit
from cbpt_runtime.models.prompts import PromptEncoder
from cbpt_runtime.progress import Progress
from cbpt_runtime.purification.clean_features import Evidence, gather
from cbpt_runtime.purification.config import PurifyConfig
from cbpt_runtime.purification.detection import Suspect
from cbpt_runtime.purification.inversion import Goals, Inversion, invert
from cbpt_runtime.purification.reference import comparison
from cbpt_runtime.purification.search import SearchResult, Subject, search
from cbpt_runtime.purification.stages import StageStore
from cbpt_runtime.purification.targets import Target, landing, nearest_word, with_words
from cbpt_runtime.purification.trigger_families import REFINE_FAMILIES, Parameters
from cbpt_runtime.purification.triggered_features import (
    Rehearsal,
    judged,
    rehearse,
    strongest_success,
    tuning_data,
)
from cbpt_runtime.purification.tuning import Verdict, tune_in_rounds
from cbpt_runtime.purification.vocabulary import Vocabulary, build_vocabulary

Stage = tuple[dict[str, Tensor], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Purification:
    """What a purification found and made.

    Attributes:
        verdict: 'backdoored' or 'clean'.
        suspects: Suspected targets, the most suspect first; empty when clean.
        class_embeddings: The purified head; the reference itself when clean.
        reference_embeddings: The head before.
        contexts: Tuned contexts of the prompt parameterization; None otherwise.
        triggers: Parameters of the dummy triggers, named family, class index and parameter.
        metrics: Held-out rates in [0, 1].
        stage_seconds: Wall time of each stage; of the first run where a stage was resumed.
        evidence: What the search says of every concept, for the report.
    """

    verdict: str
    suspects: tuple[Suspect, ...]
    class_embeddings: Float[Tensor, "classes dim"]
    reference_embeddings: Float[Tensor, "classes dim"]
    contexts: Tensor | None
    triggers: dict[str, Tensor]
    metrics: dict[str, float]
    stage_seconds: dict[str, float]
    evidence: dict[str, Any]


def purify(
    encoder: DualEncoder,
    classes: ClassList,
    split: CleanSplit,
    config: PurifyConfig,
    *,
    reference: DualEncoder | None = None,
    progress: Progress | None = None,
    stages: StageStore | None = None,
) -> Purification:
    """Purifies the zero-shot head of a suspect CLIP; its encoders stay untouched.

    1. Search: a short inversion for every concept of an open vocabulary in every search family; concepts that
       stand out are suspected.
    2. Invert: long inversions for the suspected targets give the dummy triggers.
    3. Tune: class prompts are tuned on clean and dummy-triggered features with three losses.

    Args:
        encoder: The suspect.
        classes: Names and templates.
        split: A few clean images: some to tune on, others held out to measure on.
        config: All numbers.
        reference: A trusted relative; what both can be forced to counts less in the search.
        progress: Told how far the work is.
        stages: Where finished stages are kept and looked for.
    """
    seconds: dict[str, float] = {}
    with _Timer(seconds, "encode"):
        evidence = gather(encoder, classes, split, seed=config.seed)
    looked, searched = _stage(
        "search", stages, seconds, lambda: _search(encoder, classes, evidence, reference, config, progress)
    )
    targets = _targets(looked["texts"].to(evidence.texts), searched)
    suspected = [target.index for target in targets]
    found: Parameters = {}
    embeddings, contexts = evidence.texts, None
    if suspected:
        found, _ = _stage("invert", stages, seconds, lambda: _refine(evidence, targets, config, progress))
    with _Timer(seconds, "rehearse"):
        rehearsals = rehearse(evidence, targets, found, config.seed)
    if suspected:
        tuned, _ = _stage(
            "tune",
            stages,
            seconds,
            lambda: _tune(encoder, classes, evidence, targets, rehearsals, config, progress),
        )
        embeddings, contexts = tuned["embeddings"].to(evidence.texts), tuned.get("contexts")
    return Purification(
        verdict="backdoored" if suspected else "clean",
        suspects=_suspects(evidence, targets, rehearsals, embeddings),
        class_embeddings=embeddings,
        reference_embeddings=evidence.texts,
        contexts=contexts,
        triggers=found,
        metrics=_metrics(evidence, suspected, rehearsals, embeddings),
        stage_seconds=seconds,
        evidence=searched["evidence"],
    )


def _search(
    encoder: DualEncoder,
    classes: ClassList,
    evidence: Evidence,
    reference: DualEncoder | None,
    config: PurifyConfig,
    progress: Progress | None,
) -> Stage:
    """What the search says of every concept, and the targets it points to, with their texts."""
    vocabulary = build_vocabulary(
        encoder, classes, evidence.texts, config.search_concepts, background=config.background_words
    )
    subject = Subject(
        encoder=evidence.encoder,
        vocabulary=vocabulary,
        scale=evidence.scale,
        clean=evidence.tune,
        heldout=evidence.heldout,
    )
    other = None if reference is None else comparison(reference, classes, subject)
    result = search(subject, config, progress, reference=other)
    targets: list[Target] = []
    for concept in result.outliers.suspects:
        target = _target(result, vocabulary, concept)
        if target.index not in [known.index for known in targets]:
            targets.append(target)
    targets = targets[: max(1, len(classes.names) // 2)]
    values = {
        "evidence": result.to_dict(vocabulary),
        "targets": [
            {name: getattr(target, name) for name in Target.__slots__ if name != "text"} for target in targets
        ],
    }
    texts = [target.text for target in targets] or [evidence.texts.new_zeros(0)]
    return {"texts": torch.stack(texts)}, values


def _target(result: SearchResult, vocabulary: Vocabulary, concept: int) -> Target:
    direction, facts = result.directions[concept], result.facts(concept)
    word, on_list = nearest_word(direction, vocabulary)
    return Target(
        index=word if on_list else landing(direction, vocabulary.texts[: vocabulary.n_listed]),
        name=vocabulary.names[word],
        text=vocabulary.texts[word],
        on_list=on_list,
        score=facts["score"],
        p_value=facts["p_value"],
        family=facts["family"],
    )


def _targets(texts: Tensor, searched: dict[str, Any]) -> list[Target]:
    return [Target(text=text, **values) for text, values in zip(texts, searched["targets"], strict=False)]


def _refine(
    evidence: Evidence, targets: list[Target], config: PurifyConfig, progress: Progress | None
) -> Stage:
    """Dummy triggers of the suspected targets, by name."""
    texts, rows = with_words(evidence.texts, targets)
    found: Parameters = {}
    for number, (name, family) in enumerate(REFINE_FAMILIES.items()):
        inversion = Inversion(
            evidence.encoder,
            family,
            Goals.of_classes(texts, rows, evidence.scale),
            evidence.tune,
            batch=config.inversion_batch,
            seed=config.seed,
            mixed=is_mixed(config.precision, evidence.texts.device),
        )
        parameters = invert(inversion, config.inversion_steps)
        if progress is not None:
            progress("invert triggers", number + 1, len(REFINE_FAMILIES), {})
        for position, target in enumerate(targets):
            for key, value in parameters.items():
                found[f"{name}.{target.index}.{key}"] = value[position].contiguous()
    return found, {}


def _tune(
    encoder: DualEncoder,
    classes: ClassList,
    evidence: Evidence,
    targets: list[Target],
    rehearsals: list[Rehearsal],
    config: PurifyConfig,
    progress: Progress | None,
) -> Stage:
    data = tuning_data(evidence, targets, rehearsals, config.seed)
    suspected = [target.index for target in targets]
    prompts = None
    if config.parameterization == "prompt":
        prompts = PromptEncoder(encoder, classes.names, context_length=config.context_length)

    def judge(head: Tensor) -> Verdict:
        return judged(evidence, suspected, rehearsals, head, config.success_goal)

    embeddings, contexts = tune_in_rounds(data, config, judge, prompts=prompts, progress=progress)
    return {"embeddings": embeddings} | ({} if contexts is None else {"contexts": contexts}), {}


def _suspects(
    evidence: Evidence,
    targets: list[Target],
    rehearsals: list[Rehearsal],
    embeddings: Float[Tensor, "classes dim"],
) -> tuple[Suspect, ...]:
    return tuple(
        Suspect(
            index=target.index,
            name=target.name,
            on_list=target.on_list,
            score=target.score,
            p_value=target.p_value,
            family=target.family,
            success_before=strongest_success(evidence, target.index, rehearsals, evidence.texts),
            success_after=strongest_success(evidence, target.index, rehearsals, embeddings),
        )
        for target in targets
    )


def _metrics(
    evidence: Evidence,
    suspected: list[int],
    rehearsals: list[Rehearsal],
    embeddings: Float[Tensor, "classes dim"],
) -> dict[str, float]:
    labels = evidence.heldout.labels
    metrics: dict[str, float] = {"heldout_images": float(len(labels))}
    for when, head in (("before", evidence.texts), ("after", embeddings)):
        called = (evidence.heldout.features @ head.T).argmax(dim=1)
        metrics[f"heldout_ca_{when}"] = float((called == labels).float().mean())
        if suspected:
            targets = torch.tensor(suspected, device=labels.device)
            own = torch.isin(labels, targets)
            metrics[f"heldout_target_recall_{when}"] = float((called[own] == labels[own]).float().mean())
            metrics[f"heldout_floor_{when}"] = float(torch.isin(called[~own], targets).float().mean())
            metrics[f"dummy_success_{when}"] = max(
                strongest_success(evidence, index, rehearsals, head) for index in suspected
            )
    return metrics


def _stage(
    name: str, stages: StageStore | None, seconds: dict[str, float], work: Callable[[], Stage]
) -> Stage:
    """Runs a stage, or takes what an interrupted run has left of it."""
    left = None if stages is None else stages.load(name)
    if left is not None:
        tensors, values = left
        seconds[name] = values.pop("seconds")
        return tensors, values
    with _Timer(seconds, name):
        tensors, values = work()
    if stages is not None:
        stages.save(name, tensors, values | {"seconds": seconds[name]})
    return tensors, values


class _Timer:
    """Writes how long its block took into a dict."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds = seconds
        self._name = name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = time.perf_counter() - self._start
