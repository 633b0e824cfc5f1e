"""More than a server can take: some answered, the rest refused with a reason, nothing lost, nothing wrong."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from cbpt_runtime.serving import ServeConfig, running_server

WAITING = 4  # requests a queue holds
BATCH = 8  # images per request, the most the server takes: no two requests share a batch
Load = Callable[..., Coroutine[Any, Any, Counter[str]]]
ChangedCopy = Callable[[Path, Mapping[str, Callable[[str], str]]], Path]

SLOW_MODEL = """
import time

class TritonPythonModel(TritonPythonModel):
    def execute(self, requests):
        time.sleep(0.1)
        return super().execute(requests)
"""


def queues(*, size: int, timeout_s: float) -> dict[str, Callable[[str], str]]:
    """How long the queues of all models are, and how long a request may wait in them."""

    def change(text: str) -> str:
        text = re.sub(r"(max_queue_size:) \d+", rf"\1 {size}", text)
        return re.sub(r"(default_timeout_microseconds:) \d+", rf"\1 {round(1e6 * timeout_s)}", text)

    return {"**/*.pbtxt": change}


def slow_classifier() -> dict[str, Callable[[str], str]]:
    """Each batch takes a tenth of a second more."""
    return {"shapes_classifier/1/model.py": lambda code: code + SLOW_MODEL}


def overfill(repository: Path, load: Load, pictures: Any, number: int, reason: str) -> None:
    """Ask for far more at once than a server can take, over each protocol."""
    config = ServeConfig(http_port=0, grpc_port=0, metrics_port=0, allow_foreign_code=True)
    with running_server(repository, config, tell=print) as server:
        for url, status in ((server.config.http_url, "HTTP 503"), (server.config.grpc_url, "UNAVAILABLE")):
            reasons: set[str] = set()
            options = {"at_once": number, "batch": BATCH, "timeout_s": 120, "retries": 0, "reasons": reasons}
            outcomes = asyncio.run(load(url, pictures, number, **options))
            print(url, dict(outcomes), reasons)
            assert outcomes["sent"] == number == outcomes["answered"] + outcomes["refused"]
            assert outcomes["answered"] >= 1
            assert outcomes["refused"] >= number // 4
            assert all(text.startswith(status) and reason in text for text in reasons), reasons
            later = asyncio.run(load(url, pictures, 5, at_once=1, timeout_s=120, retries=5))
            assert later == {"sent": 5, "answered": 5}
        assert server.restarts == 0


def test_a_full_queue_before_the_decoders_refuses_what_does_not_fit(
    changed_copy: ChangedCopy, load: Load, large: Any, tmp_path: Path
) -> None:
    """Large pictures keep the decoders busy; nothing but the length of the queues is changed."""
    copy = changed_copy(tmp_path / "repository", queues(size=WAITING, timeout_s=120))
    overfill(copy, load, large, 40, "Exceeds maximum queue size")


def test_a_full_queue_before_the_classifier_refuses_what_does_not_fit(
    changed_copy: ChangedCopy, load: Load, drawn: Any, tmp_path: Path
) -> None:
    copy = changed_copy(tmp_path / "repository", queues(size=WAITING, timeout_s=120) | slow_classifier())
    overfill(copy, load, drawn, 200, "Exceeds maximum queue size")


def test_a_request_that_waits_too_long_is_refused(
    changed_copy: ChangedCopy, load: Load, drawn: Any, tmp_path: Path
) -> None:
    copy = changed_copy(tmp_path / "repository", queues(size=1000, timeout_s=0.5) | slow_classifier())
    overfill(copy, load, drawn, 100, "Request timeout expired")
