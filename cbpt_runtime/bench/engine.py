"""A classifier of this process at the other end of a generator's pipe: decodes, forms batches, answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from cbpt_runtime.bench.generator import Observations
from cbpt_runtime.bench.targets import Target


@dataclass(kw_only=True)
class Stages:
    """Where the time of the engine went.

    Attributes:
        decode_ms: Per batch: files to pixels.
        compute_ms: Per batch: pixels to answers.
        images: Per batch.
    """

    decode_ms: list[float] = field(default_factory=list)
    compute_ms: list[float] = field(default_factory=list)
    images: list[int] = field(default_factory=list)

    def add(self, images: int, decode_s: float, compute_s: float) -> None:
        """One batch more."""
        self.decode_ms.append(1e3 * decode_s)
        self.compute_ms.append(1e3 * compute_s)
        self.images.append(images)

    def to_dict(self) -> dict[str, Any]:
        """Means per batch and per image."""
        count = sum(self.images)
        if not count:
            return {}
        return {
            "decode_ms_per_image": sum(self.decode_ms) / count,
            "compute_ms_per_image": sum(self.compute_ms) / count,
            "decode_ms_per_batch": float(np.mean(self.decode_ms)),
            "compute_ms_per_batch": float(np.mean(self.compute_ms)),
            "mean_batch_size": count / len(self.images),
        }


def answer_requests(
    target: Target, files: Sequence[bytes], connections: Sequence[Connection], counted_from: float
) -> tuple[list[Observations], Stages]:
    """Answer until every generator has sent what it saw.

    What waits when the engine is free becomes one batch, up to the target's largest. Batches from
    `time.monotonic` ``counted_from`` on are counted.
    """
    run = target.run
    if run is None:
        raise RuntimeError("only targets of this process")
    stages, seen = Stages(), []
    open_ends = list(connections)
    waiting: list[tuple[Connection, int, tuple[int, ...]]] = []
    while open_ends:
        for end in wait(open_ends, timeout=0 if waiting else None):
            if not isinstance(end, Connection):
                continue
            while end.poll():
                message = end.recv()
                if isinstance(message, Observations):
                    seen.append(message)
                    open_ends.remove(end)
                    break
                waiting.append((end, *message))
        batch = _next_batch(waiting, target.max_batch)
        if not batch:
            continue
        began = time.perf_counter()
        pixels = target.decode([files[image] for _, _, images in batch for image in images])
        decoded = time.perf_counter()
        answers = run(pixels)
        done = time.perf_counter()
        if time.monotonic() >= counted_from:
            stages.add(len(pixels), decoded - began, done - decoded)
        first = 0
        for end, number, images in batch:
            end.send((number, answers.rows(slice(first, first + len(images)))))
            first += len(images)
    return seen, stages


def _next_batch(
    waiting: list[tuple[Connection, int, tuple[int, ...]]], most: int
) -> list[tuple[Connection, int, tuple[int, ...]]]:
    """Takes requests from the front, as many as fit; a first one that is too large goes alone."""
    batch: list[tuple[Connection, int, tuple[int, ...]]] = []
    size = 0
    while waiting and (not batch or size + len(waiting[0][2]) <= most):
        batch.append(waiting.pop(0))
        size += len(batch[-1][2])
    return batch
