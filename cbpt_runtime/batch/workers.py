"""The classifier in a worker of the engine: one for each process, shared by its threads."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa

from cbpt_runtime.batch.partitions import ANSWER, failed, to_row
from cbpt_runtime.batch.references import Reference, contents, references_of
from cbpt_runtime.classification import Answer, Classifier
from cbpt_runtime.errors import BundleError
from cbpt_runtime.export.session import Provider
from cbpt_runtime.loading import open_classifier
from cbpt_runtime.trust import ANYONE, Trust

BATCH = 64
"""Images a thread decodes and classifies at once."""
_OPENING, _COMPUTING = threading.Lock(), threading.Lock()
_TORCH = ("bundle", "checkpoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a worker needs to know; travels to other machines.

    Attributes:
        classifier: Path or URL, the same on every machine.
        digest: What it must be there; None where it says none.
        top: Labels per image.
        model: Served model, where a server has several.
        provider: Of ONNX files and repositories.
        device: Of bundles.
        timeout_s: For one request to a server.
        trust: What it has to show.
    """

    classifier: str
    digest: str | None = None
    top: int = 5
    model: str | None = None
    provider: Provider = "cpu"
    device: str = "auto"
    timeout_s: float = 30.0
    trust: Trust = ANYONE


def open_for(work: Work) -> Classifier:
    """Return this process's classifier, opened once. One operator gets one thread: batches share the CPUs.

    Raises:
        BundleError: It is not the one the run began with.
    """
    with _OPENING:
        classifier = _opened(
            work.classifier, work.model, work.provider, work.device, work.timeout_s, work.trust
        )
    if work.digest is not None and classifier.digest != work.digest:
        raise BundleError(
            expected=f"the classifier of digest {work.digest} at {work.classifier}",
            got=f"one of digest {classifier.digest}",
            fix="Give every machine the same files.",
        )
    return classifier


def close_all() -> None:
    """Forget the classifier of this process; connections of one end with it."""
    with _OPENING:
        _opened.cache_clear()


@lru_cache(maxsize=1)
def _opened(
    source: str, model: str | None, provider: Provider, device: str, timeout_s: float, trust: Trust
) -> Classifier:
    return open_classifier(
        source, model=model, provider=provider, device=device, threads=1, timeout_s=timeout_s, trust=trust
    )


def answers(references: list[Reference], work: Work, io_config: Any) -> list[dict[str, Any]]:
    """Return the columns of some images.

    Raises:
        ServingError: A server does not answer.
    """
    classifier = open_for(work)
    found = contents(references, io_config, as_bytes=classifier.kind == "url")
    readable = [
        (reference.key, content)
        for reference, content in zip(references, found, strict=True)
        if not isinstance(content, str)
    ]
    # PyTorch gives each call all CPUs: one at a time, while other threads read files.
    with _COMPUTING if classifier.kind in _TORCH else nullcontext():
        said = iter(classifier.classify_each(readable, top=work.top))
    return [failed(content) if isinstance(content, str) else _row(next(said)) for content in found]


def _row(answer: Answer | Exception) -> dict[str, Any]:
    return to_row(answer) if isinstance(answer, Answer) else failed(getattr(answer, "got", str(answer)))


def make_labeller(daft: Any, work: Work, io_config: Any, *, gpus: int) -> Any:
    """Return the expression of the engine that answers references."""
    columns = daft.DataType.from_arrow_type(ANSWER)

    class Labeller:
        def __init__(self, work: Work, io_config: Any) -> None:
            self.work, self.io_config = work, io_config
            open_for(work)

        @daft.method.batch(return_dtype=columns, batch_size=BATCH)  # type: ignore[untyped-decorator]
        def label(self, *parts: Any) -> pa.Array:
            columns = [part.to_pylist() for part in parts]
            rows = answers(references_of(columns), self.work, self.io_config)
            return pa.array(rows, ANSWER)

    return daft.cls(Labeller, use_process=False, gpus=gpus)(work, io_config)
