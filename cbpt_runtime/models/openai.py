"""The weights OpenAI published: their archives name no architecture, but shapes do; all use QuickGELU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.runtime.preprocess import OPENAI_MEAN, OPENAI_STD

_HEAD_WIDTH = 64
_RESNET_STRIDE = 32


def openai_settings(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """`model_cfg` and `preprocess_cfg` of OpenAI's weights, from their shapes.

    Raises:
        CheckpointError: Weights are missing without which the shapes say too little.
    """
    try:
        vision = _vit(tensors) if "visual.proj" in tensors else _resnet(tensors)
        width = tensors["ln_final.weight"].shape[0]
        config = {
            "embed_dim": tensors["text_projection"].shape[1],
            "quick_gelu": True,
            "vision_cfg": vision,
            "text_cfg": {
                "context_length": tensors["positional_embedding"].shape[0],
                "vocab_size": tensors["token_embedding.weight"].shape[0],
                "width": width,
                "heads": max(1, width // _HEAD_WIDTH),
                "layers": _count(tensors, "transformer.resblocks."),
            },
        }
    except (LookupError, ArithmeticError) as error:
        raise CheckpointError(
            expected="all weights of a CLIP as OpenAI published it",
            got=f"others ({type(error).__name__}: {error})",
            fix="Name the architecture the weights were trained with (--model).",
        ) from error
    return {"model_cfg": config, "preprocess_cfg": {"mean": OPENAI_MEAN, "std": OPENAI_STD}}


def _vit(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    width, _, _, patch_size = tensors["visual.conv1.weight"].shape
    grid = math.isqrt(tensors["visual.positional_embedding"].shape[0] - 1)
    return {
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "width": width,
        "head_width": min(width, _HEAD_WIDTH),
        "layers": _count(tensors, "visual.transformer.resblocks."),
    }


def _resnet(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    grid = math.isqrt(tensors["visual.attnpool.positional_embedding"].shape[0] - 1)
    return {
        "image_size": grid * _RESNET_STRIDE,
        "width": tensors["visual.layer1.0.conv1.weight"].shape[0],
        "layers": [_count(tensors, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)],
    }


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered parts there are under a prefix."""
    return len({name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)})
