"""What is measured: a bundle in PyTorch, an ONNX file or repository in onnxruntime, or a server at a URL."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from cbpt_runtime.artifacts.names import exists
from cbpt_runtime.bench.links import Answers, answers_of
from cbpt_runtime.errors import ConfigError
from cbpt_runtime.export.cpus import usable_cpus
from cbpt_runtime.export.manifest import PARITY
from cbpt_runtime.loading import kind_of, open_classifier
from cbpt_runtime.models.preprocess import Preprocess, decode_image, to_pixels
from cbpt_runtime.trust import ANYONE, Trust, open_bundle, refuse_untrusted

if TYPE_CHECKING:
    from cbpt_runtime.bundle import Bundle
    from cbpt_runtime.export.classifier import GraphClassifier, RepositoryClassifier
    from cbpt_runtime.export.session import Provider

Pixels = UInt8[np.ndarray, "batch height width 3"]
_ASKED_AT_ONCE = 8
_INPUT = "images"
_OUTPUTS = ("probabilities", "alarm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Something that answers.

    Attributes:
        name: Short, unique in a run.
        kind: 'bundle', 'onnx', 'repository' or 'url'.
        facts: What it is: digests, provider really used, threads, precision; JSON-able.
        class_names: In the order of the class indices.
        class_folders: Of their images, where they are named otherwise; only bundles say.
        max_batch: Images at once at most.
        stated: Accuracy and attack success somebody else measured, by where that is written.
        preprocess: How a file becomes pixels; None for a server, which does that itself.
        run: From pixels to answers; None for a server.
        graph: The ONNX file, where there is one.
        url: Of a server.
        model: Its model.
    """

    name: str
    kind: str
    facts: dict[str, Any]
    class_names: tuple[str, ...]
    max_batch: int
    stated: dict[str, Any] = field(default_factory=dict)
    class_folders: tuple[str, ...] = ()
    preprocess: Preprocess | None = None
    run: Callable[[Pixels], Answers] | None = None
    graph: Path | None = None
    url: str | None = None
    model: str | None = None

    def decode(self, files: Sequence[bytes]) -> Pixels:
        """Files as the model takes them; not for a server."""
        if self.preprocess is None:
            raise RuntimeError("a server decodes by itself")
        return np.stack([to_pixels(decode_image(file), self.preprocess) for file in files])

    def answer(self, files: Sequence[bytes]) -> Answers:
        """What it says about a few files; untimed."""
        size = min(_ASKED_AT_ONCE, self.max_batch)
        batches = [files[start : start + size] for start in range(0, len(files), size)]
        if self.url is not None:
            parts = _ask_server(self.url, self.model, batches)
        else:
            run = self.run
            if run is None:
                raise RuntimeError("a target without a URL runs here")
            parts = [run(self.decode(batch)) for batch in batches]
        return Answers(
            labels=np.concatenate([part.labels for part in parts]),
            probabilities=np.concatenate([part.probabilities for part in parts]),
            alarms=np.concatenate([part.alarms for part in parts]),
        )


def open_target(
    source: str,
    *,
    device: str = "cpu",
    provider: Provider = "cpu",
    threads: int | None = None,
    model: str | None = None,
    trust: Trust = ANYONE,
) -> Target:
    """Open a bundle, an ONNX file, a model repository, or a server.

    Args:
        source: Path or URL.
        device: Of a bundle.
        provider: Of an ONNX file or repository.
        threads: Of both; all usable CPUs when None.
        model: Of a server that has several.
        trust: What it has to show; an ONNX file or a server can show nothing.

    Raises:
        InputError: It is none of these, damaged, or not the trusted one.
        ServingError: The server does not answer.
    """
    kind = kind_of(source)
    if kind in ("checkpoint", "url"):
        refuse_untrusted(source, trust)
    if kind == "checkpoint":
        raise ConfigError(
            expected="a bundle, a model repository, an ONNX file of `cbpt-runtime export`, or a URL",
            got=f"{source}{'' if exists(Path(source)) else ', which does not exist'}",
            fix="For example: cbpt-runtime bench run bundle/ grpc://127.0.0.1:8001 --images photos/",
        )
    if kind == "url":
        return _served(source, model)
    if kind == "bundle":
        return _bundle(open_bundle(source, trust), device, threads)
    from cbpt_runtime.export.classifier import GraphClassifier, RepositoryClassifier

    path = Path(source)
    if kind == "onnx":
        return _graph(GraphClassifier(path, provider=provider, threads=threads), threads)
    repository = RepositoryClassifier(path, provider=provider, threads=threads, trust=trust)
    return _in_repository(_graph(repository, threads), repository)


