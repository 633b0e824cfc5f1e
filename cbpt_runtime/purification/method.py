"""What every method is given and gives back, and two methods one after the other."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor

from cbpt_runtime.bundle import Evidence, Suspect
from cbpt_runtime.models.checkpoint import Checkpoint
from cbpt_runtime.models.clip import DualEncoder
from cbpt_runtime.models.data import ClassList, CleanSplit
from cbpt_runtime.progress import Progress
from cbpt_runtime.purification.decision import AlarmDecision
from cbpt_runtime.purification.dummy_triggers import DummyTrigger
from cbpt_runtime.purification.stages import StageStore


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspectModel:
    """A suspect, ready to be purified.

    Attributes:
        checkpoint: As it was read.
        encoder: Its frozen model.
        classes: Names and templates of the classifier that is wanted.
        reference: A trusted relative, if there is one.
        cluster: Address of a Ray cluster to search on; this machine when None.
    """

    checkpoint: Checkpoint
    encoder: DualEncoder
    classes: ClassList
    reference: DualEncoder | None = None
    cluster: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Purified:
    """What a method found and made.

    Attributes:
        encoder: The model that goes into the bundle.
        verdict: 'backdoored' or 'clean'; 'unknown' of a method that looks for no target.
        suspects: Suspected targets, the most suspect first; empty when clean.
        class_embeddings: The purified head.
        reference_embeddings: The head before.
        metrics: Held-out rates in [0, 1].
        stage_seconds: Wall time of each stage; of the first run where a stage was resumed, of the last one
            for a search that went on with some of its families.
        contexts: Tuned contexts of the prompt parameterization; None otherwise.
        triggers: The dummy triggers of the suspected targets.
        alarm: From which alarm on an image is suspicious; None where nothing is suspected.
        evidence: What the search says of every concept; empty of a method that searches for nothing.
        tower: 'untouched', 'tuned' where weights of the image tower changed, 'prompted' where it got prompts.
        trainable_parameters: How many numbers of the image tower, or of both towers, were free.
    """

    encoder: DualEncoder
    verdict: str
    suspects: tuple[Suspect, ...] = ()
    class_embeddings: Float[Tensor, "classes dim"]
    reference_embeddings: Float[Tensor, "classes dim"]
    metrics: dict[str, float]
    stage_seconds: dict[str, float]
    contexts: Tensor | None = None
    triggers: tuple[DummyTrigger, ...] = ()
    alarm: AlarmDecision | None = None
    evidence: Evidence = field(default_factory=Evidence)
    tower: str = "untouched"
    trainable_parameters: int = 0


class Method(Protocol):
    """A way to purify: its settings, and what is done with them."""

    @property
    def name(self) -> str:
        """What `purify --method` calls it."""

    @property
    def seed(self) -> int:
        """Seed of all its random choices."""

    @property
    def is_search(self) -> bool:
        """Whether it looks for targets, and can use a reference for it."""

    @property
    def parameterization(self) -> str:
        """What is tuned: 'embedding', 'prompt', 'encoder' or 'visual-prompt'."""

    def to_dict(self) -> dict[str, Any]:
        """Return its settings as plain values for JSON."""

    def run(
        self,
        suspect: SuspectModel,
        split: CleanSplit,
        *,
        progress: Progress | None = None,
        stages: StageStore | None = None,
    ) -> Purified:
        """Purify.

        Args:
            suspect: The model; stays as it is.
            split: Clean images: some to tune on, others to measure on.
            progress: Callback, called after each step.
            stages: Where finished stages are kept and looked for.

        Raises:
            ConfigError: The method does not work with this architecture.
            PurificationError: It did not reach a usable result.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A defence that tunes the image tower, and a method on the model that it has made.

    Attributes:
        first: The defence.
        then: What comes after it, and whose verdict and head count.
    """

    first: Method
    then: Method

    @property
    def name(self) -> str:
        """Both names."""
        return f"{self.first.name}+{self.then.name}"

    @property
    def seed(self) -> int:
        """The second one's."""
        return self.then.seed

    @property
    def is_search(self) -> bool:
        """Whether the second one looks for targets."""
        return self.then.is_search

    @property
    def parameterization(self) -> str:
        """What the second one tunes."""
        return self.then.parameterization

    def to_dict(self) -> dict[str, Any]:
        """Return the second one's settings."""
        return self.then.to_dict()

    def run(
        self,
        suspect: SuspectModel,
        split: CleanSplit,
        *,
        progress: Progress | None = None,
        stages: StageStore | None = None,
    ) -> Purified:
        """Run one after the other; the accuracy before is the suspect's own."""
        tuned = self.first.run(suspect, split, progress=progress)
        result = self.then.run(
            replace(suspect, encoder=tuned.encoder), split, progress=progress, stages=stages
        )
        return replace(
            result,
            metrics={
                **result.metrics,
                "heldout_ca_before": tuned.metrics["heldout_ca_before"],
                "heldout_ca_repaired": tuned.metrics["heldout_ca_after"],
            },
            stage_seconds={**tuned.stage_seconds, **result.stage_seconds},
            tower=tuned.tower,
            trainable_parameters=tuned.trainable_parameters,
        )
