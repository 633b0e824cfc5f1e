"""Serving: what runs inside Triton, what starts and checks it, and its clients. No torch, no open_clip.

model      the models of Triton's python backend; travels inside the repository
servers    find a tritonserver and what it can do
config     what an operator decides
placement  which configuration, how many instances, threads of each
endpoint   where Triton itself listens, known to nobody else
admission  who may ask over HTTP, and what a question may look like; `grpc_admission` the same for gRPC
guard      the public ports: what is admitted is passed on, by `grpc_guard` over gRPC
room       how much of it is held at once
command    the hardened command line for the version found
process    one server process that leaves nothing behind
usage      its processes, memory and open files
leftovers  what killed launchers left behind, removed
log        its output: drained, its tail kept, its cause of failure found
selftest   the golden answers through the wire
plan       all that is decided and checked before a start
startup    from a plan to a server that is ready, or an error with its log
launcher   all of that in order, and again when it breaks: `running_server`
wire       HTTP and gRPC behind one interface
retries    what is sent again, and what is said in the end
client     `AsyncClient`, which does the work
blocking   `Client`, the same without await
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cbpt_runtime.serving.blocking import Client
    from cbpt_runtime.serving.client import AsyncClient, ModelInfo, ServedPrediction
    from cbpt_runtime.serving.config import ServeConfig
    from cbpt_runtime.serving.launcher import RunningServer, running_server

_HOMES = {
    "AsyncClient": "client",
    "Client": "blocking",
    "ModelInfo": "client",
    "RunningServer": "launcher",
    "ServeConfig": "config",
    "ServedPrediction": "client",
    "running_server": "launcher",
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
    # Lazily: this package is imported inside the server, which has none of the clients' libraries.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
