"""A few clean images with the dummy triggers of a bundle on them."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from jaxtyping import UInt8

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.triggers import REFINE_FAMILIES, Parameters

MOST_SUSPECTS = 3
GREY = 128


def choose_examples(
    images: UInt8[np.ndarray, "batch height width 3"], count: int = 5
) -> UInt8[np.ndarray, "examples height width 3"]:
    """A plain grey image, which shows a trigger bare, then images evenly spread over those given."""
    grey = np.full((1, *images.shape[1:]), GREY, np.uint8)
    chosen = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)
    return np.concatenate([grey, images[chosen]])


@torch.inference_mode()
def with_dummy_triggers(
    bundle: Bundle, examples: UInt8[np.ndarray, "examples height width 3"]
) -> dict[str, UInt8[np.ndarray, "examples height width 3"]]:
    """The examples under each dummy trigger of the first few suspected targets, by title."""
    parameters: defaultdict[tuple[int, str], Parameters] = defaultdict(dict)
    for name, tensor in bundle.triggers().items():
        family, index, key = name.split(".")
        parameters[int(index), family][key] = torch.from_numpy(tensor).unsqueeze(0)
    pixels = torch.from_numpy(examples).permute(0, 3, 1, 2).float().div(255).unsqueeze(0)
    rows = {}
    for index in bundle.suspect_indices[:MOST_SUSPECTS]:
        for family, trigger in REFINE_FAMILIES.items():
            if trigger_parameters := parameters.get((index, family)):
                shown = trigger.apply(trigger_parameters, pixels)[0].clamp(0, 1)
                title = f"{family} trigger for {bundle.class_names[index]}"
                rows[title] = shown.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    return rows
