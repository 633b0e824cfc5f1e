"""Makes third-party CLIP checkpoints safe to serve.

    import cbpt_runtime as cbpt

    bundle = cbpt.purify("suspect/", "classes.txt", "clean/", "bundle/")
    print(cbpt.load(bundle)("photo.jpg"))

`scan` says whether a checkpoint has a backdoor; `purify` turns it, class names and a few clean images into a
`Bundle`; `load` makes a `Classifier` of one, or of what is exported or served; `evaluate` measures it;
`export_bundle` writes a Triton model repository, `verify_repository` checks one, `running_server` serves it
while a block runs, `Client` asks it.
Importing the package loads none of torch, open_clip, matplotlib or onnxruntime: each name below is imported
when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cbpt_runtime.bundle import Bundle, read_bundle
    from cbpt_runtime.classification import Answer, Classifier, Prediction
    from cbpt_runtime.demo import run_demo
    from cbpt_runtime.errors import CbptError, InputError, WorkError
    from cbpt_runtime.evaluation import Evaluation, evaluate
    from cbpt_runtime.export.repository import Exported, export_bundle
    from cbpt_runtime.export.verify import Verification, verify_repository
    from cbpt_runtime.loading import open_classifier as load
    from cbpt_runtime.models.inspection import inspect_checkpoint
    from cbpt_runtime.pipeline import purify_checkpoint
    from cbpt_runtime.pipeline import purify_checkpoint as purify
    from cbpt_runtime.purification.cbpt import Cbpt
    from cbpt_runtime.purification.config import PurifyConfig
    from cbpt_runtime.purification.scan import Scan, scan
    from cbpt_runtime.serving import Client, ServeConfig, running_server

    __version__: str

_HOMES = {
    "Answer": "classification",
    "Bundle": "bundle",
    "Cbpt": "purification.cbpt",
    "CbptError": "errors",
    "Classifier": "classification",
    "Client": "serving",
    "Evaluation": "evaluation",
    "Exported": "export.repository",
    "InputError": "errors",
    "Prediction": "classification",
    "PurifyConfig": "purification.config",
    "Scan": "purification.scan",
    "ServeConfig": "serving",
    "Verification": "export.verify",
    "WorkError": "errors",
    "evaluate": "evaluation",
    "export_bundle": "export.repository",
    "inspect_checkpoint": "models.inspection",
    "load": "loading:open_classifier",
    "purify": "pipeline:purify_checkpoint",
    "purify_checkpoint": "pipeline",
    "read_bundle": "bundle",
    "run_demo": "demo",
    "running_server": "serving",
    "scan": "purification.scan",
    "verify_repository": "export.verify",
}

__all__ = [
    "Answer",
    "Bundle",
    "Cbpt",
    "CbptError",
    "Classifier",
    "Client",
    "Evaluation",
    "Exported",
    "InputError",
    "Prediction",
    "PurifyConfig",
    "Scan",
    "ServeConfig",
    "Verification",
    "WorkError",
    "__version__",
    "evaluate",
    "export_bundle",
    "inspect_checkpoint",
    "load",
    "purify",
    "purify_checkpoint",
    "read_bundle",
    "run_demo",
    "running_server",
    "scan",
    "verify_repository",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("cbpt-runtime")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, _, known_as = _HOMES[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{home}"), known_as or name)


def __dir__() -> list[str]:
    return sorted(__all__)
