"""Every number of a purification, checked on construction and saved in the bundle."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from cbpt_runtime.config import Precision, from_known_keys
from cbpt_runtime.errors import ConfigError

Parameterization = Literal["embedding", "prompt"]

_LEAST_CONCEPTS = 8
_POSITIVE_INTS = (
    "search_steps",
    "search_batch",
    "inversion_steps",
    "inversion_batch",
    "tuning_steps",
    "tuning_rounds",
    "context_length",
)
_POSITIVE = ("suspect_p_value", "tuning_step_size", "target_weight")
_NON_NEGATIVE = (
    "backdoor_weight",
    "own_class_weight",
    "consistency_weight",
    "orthogonal_weight",
    "target_consistency_weight",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PurifyConfig:
    """How to purify. The defaults were chosen on what a defender can see; `docs/method.md` tells how.

    Attributes:
        seed: Of every random choice.
        parameterization: Tune the class embeddings, or one context per class through the text tower.
        precision: Of the encoder while triggers are inverted; `auto` is bfloat16 where the processor has
            instructions for it, twice as fast. Whatever is measured is measured in float32.
        background_words: Search for open_clip's ImageNet names, too, and judge by them. Without them only for
            an encoder that knows nothing but the classes of the list.
        search_concepts: Groups of words that are searched, in every search family; at least 8, because each
            is check_head by the others.
        search_steps: Steps of the short inversion, the second half of them for the better half of the
            concepts only; masks get twice as many, they have to travel.
        search_batch: CleanFeatures images per step and concept.
        inversion_steps: Steps of the long inversion.
        inversion_batch: CleanFeatures images per step of the long inversion.
        suspect_p_value: Corrected p-value below which a target is suspected.
        tuning_steps: Steps of the head tuning.
        tuning_step_size: Its learning rate.
        backdoor_weight: Weight of the backdoor-alignment loss in the first round; doubled where it fails.
        own_class_weight: What a dummy-triggered image's own class counts in that loss beside the loss of not
            being called the suspected class; with 1 the two are plain cross-entropy.
        tuning_rounds: Most rounds of tuning, each with other weights, until held-out images accept the head.
        max_trigger_success: Held-out dummy-trigger success, in [0, 1], that is small enough; the floor, if
            larger.
        consistency_weight: Weight of the prompt-consistency loss.
        orthogonal_weight: What a change across the trigger directions counts in it on top.
        target_consistency_weight: What a suspected class counts in it; others count 1.
        target_weight: What a suspected class counts in the clean-alignment loss, in the first round; others
            count 1. Divided by √2 where the class is then said too often.
        context_length: Free vectors per class of the prompt parameterization.
    """

    seed: int = 0
    parameterization: Parameterization = "embedding"
    precision: Precision = "auto"
    background_words: bool = True
    search_concepts: int = 80
    search_steps: int = 30
    search_batch: int = 4
    suspect_p_value: float = 0.01
    inversion_steps: int = 60
    inversion_batch: int = 48
    tuning_steps: int = 150
    tuning_step_size: float = 0.02
    backdoor_weight: float = 2.0
    own_class_weight: float = 0.2
    tuning_rounds: int = 4
    max_trigger_success: float = 0.0039
    consistency_weight: float = 1.0
    orthogonal_weight: float = 30.0
    target_consistency_weight: float = 0.01
    target_weight: float = 5.0
    context_length: int = 4

    def __post_init__(self) -> None:
        for name, choices in (("parameterization", Parameterization), ("precision", Precision)):
            if getattr(self, name) not in get_args(choices):
                raise _bad(name, "one of " + ", ".join(get_args(choices)), getattr(self, name))
        if not isinstance(self.background_words, bool):
            raise _bad("background_words", "true or false", self.background_words)
        _check("seed", self.seed, int, 0, "a whole number of at least 0")
        _check(
            "search_concepts",
            self.search_concepts,
            int,
            _LEAST_CONCEPTS,
            f"a whole number of at least {_LEAST_CONCEPTS}",
        )
        for name in _POSITIVE_INTS:
            _check(name, getattr(self, name), int, 1, "a whole number of at least 1")
        for name in _POSITIVE:
            _check(name, getattr(self, name), (int, float), 1e-12, "a number above 0")
        for name in _NON_NEGATIVE:
            _check(name, getattr(self, name), (int, float), 0, "a number of at least 0")
        _check(
            "max_trigger_success", self.max_trigger_success, (int, float), 0, "a number from 0 to 1", most=1
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PurifyConfig:
        """From plain values.

        Raises:
            ConfigError: An unknown key or a bad value.
        """
        return from_known_keys(cls, values, "keys out of ")


def _check(
    name: str, value: Any, kind: Any, least: float, expected: str, most: float = sys.float_info.max
) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
        raise _bad(name, expected, value)


def _bad(name: str, expected: str, value: Any) -> ConfigError:
    return ConfigError(expected=f"{name} to be {expected}", got=repr(value), fix="Correct the value.")