def _bundle(bundle: Bundle, device: str, threads: int | None) -> Target:
    import torch

    torch.set_num_threads(threads or usable_cpus())
    classifier = open_classifier(bundle, device=device)

    def run(pixels: Pixels) -> Answers:
        found = classifier.predict(pixels)
        return answers_of(found.probabilities, np.zeros(len(pixels)) if found.alarm is None else found.alarm)

    metrics = bundle.manifest.get("metrics") or {}
    stated = {
        "where": "the bundle's own held-out images and dummy triggers",
        "clean_accuracy": metrics.get("heldout_ca_after"),
        "attack_success_rate": metrics.get("dummy_success_after"),
    }
    return Target(
        name=bundle.path.name,
        kind="bundle",
        facts={
            "source": str(bundle.path),
            "engine": "PyTorch eager",
            "provider": torch.cuda.get_device_name() if classifier.place.startswith("cuda") else "cpu",
            "threads": torch.get_num_threads(),
            "precision": "fp32",
            "classes": len(bundle.class_names),
            "bundle_digest": bundle.digest,
            "checkpoint_sha256": bundle.manifest["model"].get("sha256"),
            "verdict": bundle.verdict,
        },
        class_names=bundle.class_names,
        class_folders=bundle.class_folders,
        max_batch=64,
        stated=stated if metrics else {},
        preprocess=bundle.preprocess,
        run=run,
    )


def _graph(classifier: GraphClassifier, threads: int | None) -> Target:
    session, metadata = classifier.session, classifier.metadata

    def run(pixels: Pixels) -> Answers:
        probabilities, alarm = session.run(list(_OUTPUTS), {_INPUT: pixels})
        return answers_of(probabilities, np.ravel(alarm))

    return Target(
        name=Path(classifier.source).name,
        kind=classifier.kind,
        facts={
            "source": classifier.source,
            "engine": "onnxruntime in process",
            "provider": classifier.place,
            "threads": threads or usable_cpus(),
            "precision": metadata.get("cbpt.precision"),
            "classes": len(classifier.class_names),
            "bundle_digest": metadata.get("cbpt.bundle_digest"),
            "checkpoint_sha256": metadata.get("cbpt.checkpoint_sha256"),
            "graph_sha256": classifier.graph_sha256,
            "verdict": classifier.verdict,
        },
        class_names=classifier.class_names,
        max_batch=64,
        preprocess=classifier.preprocess,
        run=run,
        graph=classifier.path,
    )


def _in_repository(target: Target, classifier: RepositoryClassifier) -> Target:
    """The same, with what its repository says of it."""
    repository, golden = classifier.repository, classifier.golden
    gate = json.loads((repository.path / PARITY).read_text(encoding="utf-8")).get("precision") or {}
    stated = {
        "where": "the precision gate of the export, on held-out images with dummy triggers",
        "clean_accuracy": gate.get("accuracy"),
        "attack_success_rate": gate.get("dummy_trigger_success"),
    }
    facts = {
        "repository_digest": repository.digest,
        "golden_images": golden.images,
        "golden_largest_difference": golden.largest_difference,
    }
    return replace(
        target,
        facts=target.facts | facts,
        stated=stated if gate else {},
        max_batch=int(repository.manifest["profile"]["max_batch"]),
    )


def _served(url: str, model: str | None) -> Target:
    from cbpt_runtime.bench.statistics import server_facts
    from cbpt_runtime.serving import Client

    with Client(url, model=model, timeout_s=10.0) as client:
        info = client.info()
    keys = ("bundle_digest", "checkpoint_sha256", "graph_sha256", "verdict")
    return Target(
        name=f"{info.name} at {url}",
        kind="url",
        facts={
            "source": url,
            "engine": "Triton",
            "model": info.name,
            "classes": len(info.class_names),
            **{key: info.provenance.get(key) for key in keys},
            **server_facts(url, info.name),
        },
        class_names=info.class_names,
        max_batch=info.max_batch,
        url=url,
        model=info.name,
    )


def _ask_server(url: str, model: str | None, batches: Sequence[Sequence[bytes]]) -> list[Answers]:
    from cbpt_runtime.serving import Client

    with Client(url, model=model) as client:
        found = [client.predict_files(batch) for batch in batches]
    return [answers_of(each.probabilities, each.alarm) for each in found]
