"""Where units of work are done: on the device at hand, on all GPUs of this machine, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import fields, is_dataclass, replace
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

from cbpt_runtime.batch.engine import reach_cluster
from cbpt_runtime.errors import PurificationError
from cbpt_runtime.models.clip import ImageEncoder

T = TypeVar("T")
Work = Callable[[Any, str], Any]
_CPU = torch.device("cpu")


def in_parallel(
    work: Work, given: object, names: Sequence[str], device: torch.device, *, cluster: str | None = None
) -> Iterator[tuple[str, Any]]:
    """Units of work by name, as they are done, each on a device of one kind.

    A unit depends on nothing but what it is given, so that it gives the same wherever it is done on the same
    kind of device, on the CPU with the same number of threads.

    Args:
        work: Does a unit; a function of a module.
        given: What every unit gets, before its name: tensors, encoders, and tuples and dataclasses of them.
        names: Of the units.
        device: Where `given` is.
        cluster: Address of a Ray cluster; this machine when None.

    Raises:
        ConfigError: Ray is not installed, or the cluster does not answer.
        PurificationError: The cluster gave a unit up.
    """
    if cluster is not None:
        return _on_cluster(work, given, names, device, cluster)
    devices = devices_like(device)
    if len(devices) > 1:
        return _on_devices(work, given, names, devices)
    return ((name, work(given, name)) for name in names)


def devices_like(device: torch.device) -> list[torch.device]:
    """Return the devices of this machine that are of a kind; the CPU is one."""
    if device.type != "cuda":
        return [device]
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def moved(value: T, device: torch.device) -> T:
    """Return the same with all that is in it on a device; what is there already is not copied."""
    found: Any = value
    if isinstance(found, Tensor | ImageEncoder):
        found = found.to(device)
    elif isinstance(found, tuple):
        found = tuple(moved(one, device) for one in found)
    elif is_dataclass(found) and not isinstance(found, type):
        parts = {field.name: getattr(found, field.name) for field in fields(found)}
        found = replace(found, **{name: moved(part, device) for name, part in parts.items()})
    return found  # type: ignore[no-any-return]


def _on_devices(
    work: Work, given: object, names: Sequence[str], devices: list[torch.device]
) -> Iterator[tuple[str, Any]]:
    """Do the units in a thread for each device, which all have a copy."""
    free: SimpleQueue[tuple[Any, torch.device]] = SimpleQueue()
    for device in devices:
        free.put((moved(given, device), device))

    def unit(name: str) -> Any:
        own = free.get()
        try:
            return moved(work(own[0], name), _CPU)
        finally:
            free.put(own)

    pool = ThreadPoolExecutor(len(devices))
    try:
        waiting = {pool.submit(unit, name): name for name in names}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _on_cluster(
    work: Work, given: object, names: Sequence[str], device: torch.device, address: str
) -> Iterator[tuple[str, Any]]:
    """Do each unit in a Ray task; of a worker that dies, another does the unit."""
    ray = reach_cluster(address)
    try:
        threads = torch.get_num_threads()
        cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes()]
        needed = (
            {"num_gpus": 1} if device.type == "cuda" else {"num_cpus": min([threads, *filter(None, cpus)])}
        )
        task = ray.remote(scheduling_strategy="SPREAD", **needed)(_remote_unit)
        sent = ray.put(moved(given, _CPU))
        waiting = {task.remote(work, sent, name, device.type, threads): name for name in names}
        while waiting:
            (done, *_), _ = ray.wait(list(waiting))
            yield waiting.pop(done), ray.get(done)
    except ray.exceptions.RayError as error:
        raise PurificationError(
            expected=f"the units of the search from the Ray cluster at {address}",
            got=" ".join(str(error).split())[-300:],
            fix="Give every machine the same versions of this package and of torch; go on with --resume.",
        ) from error


def _remote_unit(work: Work, given: object, name: str, kind: str, threads: int) -> Any:
    torch.set_num_threads(threads)
    return moved(work(moved(given, torch.device(kind)), name), _CPU)
