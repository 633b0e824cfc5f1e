"""An exported graph as a classifier, in onnxruntime: an ONNX file by itself, or that of a repository."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from cbpt_runtime.artifacts import read_regular_file
from cbpt_runtime.classification.classifier import Classifier, Kind
from cbpt_runtime.errors import ConfigError
from cbpt_runtime.export.foreign_graph import MAX_GRAPH_BYTES, require_own_graph
from cbpt_runtime.export.golden import read_golden
from cbpt_runtime.export.onnx import read_metadata
from cbpt_runtime.export.session import Provider, open_session, predict
from cbpt_runtime.runtime.prediction import Prediction, parse_level
from cbpt_runtime.runtime.preprocess import Pixels, Preprocess
from cbpt_runtime.trust import ANYONE, Trust, open_repository

_BATCH = 64


class GraphClassifier(Classifier):
    """The graph of `export`: encoder and purified head. Of the head before, only the alarm is left.

    Args:
        path: An ONNX file.
        provider: Where it must run.
        threads: Of one operator; all usable CPUs when None.

    Attributes:
        path: The ONNX file.
        metadata: What the graph says about itself.
        graph_sha256: Of the file.
        session: The graph, opened.

    Raises:
        ConfigError: It is none of `export`'s, or the provider is not there.
        ExportError: onnxruntime refuses it.
    """

    kind: Kind = "onnx"
    encoder = None  # the graph does not say

    def __init__(self, path: Path, *, provider: Provider = "cpu", threads: int | None = None) -> None:
        self.path, self.source = path, str(path)
        content, model = _read_graph(path)
        self.metadata, self.class_names, self._suspect_indices, self._preprocess = _described(model, path)
        self._alarm_threshold = _level(self.metadata, path)
        self.sigmoid = self.metadata.get("cbpt.probabilities") == "sigmoid"
        self.verdict = self.metadata.get("cbpt.verdict")
        self.graph_sha256 = self.digest = hashlib.sha256(content).hexdigest()
        self.session: onnxruntime.InferenceSession = open_session(str(path), provider, threads=threads)
        self.place = str(self.session.get_providers()[0])

    @property
    def preprocess(self) -> Preprocess:
        """How an image becomes the model's pixels."""
        return self._preprocess

    @property
    def suspect_indices(self) -> tuple[int, ...]:
        """Class indices of the suspected targets."""
        return self._suspect_indices

    @property
    def alarm_threshold(self) -> float | None:
        """Above which alarm an image is suspicious; older graphs do not say."""
        return self._alarm_threshold

    @property
    def suspects(self) -> tuple[str, ...]:
        """Names of the suspected targets."""
        return tuple(self.class_names[index] for index in self._suspect_indices)

    def predict(self, images: Pixels) -> Prediction:
        """Classify images with the purified head."""
        self.check_pixels(images)
        return predict(self.session, images, batch_size=_BATCH, threshold=self.alarm_threshold)


class RepositoryClassifier(GraphClassifier):
    """The graph of a model repository, whose golden answers came out right.

    Args:
        path: The folder.
        provider: Where it must run.
        threads: Of one operator; all usable CPUs when None.
        trust: What the repository has to show.

    Attributes:
        repository: The repository, every file hashed.
        golden: How its golden answers came out.

    Raises:
        RepositoryError: The repository is damaged.
        TrustError: It is not the trusted one.
        ConfigError: The graph is none of `export`'s, or the provider is not there.
        ExportError: A golden answer is wrong.
    """

    kind = "repository"

    def __init__(
        self,
        path: Path,
        *,
        provider: Provider = "cpu",
        threads: int | None = None,
        trust: Trust = ANYONE,
    ) -> None:
        self.repository = open_repository(path, trust)
        golden = read_golden(self.repository.golden)
        super().__init__(self.repository.graph, provider=provider, threads=threads)
        self.source, self.digest = str(path), self.repository.digest
        self.looks_twice = self.repository.manifest.profile.second_look
        said = self.predict(golden.pixels(self.preprocess))
        self.golden = golden.check(said, where=str(path), made_on=self.repository.manifest.processor)
        self.notes = () if self.golden.note is None else (self.golden.note,)


def _read_graph(path: Path) -> tuple[bytes, onnx.ModelProto]:
    """Return a file and the graph in it: what is hashed is what is looked at."""
    try:
        content = read_regular_file(path, max_bytes=MAX_GRAPH_BYTES)
        return content, onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own classes
        raise ConfigError(
            expected="an ONNX file", got=f"{path}: {error}", fix="Export the bundle again."
        ) from error


def _described(
    model: onnx.ModelProto, path: Path
) -> tuple[dict[str, str], tuple[str, ...], tuple[int, ...], Preprocess]:
    """Metadata, class names, suspects' indices and preprocessing of a graph that only classifies."""
    metadata = read_metadata(model)
    try:
        names = tuple(str(name) for name in json.loads(metadata["cbpt.class_names"]))
        suspects = _indices(json.loads(metadata.get("cbpt.suspects", "[]")), names)
        preprocess = Preprocess.from_dict(json.loads(metadata["cbpt.preprocess"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        said = f"without {error.args[0]}" if isinstance(error, KeyError) else f"with unreadable ones: {error}"
        raise ConfigError(
            expected="an ONNX file of `cbpt-runtime export`, which says its classes and preprocessing",
            got=f"{path} {said}",
            fix="Export the bundle with `cbpt-runtime export`.",
        ) from error
    require_own_graph(model, path, image_size=preprocess.image_size, classes=len(names))
    return metadata, names, suspects, preprocess


def _level(metadata: dict[str, str], path: Path) -> float | None:
    """Return the level of the alarm that a graph names, checked."""
    said = metadata.get("cbpt.alarm_threshold")
    try:
        return parse_level(said)
    except ValueError as error:
        raise ConfigError(
            expected="a level of the alarm in [0, 1], as `cbpt-runtime export` writes it",
            got=f"{path} with {said!r:.80}",
            fix="Export the bundle again.",
        ) from error


def _indices(indices: Any, names: tuple[str, ...]) -> tuple[int, ...]:
    if not isinstance(indices, list) or not all(type(i) is int and 0 <= i < len(names) for i in indices):
        raise ValueError(f"suspects {indices!r:.80}, which are no classes")
    return tuple(indices)
