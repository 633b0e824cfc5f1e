"""Detectors of triggered images at test time, to compare the alarm with.

BDetCLIP ("BDetCLIP: multimodal prompting contrastive test-time backdoor detection", ICML 2025): a clean image
is much nearer to texts that describe its class than to texts that name the class beside something unrelated;
a triggered one was bound to the name and does not care. The published texts are written by a language model.
Ours are templates, so that no language model is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from cbpt_runtime.models.clip import DualEncoder
from cbpt_runtime.models.data import spoken

Detector = Literal["bdetclip"]
Score = Callable[[Float[np.ndarray, "batch dim"]], Float[np.ndarray, " batch"]]
"""From unit image features to one number per image, the larger the more suspicious."""

DESCRIBING = (
    "a photo of a {}.",
    "a clear photo of the {}, seen up close.",
    "a {} with its typical shape and colors.",
    "the typical texture and parts of a {}.",
    "a {} in the place where it is usually found.",
    "several views of the same {}.",
)
UNRELATED = (
    "{}, the minutes of the meeting.",
    "{} and the price of oil last year.",
    "{}, a chapter on tax law.",
    "{} or the second violin concerto.",
    "{}, terms and conditions apply.",
    "{} while the train was late again.",
)


def bdetclip(encoder: DualEncoder, names: Sequence[str]) -> Score:
    """BDetCLIP's score, with its sign turned so that larger is more suspicious.

    With `b_c` the class text that describes and `m_c` the unrelated one, each the unit mean
    over its templates, the published score is ``sum_c (cos(x, b_c) - cos(x, m_c))``; small means triggered.

    Args:
        encoder: The suspect, whose text tower makes the class texts.
        names: Class names.
    """
    contrast = _class_texts(encoder, names, DESCRIBING) - _class_texts(encoder, names, UNRELATED)
    direction = contrast.sum(dim=0).cpu().numpy()

    def score(features: Float[np.ndarray, "batch dim"]) -> Float[np.ndarray, " batch"]:
        suspicion: np.ndarray = -(features @ direction)
        return suspicion

    return score


@torch.no_grad()
def _class_texts(
    encoder: DualEncoder, names: Sequence[str], templates: Sequence[str]
) -> Float[Tensor, "classes dim"]:
    texts = [template.replace("{}", spoken(name)) for name in names for template in templates]
    features = encoder.encode_texts(texts).view(len(names), len(templates), -1)
    return normalize(features.mean(dim=1), dim=-1)
