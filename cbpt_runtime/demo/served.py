"""The demo's last act: export the purified bundle, serve it on a real Triton, ask over the wire, stop."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbpt_runtime.classification.prediction import Answer
from cbpt_runtime.demo.story import DemoResult
from cbpt_runtime.errors import ConfigError

if TYPE_CHECKING:
    from cbpt_runtime.progress import Progress

REPOSITORY = "model_repository"
MAX_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedDemo:
    """What a real server said about two pictures.

    Attributes:
        repository: The exported model repository.
        server: Which server it was, and how the classifier ran.
        clean: Answer for a clean picture.
        triggered: Answer for the same picture with the trigger.
        seconds: From the start of the export to the end of the server.
    """

    repository: Path
    server: str
    clean: Answer
    triggered: Answer
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As a JSON-able dict."""
        return {**asdict(self), "repository": str(self.repository)}


def serve_demo(result: DemoResult, *, progress: Progress | None = None) -> ServedDemo | str:
    """Export the demo's bundle, serve it, classify a picture with and without the trigger, stop the server.

    Args:
        result: Of `run_demo`.
        progress: Told how far the work is.

    Returns:
        What the server said; or, where no tritonserver is installed, why nothing was served.

    Raises:
        ExportError: The parity gate failed.
        ServingError: The server did not start or answered wrongly.
    """
    from cbpt_runtime.export.profiles import Profile
    from cbpt_runtime.export.repository import export_bundle
    from cbpt_runtime.serving import Client, ServeConfig, running_server
    from cbpt_runtime.serving.triton.servers import find_server

    try:
        find_server()
    except ConfigError as error:
        return str(error)
    start = time.perf_counter()
    repository = result.output / REPOSITORY
    export_bundle(result.bundle, repository, name="demo", profile=Profile(max_batch=MAX_BATCH),
                  progress=progress)  # fmt: skip
    clean, triggered = _pair(result)
    config = ServeConfig(http_port=0, grpc_port=0, metrics_port=0)
    with running_server(repository, config) as server, Client(server.config.grpc_url) as client:
        answers = client.classify_files([(str(path), path) for path in (clean, triggered)], top=2)
        how = f"tritonserver {server.version}, {server.plan.placement.describe()}"
    return ServedDemo(
        repository=repository,
        server=how,
        clean=answers[0],
        triggered=answers[1],
        seconds=time.perf_counter() - start,
    )


def _pair(result: DemoResult) -> tuple[Path, Path]:
    """One test picture of another class than the target, without and with the trigger."""
    triggered = min(
        path for path in result.triggered_images.rglob("*.png") if path.parent.name != result.target
    )
    return result.test_images / triggered.relative_to(result.triggered_images), triggered
