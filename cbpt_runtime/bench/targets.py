"""What is measured: a bundle in PyTorch, an ONNX file or repository in onnxruntime, or a server at a URL."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cbpt_runtime.artifacts import read_regular_file
from cbpt_runtime.artifacts.names import exists, is_file
from cbpt_runtime.bench.links import Answers, answers_of
from cbpt_runtime.errors import ConfigError
from cbpt_runtime.export.cpus import usable_cpus
from cbpt_runtime.export.session import Provider
from cbpt_runtime.models.preprocess import Preprocess, decode_image, to_pixels
from cbpt_runtime.trust import ANYONE, Trust, open_bundle, open_repository, refuse_untrusted

Pixels = UInt8[np.ndarray, "batch height width 3"]
_URLS = ("grpc://", "grpcs://", "http://", "https://")
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
    from cbpt_runtime.bundle import MANIFEST
    from cbpt_runtime.export.manifest import is_repository

    if source.startswith(_URLS):
        refuse_untrusted(source, trust)
        return _open_url(source, model)
    path = Path(source)
    if is_repository(path):
        return _open_repository(path, provider, threads, trust)
    if is_file(path / MANIFEST):
        return _open_bundle(path, device, threads, trust)
    refuse_untrusted(source, trust)
    if path.suffix == ".onnx" and is_file(path):
        return _open_graph(path, provider, threads)[1]
    raise ConfigError(
        expected="a bundle, a model repository, an ONNX file of `cbpt-runtime export`, or a URL",
        got=f"{source}{'' if exists(path) else ', which does not exist'}",
        fix="For example: cbpt-runtime bench run bundle/ grpc://127.0.0.1:8001 --images photos/",
    )


def _open_bundle(path: Path, device: str, threads: int | None, trust: Trust) -> Target:
    import torch

    from cbpt_runtime.classifier import ZeroShotClassifier

    bundle = open_bundle(path, trust)
    torch.set_num_threads(threads or usable_cpus())
    classifier = ZeroShotClassifier.from_bundle(bundle, device)

    def run(pixels: Pixels) -> Answers:
        found = classifier.predict(pixels)
        return answers_of(found.probabilities, found.alarm)

    metrics = bundle.manifest.get("metrics") or {}
    stated = {
        "where": "the bundle's own held-out images and dummy triggers",
        "clean_accuracy": metrics.get("heldout_ca_after"),
        "attack_success_rate": metrics.get("dummy_success_after"),
    }
    place = classifier.device.type
    return Target(
        name=path.name,
        kind="bundle",
        facts={
            "source": str(path),
            "engine": "PyTorch eager",
            "provider": torch.cuda.get_device_name() if place == "cuda" else "cpu",
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


def _open_repository(path: Path, provider: Provider, threads: int | None, trust: Trust) -> Target:
    from dataclasses import replace

    from cbpt_runtime.export.golden import read_golden
    from cbpt_runtime.export.manifest import PARITY

    repository = open_repository(path, trust)
    golden = read_golden(repository.golden)
    session, target = _open_graph(repository.graph, provider, threads)
    pixels = target.decode(golden.files)
    found = dict(zip(_OUTPUTS, session.run(list(_OUTPUTS), {_INPUT: pixels}), strict=True))
    checked = golden.check(found, where=str(path), made_on=repository.made_on)
    gate = json.loads((path / PARITY).read_text(encoding="utf-8")).get("precision") or {}
    stated = {
        "where": "the precision gate of the export, on held-out images with dummy triggers",
        "clean_accuracy": gate.get("accuracy"),
        "attack_success_rate": gate.get("dummy_trigger_success"),
    }
    facts = target.facts | {
        "source": str(path),
        "repository_digest": repository.digest,
        "golden_images": len(golden.files),
        "golden_largest_difference": checked.largest_difference,
    }
    return replace(
        target,
        name=path.name,
        kind="repository",
        facts=facts,
        stated=stated if gate else {},
        max_batch=int(repository.manifest["profile"]["max_batch"]),
    )


def _open_graph(path: Path, provider: Provider, threads: int | None) -> tuple[Any, Target]:
    """The session of an ONNX file, and the file as a target."""
    from cbpt_runtime.export.session import open_session

    metadata, names, preprocess = _described(path)
    session = open_session(str(path), provider, threads=threads)

    def run(pixels: Pixels) -> Answers:
        probabilities, alarm = session.run(list(_OUTPUTS), {_INPUT: pixels})
        return answers_of(probabilities, np.ravel(alarm))

    return session, Target(
        name=path.name,
        kind="onnx",
        facts={
            "source": str(path),
            "engine": "onnxruntime in process",
            "provider": session.get_providers()[0],
            "threads": threads or usable_cpus(),
            "precision": metadata.get("cbpt.precision"),
            "classes": len(names),
            "bundle_digest": metadata.get("cbpt.bundle_digest"),
            "checkpoint_sha256": metadata.get("cbpt.checkpoint_sha256"),
            "graph_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "verdict": metadata.get("cbpt.verdict"),
        },
        class_names=names,
        max_batch=64,
        preprocess=preprocess,
        run=run,
        graph=path,
    )


def _described(path: Path) -> tuple[dict[str, str], tuple[str, ...], Preprocess]:
    """Metadata, class names and preprocessing of an ONNX file that does nothing but classify."""
    import onnx

    from cbpt_runtime.export.foreign_graph import MAX_GRAPH_BYTES, require_own_graph
    from cbpt_runtime.export.onnx import read_metadata

    try:
        model = onnx.load_model_from_string(read_regular_file(path, max_bytes=MAX_GRAPH_BYTES))
        metadata = read_metadata(model)
    except Exception as error:  # protobuf's own classes
        raise ConfigError(
            expected="an ONNX file", got=f"{path}: {error}", fix="Export the bundle again."
        ) from error
    try:
        names = [str(name) for name in json.loads(metadata["cbpt.class_names"])]
        preprocess = Preprocess.from_dict(json.loads(metadata["cbpt.preprocess"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        said = f"without {error.args[0]}" if isinstance(error, KeyError) else f"with unreadable ones: {error}"
        raise ConfigError(
            expected="an ONNX file of `cbpt-runtime export`, which says its classes and preprocessing",
            got=f"{path} {said}",
            fix="Export the bundle with `cbpt-runtime export`.",
        ) from error
    require_own_graph(model, path, image_size=preprocess.image_size, classes=len(names))
    return metadata, tuple(names), preprocess


def _open_url(url: str, model: str | None) -> Target:
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
