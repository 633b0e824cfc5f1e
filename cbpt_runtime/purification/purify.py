"""The pipeline: find the suspected backdoor, tune the class prompts against it, measure what a defender can.

Source: class-wise backdoor prompt tuning (CBPT), Kong et al., "Neural Antidote", arXiv 2502.19269. The
paper's formulas are not public beyond its abstract: those used here are ours, see `docs/method.md`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cbpt_runtime.models.clip import DualEncoder
from cbpt_runtime.models.data import ClassList, CleanSplit
from cbpt_runtime.models.prompts import PromptEncoder
from cbpt_runtime.purification.config import PurifyConfig
from cbpt_runtime.purification.evidence import Evidence, gather
from cbpt_runtime.purification.inversion import Effect, invert, measure, subset
from cbpt_runtime.purification.rehearsal import (
    Rehearsal,
    judged,
    rehearse,
    strongest_success,
    tuning_data,
)
from cbpt_runtime.purification.stages import StageStore
from cbpt_runtime.purification.suspects import Suspect, joint_scores, p_values, smooth_scores
from cbpt_runtime.purification.tuning import Verdict, tune_in_rounds
from cbpt_runtime.settings import is_mixed
from cbpt_runtime.triggers import (
    PAINTED_FAMILIES,
    REFINE_FAMILIES,
    SEARCH_FAMILIES,
    SMOOTH_FAMILIES,
    Parameters,
)
from cbpt_runtime.types import Progress

_SEARCH_HELDOUT = 64
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
        evidence: Scores per class, for the report.
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
    progress: Progress | None = None,
    stages: StageStore | None = None,
) -> Purification:
    """Purifies the zero-shot head of a suspect CLIP; its encoders stay untouched.

    1. Search: a short inversion for every class in every search family; classes that stand out are suspected.
    2. Invert: long inversions for the suspected classes give the dummy triggers.
    3. Tune: class prompts are tuned on clean and dummy-triggered features with three losses.

    Args:
        encoder: The suspect.
        classes: Names and templates.
        split: A few clean images: some to tune on, others held out to measure on.
        config: All numbers.
        progress: Told how far the work is.
        stages: Where finished stages are kept and looked for.
    """
    seconds: dict[str, float] = {}
    with _Timer(seconds, "encode"):
        evidence = gather(encoder, classes, split, seed=config.seed)
    _, searched = _stage("search", stages, seconds, lambda: _search(evidence, config, progress))
    suspected = _suspected(searched, classes)
    found: Parameters = {}
    embeddings, contexts = evidence.texts, None
    if suspected:
        found, _ = _stage("invert", stages, seconds, lambda: _refine(evidence, suspected, config, progress))
    with _Timer(seconds, "rehearse"):
        rehearsals = rehearse(evidence, suspected, found, config.seed)
    if suspected:
        tuned, _ = _stage(
            "tune",
            stages,
            seconds,
            lambda: _tune(encoder, classes, evidence, suspected, rehearsals, config, progress),
        )
        embeddings, contexts = tuned["embeddings"].to(evidence.texts), tuned.get("contexts")
    return Purification(
        verdict="backdoored" if suspected else "clean",
        suspects=_suspects(evidence, suspected, searched, classes, rehearsals, embeddings),
        class_embeddings=embeddings,
        reference_embeddings=evidence.texts,
        contexts=contexts,
        triggers=found,
        metrics=_metrics(evidence, suspected, rehearsals, embeddings),
        stage_seconds=seconds,
        evidence=searched,
    )


def _search(evidence: Evidence, config: PurifyConfig, progress: Progress | None) -> Stage:
    """Scores of every class in every search family."""
    n_classes = len(evidence.texts)
    heldout = subset(evidence.heldout, _SEARCH_HELDOUT, torch.Generator().manual_seed(config.seed))
    families: dict[str, Any] = {}
    for name, family in SEARCH_FAMILIES.items():
        parameters = invert(
            evidence,
            family,
            range(n_classes),
            steps=config.search_steps * family.effort,
            batch=config.search_batch,
            seed=config.seed,
            mixed=is_mixed(config.precision, evidence.texts.device),
            progress=progress,
            stage=f"search {name} triggers",
        )
        effect = measure(evidence, family, parameters, range(n_classes), heldout)
        measured = asdict(effect) | {"score": _scores(name, effect)}
        families[name] = {key: value.tolist() for key, value in measured.items()}
    every = torch.tensor([family["score"] for family in families.values()])
    painted = torch.tensor([name in PAINTED_FAMILIES for name in families])
    scores, best = every.max(dim=0)
    values: dict[str, Any] = {
        "scores": scores.tolist(),
        "p_values": p_values(every[painted], every[~painted]).tolist(),
        "best_families": [list(families)[i] for i in best.tolist()],
        "families": families,
    }
    values["suspects"] = [
        index
        for index in scores.argsort(descending=True).tolist()
        if values["p_values"][index] < config.suspect_p_value
    ]
    return {}, values


def _scores(family: str, effect: Effect) -> Float[Tensor, " classes"]:
    if family in SMOOTH_FAMILIES:
        return smooth_scores(effect.to_text, effect.least_to_text, effect.collapse)
    return joint_scores(
        effect.to_text,
        effect.least_to_text,
        effect.to_prototype,
        effect.collapse,
        rescale=family not in PAINTED_FAMILIES,
    )


def _suspected(searched: dict[str, Any], classes: ClassList) -> list[int]:
    return [int(index) for index in searched["suspects"]][: max(1, len(classes.names) // 10)]


def _refine(
    evidence: Evidence, suspected: list[int], config: PurifyConfig, progress: Progress | None
) -> Stage:
    """Dummy triggers of the suspected classes, by name."""
    found: Parameters = {}
    for name, family in REFINE_FAMILIES.items():
        parameters = invert(
            evidence,
            family,
            suspected,
            steps=config.inversion_steps,
            batch=config.inversion_batch,
            seed=config.seed,
            mixed=is_mixed(config.precision, evidence.texts.device),
            progress=progress,
            stage=f"invert {name} triggers",
        )
        for position, index in enumerate(suspected):
            for key, value in parameters.items():
                found[f"{name}.{index}.{key}"] = value[position].contiguous()
    return found, {}


def _tune(
    encoder: DualEncoder,
    classes: ClassList,
    evidence: Evidence,
    suspected: list[int],
    rehearsals: list[Rehearsal],
    config: PurifyConfig,
    progress: Progress | None,
) -> Stage:
    data = tuning_data(evidence, suspected, rehearsals, config.seed)
    prompts = None
    if config.parameterization == "prompt":
        prompts = PromptEncoder(encoder, classes.names, context_length=config.context_length)

    def judge(head: Tensor) -> Verdict:
        return judged(evidence, suspected, rehearsals, head, config.success_goal)

    embeddings, contexts = tune_in_rounds(data, config, judge, prompts=prompts, progress=progress)
    return {"embeddings": embeddings} | ({} if contexts is None else {"contexts": contexts}), {}


def _suspects(
    evidence: Evidence,
    suspected: list[int],
    searched: dict[str, Any],
    classes: ClassList,
    rehearsals: list[Rehearsal],
    embeddings: Float[Tensor, "classes dim"],
) -> tuple[Suspect, ...]:
    return tuple(
        Suspect(
            index=index,
            name=classes.names[index],
            score=searched["scores"][index],
            p_value=searched["p_values"][index],
            family=searched["best_families"][index],
            success_before=strongest_success(evidence, index, rehearsals, evidence.texts),
            success_after=strongest_success(evidence, index, rehearsals, embeddings),
        )
        for index in suspected
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
