"""What the manifest of a bundle says of the checkpoint, of how it was made, and of what was found.

A manifest is checked when it is read; what only newer bundles say has a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from cbpt_runtime.artifacts import finite_number, records_of
from cbpt_runtime.runtime.preprocess import Preprocess

_IMAGE_COUNTS = ("tune_images", "heldout_images", "split_digest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The suspect checkpoint of a bundle.

    Attributes:
        source: Where it was read from.
        sha256: Of its weights.
        config: open_clip's model configuration.
        preprocess: How an image becomes the model's pixels.
        format: Its layout; older bundles do not say.
    """

    source: str
    sha256: str
    config: dict[str, Any]
    preprocess: Preprocess
    format: str = ""

    @classmethod
    def from_dict(cls, model: Mapping[str, Any]) -> Self:
        """Read the manifest's `model`."""
        return cls(
            source=model["source"],
            sha256=model["sha256"],
            config=dict(model["config"]),
            preprocess=Preprocess.from_dict(model["preprocess"]),
            format=str(model.get("format", "")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """How a bundle was made.

    Attributes:
        method: Its name.
        parameterization: What of the prompts it tuned.
        seed: Of every random choice.
        encoder: 'untouched', or what it made of the suspect's image tower: 'tuned' or 'prompted'.
        labelled_by: 'folders', or 'suspect' where the checkpoint's own zero-shot head labelled the images.
        notes: Remarks for the user.
        images: ``tune_images``, ``heldout_images`` and ``split_digest``, where it says so.
    """

    method: str
    parameterization: str
    seed: int
    encoder: str = "untouched"
    labelled_by: str = "folders"
    notes: tuple[str, ...] = ()
    images: Mapping[str, int | str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, method: Mapping[str, Any]) -> Self:
        """Read the manifest's `method`."""
        return cls(
            method=method["name"],
            parameterization=method["parameterization"],
            seed=method["seed"],
            encoder=method.get("encoder", "untouched"),
            labelled_by=method.get("labelled_by", "folders"),
            notes=tuple(method.get("notes", ())),
            images={key: method[key] for key in _IMAGE_COUNTS if key in method},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """A target that a hidden trigger seems to be for; what a method does not say is None.

    Attributes:
        index: The class of the list that triggered images are called: the target itself, or what lies nearest
            to a target that is not on the list.
        name: The target's name, a class of the list or another word.
        on_list: Whether the target is a class of the list.
        score: Distance from the other concepts, in deviations.
        p_value: Chance of such a score in any concept if the encoder had no backdoor, in [0, 1].
        family: The trigger family that shows it best.
        success_before: Share in [0, 1] of held-out images of other classes that the reference head calls the
            class under the strongest dummy trigger.
        success_after: The same with the purified head, the largest over the dummy triggers.
    """

    index: int
    name: str
    on_list: bool = True
    score: float | None = None
    p_value: float | None = None
    family: str | None = None
    success_before: float | None = None
    success_after: float | None = None

    @classmethod
    def from_dict(cls, suspect: Mapping[str, Any]) -> Self:
        """Read one of the manifest's `suspects`."""
        family = suspect.get("family")
        return cls(
            index=suspect["index"],
            name=suspect["name"],
            on_list=suspect.get("on_list") is not False,
            score=finite_number(suspect.get("score")),
            p_value=finite_number(suspect.get("p_value")),
            family=family if isinstance(family, str) else None,
            success_before=finite_number(suspect.get("success_before")),
            success_after=finite_number(suspect.get("success_after")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Concept:
    """What the search says of one concept, a group of words of like meaning.

    Attributes:
        word: The one of its words that its trigger comes nearest to.
        score: Distance from the other concepts, in deviations.
        p_value: Chance of such a score in any concept if the encoder had no backdoor, in [0, 1].
        family: The trigger family that shows it best.
        success: Share in [0, 1] of held-out images that the family's trigger takes to the concept.
        reference_success: The same on the trusted reference; None without one.
    """

    word: str
    score: float
    p_value: float
    family: str
    success: float
    reference_success: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What the search says of all concepts; empty of a method that searches for nothing.

    Attributes:
        p_value: The smallest of all concepts, in [0, 1]; None where nothing was searched.
        concepts: Those whose trigger was followed to the end, the most suspicious first.
        words: How many words were searched for; None where nothing was searched.
    """

    p_value: float | None = None
    concepts: tuple[Concept, ...] = ()
    words: int | None = None

    @classmethod
    def from_dict(cls, evidence: Mapping[str, Any]) -> Self:
        """Read the manifest's `evidence`; what is not as it should be is left out."""
        words = evidence.get("words")
        return cls(
            p_value=finite_number(evidence.get("p_value")),
            concepts=records_of(Concept, evidence.get("concepts")),
            words=words if type(words) is int else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {} if self.words is None else asdict(self)
