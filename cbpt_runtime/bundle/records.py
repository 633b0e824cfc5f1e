"""What the manifest of a bundle says of the checkpoint, of how it was made, and of each suspected target.

A manifest is checked when it is read; what only newer bundles say has a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

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
    """A suspected target of a bundle; what a method does not say is None.

    Attributes:
        index: The class of the list that triggered images are called.
        name: The target's name, a class of the list or another word.
        on_list: Whether the target is a class of the list.
        score: Distance from the other concepts, in deviations.
        p_value: Chance of such a score if there were no backdoor, in [0, 1].
        family: The trigger family that shows it best.
        success_before: Share of held-out images that the head before calls the class under a dummy trigger.
        success_after: The same with the purified head.
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
            score=_number(suspect, "score"),
            p_value=_number(suspect, "p_value"),
            family=family if isinstance(family, str) else None,
            success_before=_number(suspect, "success_before"),
            success_after=_number(suspect, "success_after"),
        )


def _number(values: Mapping[str, Any], key: str) -> float | None:
    value = values.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
