"""Makes third-party CLIP checkpoints safe to serve.

The usual session: `scan` says whether a checkpoint has a backdoor; `purify_checkpoint` turns it, class names
and a few clean images into a `Bundle`; `ZeroShotClassifier` classifies with it; `evaluate` measures it.
Importing the package loads none of torch, open_clip, matplotlib or onnxruntime: each name below is imported
when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cbpt_runtime.bundle import Bundle, read_bundle
    from cbpt_runtime.classifier import Prediction, ZeroShotClassifier
    from cbpt_runtime.demo import run_demo
    from cbpt_runtime.errors import CbptError, InputError, WorkError
    from cbpt_runtime.evaluation import Evaluation, evaluate
    from cbpt_runtime.models.inspection import inspect_checkpoint
    from cbpt_runtime.pipeline import purify_checkpoint
    from cbpt_runtime.purification.config import PurifyConfig
    from cbpt_runtime.purification.scan import Scan, scan

    __version__: str

_HOMES = {
    "Bundle": "bundle",
    "CbptError": "errors",
    "Evaluation": "evaluation",
    "InputError": "errors",
    "Prediction": "classifier",
    "PurifyConfig": "purification.config",
    "Scan": "purification.scan",
    "WorkError": "errors",
    "ZeroShotClassifier": "classifier",
    "evaluate": "evaluation",
    "inspect_checkpoint": "models.inspection",
    "purify_checkpoint": "pipeline",
    "read_bundle": "bundle",
    "run_demo": "demo",
    "scan": "purification.scan",
}

__all__ = [
    "Bundle",
    "CbptError",
    "Evaluation",
    "InputError",
    "Prediction",
    "PurifyConfig",
    "Scan",
    "WorkError",
    "ZeroShotClassifier",
    "__version__",
    "evaluate",
    "inspect_checkpoint",
    "purify_checkpoint",
    "read_bundle",
    "run_demo",
    "scan",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("cbpt-runtime")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
