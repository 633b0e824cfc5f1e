"""What is measured: a classifier in this process or a server, and what its results say of it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from cbpt_runtime.artifacts.names import exists
from cbpt_runtime.bench.generator import Answers
from cbpt_runtime.bench.records import Stated
from cbpt_runtime.bench.triton import server_facts
from cbpt_runtime.classification import Classifier
from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.classification.classifier import SecondLook
from cbpt_runtime.errors import ConfigError
from cbpt_runtime.export.classifier import GraphClassifier, RepositoryClassifier
from cbpt_runtime.export.cpus import usable_cpus
from cbpt_runtime.export.manifest import PARITY
from cbpt_runtime.loading import kind_of, open_classifier
from cbpt_runtime.serving.client.classifier import RemoteClassifier
from cbpt_runtime.trust import ANYONE, Trust, refuse_untrusted

if TYPE_CHECKING:
    from cbpt_runtime.export.session import Provider

_ASKED_AT_ONCE = 8
_MAX_BATCH = 64  # of classifiers in this process, which divide larger ones
_TIMEOUT_S = 10.0


class Timing(NamedTuple):
    """Where the time of a batch went in this process."""

    images: int
    decode_s: float
    compute_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A classifier to be measured.

    Attributes:
        name: Short, unique in a result.
        classifier: In this process, or of a server.
        facts: What it is: digests, provider really used, threads, precision; as JSON can hold them.
        max_batch: Images at once at most.
        stated: Accuracy and attack success that somebody else measured.
    """

    name: str
    classifier: Classifier
    facts: dict[str, Any]
    max_batch: int
    stated: Stated = field(default_factory=Stated)

    @property
    def url(self) -> str | None:
        """Of a server; None of what runs in this process."""
        return self.classifier.source if self.classifier.kind == "url" else None

    @property
    def graph(self) -> Path | None:
        """The ONNX file, where there is one."""
        first = self.classifier.first if isinstance(self.classifier, SecondLook) else self.classifier
        return first.path if isinstance(first, GraphClassifier) else None

    def answer(self, files: Sequence[bytes]) -> Answers:
        """Return what it says about a few files; untimed."""
        size = min(_ASKED_AT_ONCE, self.max_batch)
        parts = [self._ask(files[start : start + size]) for start in range(0, len(files), size)]
        return Answers(
            labels=np.concatenate([part.labels for part in parts]),
            probabilities=np.concatenate([part.probabilities for part in parts]),
            alarms=np.concatenate([part.alarms for part in parts]),
        )

    def timed(self, files: Sequence[bytes]) -> tuple[Answers, Timing]:
        """Return the same of one batch in this process, and where the time went."""
        start = time.perf_counter()
        pixels = self.classifier.read(files)
        decoded = time.perf_counter()
        found = self.classifier.predict(pixels)
        done = time.perf_counter()
        timing = Timing(images=len(files), decode_s=decoded - start, compute_s=done - decoded)
        return Answers.of(found.probabilities, found.alarm), timing

    def _ask(self, files: Sequence[bytes]) -> Answers:
        if isinstance(self.classifier, RemoteClassifier):
            found = self.classifier.predict_files(files)
            return Answers.of(found.probabilities, found.alarm)
        return self.timed(files)[0]


