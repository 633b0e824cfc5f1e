"""Triton's own account of a run: where the time of a request went, and how large the batches were."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from cbpt_runtime.errors import ServingError
from cbpt_runtime.serving.wire import Wire, WireError, open_wire

_TIMEOUT_S = 10.0
_PARTS = ("queue", "compute_input", "compute_infer", "compute_output")


def server_facts(url: str, model: str) -> dict[str, Any]:
    """Version of the server, and what its classifier runs on."""
    return asyncio.run(_facts(url, model))


def read_statistics(url: str, models: Sequence[str]) -> dict[str, Any]:
    """The counters of a few models as they stand, for `difference`."""
    return asyncio.run(_statistics(url, models))


def served_models(model: str) -> tuple[str, ...]:
    """The models one classifier is served as: the whole, and its steps."""
    return (model, f"{model}_preprocess", f"{model}_classifier", f"{model}_alarm")


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What happened in between, per model: requests, mean batch, and mean milliseconds of each part.

    The decoding time of a classifier is the compute time of its ``_preprocess`` model.
    """
    return {name: _one(before.get(name, {}), entry) for name, entry in after.items()}


def _one(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    def grown(*path: str) -> int:
        return _number(after, path) - _number(before, path)

    images, executions = grown("inference_count"), grown("execution_count")
    answered = grown("inference_stats", "success", "count")
    found: dict[str, Any] = {
        "images": images,
        "answered": answered,
        "failed": grown("inference_stats", "fail", "count"),
        "executions": executions,
        "mean_batch_size": images / executions if executions else None,
    }
    if answered:
        found["total_ms"] = grown("inference_stats", "success", "ns") / answered / 1e6
        for part in _PARTS:
            found[f"{part}_ms"] = grown("inference_stats", part, "ns") / answered / 1e6
    return found


def _number(entry: Mapping[str, Any], path: Sequence[str]) -> int:
    value: Any = entry
    for key in path:
        value = value.get(key, {})
    return int(value or 0)


async def _statistics(url: str, models: Sequence[str]) -> dict[str, Any]:
    wire = open_wire(url)
    try:
        return {name: await _asked(wire, url, name) for name in models}
    finally:
        await wire.close()


async def _asked(wire: Wire, url: str, name: str) -> dict[str, Any]:
    try:
        return await wire.statistics(name, _TIMEOUT_S)
    except WireError as error:
        raise ServingError(
            expected=f"the statistics of {name} from {url}",
            got=str(error),
            fix="Serve a repository of `cbpt-runtime export` there, with its statistics endpoint reachable.",
        ) from error


async def _facts(url: str, model: str) -> dict[str, Any]:
    wire = open_wire(url)
    try:
        server = await wire.server(_TIMEOUT_S)
        config = await wire.config(f"{model}_classifier", _TIMEOUT_S)
    except WireError as error:
        raise ServingError(
            expected=f"an answer from {url}", got=str(error), fix="Check that `cbpt-runtime serve` runs."
        ) from error
    finally:
        await wire.close()
    parameters = {
        key: entry.get("string_value", entry.get("stringValue"))
        for key, entry in config.get("parameters", {}).items()
    }
    groups = config.get("instance_group", config.get("instanceGroup", []))
    return {
        "server": f"{server.get('name', 'triton')} {server.get('version', 'unknown')}",
        "backend": config.get("backend"),
        "provider": parameters.get("provider"),
        "threads": parameters.get("intra_op_thread_count"),
        "instances": sum(int(group.get("count", 1)) for group in groups),
    }
