"""Every number of a purification, checked on construction and saved in the bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cbpt_runtime.config import Above, Between, Config, Precision

Parameterization = Literal["embedding", "prompt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PurifyConfig(Config):
    """How to purify. The defaults were chosen on what a defender can see; `docs/method.md` tells how.

    Attributes:
        seed: Of every random choice.
        parameterization: Tune the class embeddings, or one context per class through the text tower.
        precision: Of the encoder while triggers are inverted; `auto` is bfloat16 where the processor has
            instructions for it, twice as fast. Whatever is measured is measured in float32.
        background_words: Search for open_clip's ImageNet names, too, and judge by them. Without them only for
            an encoder that knows nothing but the classes of the list.
        search_concepts: Groups of words that are searched, in every search family; at least 8, because each
            is judged by the others.
        search_steps: Steps of the short inversion, the second half of them for the better half of the
            concepts only; masks get twice as many, they have to travel.
        search_batch: Clean images per step and concept.
        inversion_steps: Steps of the long inversion.
        inversion_batch: Clean images per step of the long inversion.
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
        false_alarm_rate: Share of clean images, in [0, 1], that may be called suspicious.
    """

    seed: Annotated[int, Between(0)] = 0
    parameterization: Parameterization = "embedding"
    precision: Precision = "auto"
    background_words: bool = True
    search_concepts: Annotated[int, Between(8)] = 80
    search_steps: Annotated[int, Between(1)] = 30
    search_batch: Annotated[int, Between(1)] = 4
    suspect_p_value: Annotated[float, Above(0)] = 0.01
    inversion_steps: Annotated[int, Between(1)] = 60
    inversion_batch: Annotated[int, Between(1)] = 48
    tuning_steps: Annotated[int, Between(1)] = 150
    tuning_step_size: Annotated[float, Above(0)] = 0.02
    backdoor_weight: Annotated[float, Between(0)] = 2.0
    own_class_weight: Annotated[float, Between(0)] = 0.2
    tuning_rounds: Annotated[int, Between(1)] = 4
    max_trigger_success: Annotated[float, Between(0, 1)] = 0.0039
    consistency_weight: Annotated[float, Between(0)] = 1.0
    orthogonal_weight: Annotated[float, Between(0)] = 30.0
    target_consistency_weight: Annotated[float, Between(0)] = 0.01
    target_weight: Annotated[float, Above(0)] = 5.0
    context_length: Annotated[int, Between(1)] = 4
    false_alarm_rate: Annotated[float, Between(0, 1)] = 0.01
