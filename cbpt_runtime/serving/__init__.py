"""Serving: what starts a Triton, guards and checks it, and its clients. No torch, no open_clip.

config   what an operator decides, and where Triton itself listens
triton   finds, starts, checks and keeps up a tritonserver: `running_server`
guard    the public ports in front of it
client   `AsyncClient` and `Client`, which ask it
page     the page for people

What runs inside Triton is `cbpt_runtime.runtime`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cbpt_runtime.serving.client.asynchronous import AsyncClient, ModelInfo, ServedPrediction
    from cbpt_runtime.serving.client.blocking import Client
    from cbpt_runtime.serving.config import ServeConfig
    from cbpt_runtime.serving.triton.launcher import RunningServer, running_server

_HOMES = {
    "AsyncClient": "client.asynchronous",
    "Client": "client.blocking",
    "ModelInfo": "client.asynchronous",
    "RunningServer": "triton.launcher",
    "ServeConfig": "config",
    "ServedPrediction": "client.asynchronous",
    "running_server": "triton.launcher",
}

__all__ = [
    "AsyncClient",
    "Client",
    "ModelInfo",
    "RunningServer",
    "ServeConfig",
    "ServedPrediction",
    "running_server",
]


def __getattr__(name: str) -> Any:
    # Lazily: who asks a server needs nothing of what starts one.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
