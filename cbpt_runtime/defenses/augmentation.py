"""Augmentation of images and captions as CleanCLIP and ABD use it."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

_CHANGED_RATE = 0.1
_MAX_SEED = 2**31


def auto_augmented(
    images: UInt8[np.ndarray, "batch height width 3"], generator: torch.Generator
) -> UInt8[np.ndarray, "batch height width 3"]:
    """Every image under a random sub-policy of AutoAugment's ImageNet policy (arXiv:1805.09501).

    torchvision draws from torch's global generator; it is seeded for the call and then put back.
    """
    from torchvision.transforms import AutoAugment

    policy = AutoAugment()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(drawn_seed(generator))
        return np.stack([np.asarray(policy(Image.fromarray(image))) for image in images])


def easily_augmented(text: str, rng: np.random.Generator) -> str:
    """A caption with about a tenth of its words, at least one, swapped, deleted or said twice.

    Three of the four operations of easy data augmentation (Wei and Zou, arXiv:1901.11196). Synonyms would
    need a thesaurus: none is put in place of a word, and the word inserted is one of the text.
    """
    words = text.split()
    operation = int(rng.integers(3))
    for _ in range(max(1, round(_CHANGED_RATE * len(words)))):
        first, second = (int(index) for index in rng.integers(len(words), size=2))
        if operation == 0:
            words[first], words[second] = words[second], words[first]
        elif operation == 1 and len(words) > 1:
            del words[first]
        else:
            words.insert(second, words[first])
    return " ".join(words)


def drawn_seed(generator: torch.Generator) -> int:
    """A seed for a generator of another kind."""
    return int(torch.randint(_MAX_SEED, (), generator=generator))
