"""CBPT: find the suspected backdoor, tune the class prompts against it, measure what a defender can.

Source: class-wise backdoor prompt tuning (CBPT), Kong et al., "Neural Antidote", arXiv 2502.19269. The
paper's formulas are not public beyond its abstract: those used here are ours, see `docs/method.md`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from cbpt_runtime.bundle import Evidence, Suspect
from cbpt_runtime.config import is_mixed
from cbpt_runtime.models.clip import DualEncoder
from cbpt_runtime.models.data import ClassList, CleanSplit
from cbpt_runtime.models.prompts import PromptEncoder
from cbpt_runtime.progress import Progress
from cbpt_runtime.purification.clean_features import DefenderData, compute_features
from cbpt_runtime.purification.config import PurifyConfig
from cbpt_runtime.purification.decision import AlarmDecision, decide_between_heads
from cbpt_runtime.purification.dummy_triggers import DummyTrigger, from_tensors, to_tensors
from cbpt_runtime.purification.inversion import Goals, Inversion, invert
from cbpt_runtime.purification.method import Purified, SuspectModel
from cbpt_runtime.purification.reference import comparison
from cbpt_runtime.purification.search import SearchInput, SearchResult, search
from cbpt_runtime.purification.stages import StageStore
from cbpt_runtime.purification.targets import Target, landing, nearest_word, with_words
from cbpt_runtime.purification.trigger_families import INVERSION_FAMILIES
from cbpt_runtime.purification.triggered_features import (
    TriggeredFeatures,
    check_head,
    compute_triggered_features,
    strongest_success,
    tuning_data,
)
from cbpt_runtime.purification.tuning import HeadCheck, tune_in_rounds
from cbpt_runtime.purification.vocabulary import Vocabulary, build_vocabulary

_Stage = tuple[dict[str, Tensor], dict[str, Any]]  # how a stage is kept: tensors, and plain values


@dataclass(frozen=True, slots=True, kw_only=True)
class Cbpt(PurifyConfig):
    """Class-wise backdoor prompt tuning: the class prompts are tuned, the towers stay as they are."""

    name: ClassVar[str] = "cbpt"
    is_search: ClassVar[bool] = True

    def run(
        self,
        suspect: SuspectModel,
        split: CleanSplit,
        *,
        progress: Progress | None = None,
        stages: StageStore | None = None,
    ) -> Purified:
        """Look for targets, and tune the head where there are some."""
        return purify(
            suspect.encoder,
            suspect.classes,
            split,
            self,
            reference=suspect.reference,
            progress=progress,
            stages=stages,
            cluster=suspect.cluster,
        )


def purify(
    encoder: DualEncoder,
    classes: ClassList,
    split: CleanSplit,
    config: PurifyConfig,
    *,
    reference: DualEncoder | None = None,
    progress: Progress | None = None,
    stages: StageStore | None = None,
    cluster: str | None = None,
) -> Purified:
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
        reference: The trusted model that the suspect was fine-tuned from: natural triggers work on both.
        progress: Told how far the work is.
        stages: Where finished stages are kept and looked for.
        cluster: Address of a Ray cluster to search on; this machine when None.
    """
    seconds: dict[str, float] = {}
    with _Timer(seconds, "encode"):
        defender = compute_features(encoder, classes, split, seed=config.seed)
    tensors, values = _stage(
        "search",
        stages,
        seconds,
        lambda: _search(encoder, classes, defender, reference, config, progress, stages, cluster).to_stage(),
    )
    found = Findings.from_stage({name: tensor.to(defender.texts) for name, tensor in tensors.items()}, values)
    targets = found.targets
    suspected = [target.index for target in targets]
    triggers: list[DummyTrigger] = []
    embeddings, contexts = defender.texts, None
    if suspected:
        inverted, _ = _stage("invert", stages, seconds, lambda: _invert(defender, targets, config, progress))
        triggers = from_tensors(inverted)
    with _Timer(seconds, "rehearse"):
        triggered_sets = compute_triggered_features(defender, targets, triggers, config.seed)
    if suspected:
        tuned, _ = _stage(
            "tune",
            stages,
            seconds,
            lambda: _tune(encoder, classes, defender, targets, triggered_sets, config, progress),
        )
        embeddings, contexts = tuned["embeddings"].to(defender.texts), tuned.get("contexts")
    return Purified(
        encoder=encoder,
        verdict="backdoored" if suspected else "clean",
        suspects=_suspects(defender, targets, triggered_sets, embeddings),
        class_embeddings=embeddings,
        reference_embeddings=defender.texts,
        contexts=contexts,
        triggers=tuple(triggers),
        metrics=_metrics(defender, suspected, triggered_sets, embeddings),
        stage_seconds=seconds,
        alarm=_decision(encoder, defender, suspected, embeddings, config) if suspected else None,
        evidence=found.evidence,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What the search leaves to the stages after it.

    Attributes:
        targets: The suspected targets, the most suspicious first; empty when clean.
        evidence: What it says of every concept.
    """

    targets: list[Target]
    evidence: Evidence

    def to_stage(self) -> _Stage:
        """Return it as a stage is kept."""
        texts = [target.text for target in self.targets]
        suspects = [asdict(target.suspect) for target in self.targets]
        return (
            {"texts": torch.stack(texts) if texts else torch.zeros(0)},
            {"evidence": self.evidence.to_dict(), "targets": suspects},
        )

    @classmethod
    def from_stage(cls, tensors: dict[str, Tensor], values: dict[str, Any]) -> Self:
        """Undo `to_stage`."""
        suspects = map(Suspect.from_dict, values["targets"])
        return cls(
            targets=[
                Target(suspect=suspect, text=text)
                for suspect, text in zip(suspects, tensors["texts"], strict=True)
            ],
            evidence=Evidence.from_dict(values["evidence"]),
        )


def _search(
    encoder: DualEncoder,
    classes: ClassList,
    defender: DefenderData,
    reference: DualEncoder | None,
    config: PurifyConfig,
    progress: Progress | None,
    stages: StageStore | None,
    cluster: str | None,
) -> Findings:
    """Search, and find the targets it points to."""
    vocabulary = build_vocabulary(
        encoder, classes, defender.texts, config.search_concepts, background=config.background_words
    )
    subject = SearchInput(
        encoder=defender.encoder,
        vocabulary=vocabulary,
        scale=defender.scale,
        clean=defender.tune,
        heldout=defender.heldout,
    )
    other = None if reference is None else comparison(reference, classes, subject)
    result = search(subject, config, progress, reference=other, stages=stages, cluster=cluster)
    targets: list[Target] = []
    for concept in result.outliers.suspects:
        target = _target(result, vocabulary, concept)
        if target.index not in [known.index for known in targets]:
            targets.append(target)
    most = max(1, len(classes.names) // 2)
    return Findings(targets=targets[:most], evidence=result.evidence(vocabulary))


def _target(result: SearchResult, vocabulary: Vocabulary, concept: int) -> Target:
    direction, said = result.directions[concept], result.concept(concept, vocabulary)
    word, on_list = nearest_word(direction, vocabulary)
    suspect = Suspect(
        index=word if on_list else landing(direction, vocabulary.texts[: vocabulary.n_listed]),
        name=vocabulary.names[word],
        on_list=on_list,
        score=said.score,
        p_value=said.p_value,
        family=said.family,
    )
    return Target(suspect=suspect, text=vocabulary.texts[word])


def _invert(
    defender: DefenderData, targets: list[Target], config: PurifyConfig, progress: Progress | None
) -> _Stage:
    """Invert dummy triggers of the suspected targets, as tensors."""
    texts, rows = with_words(defender.texts, targets)
    triggers: list[DummyTrigger] = []
    for number, (name, family) in enumerate(INVERSION_FAMILIES.items()):
        inversion = Inversion(
            defender.encoder,
            family,
            Goals.of_classes(texts, rows, defender.scale),
            defender.tune,
            batch=config.inversion_batch,
            seed=config.seed,
            mixed=is_mixed(config.precision, defender.texts.device),
        )
        parameters = invert(inversion, config.inversion_steps)
        if progress is not None:
            progress("invert triggers", number + 1, len(INVERSION_FAMILIES), {})
        for position, target in enumerate(targets):
            own = {key: value[position] for key, value in parameters.items()}
            triggers.append(DummyTrigger(family=name, target=target.index, parameters=own))
    return to_tensors(triggers), {}


def _tune(
    encoder: DualEncoder,
    classes: ClassList,
    defender: DefenderData,
    targets: list[Target],
    triggered_sets: list[TriggeredFeatures],
    config: PurifyConfig,
    progress: Progress | None,
) -> _Stage:
    data = tuning_data(defender, targets, triggered_sets, config.seed)
    suspected = [target.index for target in targets]
    prompts = None
    if config.parameterization == "prompt":
        prompts = PromptEncoder(encoder, classes.names, context_length=config.context_length)

    def check(head: Tensor) -> HeadCheck:
        return check_head(defender, suspected, triggered_sets, head, config.max_trigger_success)

    embeddings, contexts = tune_in_rounds(data, config, check, prompts=prompts, progress=progress)
    return {"embeddings": embeddings} | ({} if contexts is None else {"contexts": contexts}), {}


def _suspects(
    defender: DefenderData,
    targets: list[Target],
    triggered_sets: list[TriggeredFeatures],
    embeddings: Float[Tensor, "classes dim"],
) -> tuple[Suspect, ...]:
    return tuple(
        replace(
            target.suspect,
            success_before=strongest_success(target.index, triggered_sets, defender.texts),
            success_after=strongest_success(target.index, triggered_sets, embeddings),
        )
        for target in targets
    )


def _metrics(
    defender: DefenderData,
    suspected: list[int],
    triggered_sets: list[TriggeredFeatures],
    embeddings: Float[Tensor, "classes dim"],
) -> dict[str, float]:
    labels = defender.heldout.labels
    metrics: dict[str, float] = {"heldout_images": float(len(labels))}
    for when, head in (("before", defender.texts), ("after", embeddings)):
        called = (defender.heldout.features @ head.T).argmax(dim=1)
        metrics[f"heldout_ca_{when}"] = float((called == labels).float().mean())
        if suspected:
            targets = torch.tensor(suspected, device=labels.device)
            own = torch.isin(labels, targets)
            metrics[f"heldout_target_recall_{when}"] = float((called[own] == labels[own]).float().mean())
            metrics[f"heldout_floor_{when}"] = float(torch.isin(called[~own], targets).float().mean())
            metrics[f"dummy_success_{when}"] = max(
                strongest_success(index, triggered_sets, head) for index in suspected
            )
    return metrics


def _decision(
    encoder: DualEncoder,
    defender: DefenderData,
    suspected: list[int],
    embeddings: Float[Tensor, "classes dim"],
    config: PurifyConfig,
) -> AlarmDecision:
    return decide_between_heads(
        defender.heldout.features.cpu().numpy(),
        defender.texts.cpu().numpy(),
        embeddings.detach().cpu().numpy(),
        suspected,
        logit_scale=encoder.logit_scale,
        logit_bias=encoder.logit_bias,
        false_alarm_rate=config.false_alarm_rate,
        held_out=defender.heldout is not defender.tune,
    )


def _stage(
    name: str, stages: StageStore | None, seconds: dict[str, float], work: Callable[[], _Stage]
) -> _Stage:
    """Run a stage, or take what an interrupted run has left of it."""
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