def open_system(
    source: str,
    *,
    device: str = "cpu",
    provider: Provider = "cpu",
    threads: int | None = None,
    model: str | None = None,
    trust: Trust = ANYONE,
) -> System:
    """Open a bundle, an ONNX file, a model repository, or a server.

    Args:
        source: Path or URL.
        device: Of a bundle.
        provider: Of an ONNX file or repository.
        threads: Of all three; all usable CPUs when None.
        model: Of a server that has several.
        trust: What it has to show; an ONNX file or a server can show nothing.

    Raises:
        InputError: It is none of these, damaged, or not the trusted one.
        ServingError: The server does not answer.
    """
    kind = kind_of(source)
    if kind == "checkpoint":
        refuse_untrusted(source, trust)
        raise ConfigError(
            expected="a bundle, a model repository, an ONNX file of `cbpt-runtime export`, or a URL",
            got=f"{source}{'' if exists(Path(source)) else ', which does not exist'}",
            fix="For example: cbpt-runtime bench run bundle/ grpc://127.0.0.1:8001 --images photos/",
        )
    classifier = open_classifier(
        source,
        model=model,
        device=device,
        provider=provider,
        threads=threads,
        timeout_s=_TIMEOUT_S,
        trust=trust,
    )
    if isinstance(classifier, RemoteClassifier):
        return _served(classifier)
    if isinstance(classifier, SecondLook) and isinstance(classifier.first, GraphClassifier):
        return replace(_graph(classifier.first, threads), classifier=classifier)
    if isinstance(classifier, GraphClassifier):
        return _graph(classifier, threads)
    if isinstance(classifier, BundleClassifier):
        return _bundle(classifier, threads)
    raise TypeError(f"{classifier} is of no kind that can be measured")


def _bundle(classifier: BundleClassifier, threads: int | None) -> System:
    torch.set_num_threads(threads or usable_cpus())
    bundle = classifier.bundle
    metrics = bundle.metrics
    stated = Stated(
        where="the bundle's own held-out images and dummy triggers",
        clean_accuracy=metrics.get("heldout_ca_after"),
        attack_success_rate=metrics.get("dummy_success_after"),
    )
    return System(
        name=bundle.path.name,
        classifier=classifier,
        facts={
            "source": classifier.source,
            "engine": "PyTorch eager",
            "provider": torch.cuda.get_device_name() if classifier.place.startswith("cuda") else "cpu",
            "threads": torch.get_num_threads(),
            "precision": "fp32",
            "classes": len(bundle.class_names),
            "bundle_digest": bundle.digest,
            "checkpoint_sha256": bundle.origin.sha256,
            "verdict": bundle.verdict,
        },
        max_batch=_MAX_BATCH,
        stated=stated if metrics else Stated(),
    )


def _graph(classifier: GraphClassifier, threads: int | None) -> System:
    metadata = classifier.metadata
    facts = {
        "source": classifier.source,
        "engine": "onnxruntime in process",
        "provider": classifier.place,
        "threads": threads or usable_cpus(),
        "precision": metadata.get("cbpt.precision"),
        "classes": len(classifier.class_names),
        "second_look": classifier.looks_twice,
        "bundle_digest": metadata.get("cbpt.bundle_digest"),
        "checkpoint_sha256": metadata.get("cbpt.checkpoint_sha256"),
        "graph_sha256": classifier.graph_sha256,
        "verdict": classifier.verdict,
    }
    name, max_batch, stated = Path(classifier.source).name, _MAX_BATCH, Stated()
    if isinstance(classifier, RepositoryClassifier):
        repository, golden = classifier.repository, classifier.golden
        facts |= {
            "repository_digest": repository.digest,
            "golden_images": golden.images,
            "golden_largest_difference": golden.largest_difference,
        }
        max_batch = min(_MAX_BATCH, repository.manifest.profile.max_batch)
        gate = json.loads((repository.path / PARITY).read_text(encoding="utf-8")).get("precision") or {}
        if gate:
            stated = Stated(
                where="the precision gate of the export, on held-out images with dummy triggers",
                clean_accuracy=gate.get("accuracy"),
                attack_success_rate=gate.get("dummy_trigger_success"),
            )
    return System(name=name, classifier=classifier, facts=facts, max_batch=max_batch, stated=stated)


def _served(classifier: RemoteClassifier) -> System:
    info, url = classifier.info, classifier.source
    keys = ("bundle_digest", "checkpoint_sha256", "graph_sha256", "verdict")
    return System(
        name=f"{info.name} at {url}",
        classifier=classifier,
        facts={
            "source": url,
            "engine": "Triton",
            "model": info.name,
            "classes": len(info.class_names),
            "second_look": info.second_look,
            **{key: info.provenance.get(key) for key in keys},
            **server_facts(url, info.name),
        },
        max_batch=info.max_batch,
    )
