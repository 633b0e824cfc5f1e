"""What several test folders need: a tiny bundle, made without any model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cbpt_runtime.bundle import BundleContent
from cbpt_runtime.models.preprocess import Preprocess

PREPROCESS = Preprocess(
    image_size=(32, 32),
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    interpolation="bicubic",
    resize_mode="squash",
    fill_color=0,
)


def unit_rows(generator: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    matrix = generator.standard_normal((rows, dim)).astype(np.float32)
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


@pytest.fixture
def make_content() -> Callable[..., BundleContent]:
    """Returns a function that makes the content of a small bundle; keyword arguments replace parts of it."""

    def make(names: tuple[str, ...] = ("cat", "fire truck", "banana"), **changes: Any) -> BundleContent:
        generator = np.random.default_rng(7)
        parts: dict[str, Any] = {
            "verdict": "backdoored",
            "model": {
                "config": {"embed_dim": 8},
                "preprocess": PREPROCESS.to_dict(),
                "source": "suspect",
                "format": "open_clip-folder",
                "sha256": "0" * 64,
                "dtype": "float32",
            },
            "class_names": names,
            "templates": tuple(("a photo of a {}.",) for _ in names),
            "method": {"name": "cbpt", "config": {"seed": 0}, "seed": 0, "parameterization": "prompt"},
            "class_embeddings": unit_rows(generator, len(names), 8),
            "reference_embeddings": unit_rows(generator, len(names), 8),
            "logit_scale": 100.0,
            "encoder": {"conv1.weight": generator.standard_normal((4, 3, 2, 2)).astype(np.float32)},
            "triggers": {"banana/patch/mask": np.ones((1, 32, 32), np.float32)},
            "suspects": (
                {
                    "index": len(names) - 1,
                    "name": names[-1],
                    "score": 9.1,
                    "p_value": 0.001,
                    "family": "patch",
                    "success_before": 0.97,
                    "success_after": 0.0,
                },
            ),
            "metrics": {"heldout_ca_before": 0.75, "heldout_ca_after": 0.74},
            "stage_seconds": {"inversion": 12.5, "tuning": 3.25},
            "versions": {"cbpt-runtime": "0.1.0"},
        }
        return BundleContent(**(parts | changes))

    return make
