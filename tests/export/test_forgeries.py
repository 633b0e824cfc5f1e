"""Manifests, answers and configurations that a forger wrote: the promised error, never a traceback."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cbpt_runtime.bundle import Bundle, read_bundle
from cbpt_runtime.errors import BundleError, CbptError, InputError, RepositoryError
from cbpt_runtime.export.golden import TOLERANCE, read_golden
from cbpt_runtime.export.manifest import read_repository, require_unchanged
from cbpt_runtime.export.verify import check_configs, check_graph
from cbpt_runtime.loading import inspect_path
from cbpt_runtime.runtime.prediction import Prediction
from cbpt_runtime.serving.config import ServeConfig
from cbpt_runtime.serving.triton.placement import place

JUNK: tuple[Any, ...] = (None, [], {}, "x", -1, 10**30, 1.5, True, [None], {"a": 1}, "../\u0000")
_REMOVED = object()


def forgeries(good: Any) -> Iterator[Any]:
    """Every value of a JSON document replaced by every kind of junk, or removed."""
    for path in _paths(good, ()):
        for junk in (*JUNK, _REMOVED) if path else JUNK:
            forged = copy.deepcopy(good)
            if not path:
                yield junk
                continue
            place = forged
            for key in path[:-1]:
                place = place[key]
            if junk is _REMOVED:
                del place[path[-1]]
            else:
                place[path[-1]] = junk
            yield forged


def _paths(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from _paths(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from _paths(value[-1], (*path, len(value) - 1))


@pytest.fixture
def copied_bundle(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    for file in tiny_bundle.path.iterdir():
        (tmp_path / "bundle").mkdir(exist_ok=True)
        (tmp_path / "bundle" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "bundle"


def test_a_forged_bundle_is_described_or_refused(copied_bundle: Path) -> None:
    manifest = copied_bundle / "manifest.json"
    refused = 0
    for forged in forgeries(json.loads(manifest.read_text())):
        manifest.write_text(json.dumps(forged))
        try:
            bundle = read_bundle(copied_bundle)
            json.dumps([bundle.suspect_indices, bundle.encoder, bundle.metrics, bundle.model_config])
            json.dumps(inspect_path(copied_bundle), allow_nan=False)
        except InputError:
            refused += 1
    assert refused > 400


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"schema_version": 1, "verdict": NaN}',
        '{"schema_version": 1, "verdict": 1e999}',
        '{"schema_version": 1, "verdict": "\\ud800"}',
        '{"schema_version": ' + "9" * 5000 + "}",
        "\x00",
        "",
        "\ufeff{}",
    ],
)
def test_what_is_no_json_is_refused(copied_bundle: Path, copied_repository: Path, text: str) -> None:
    (copied_bundle / "manifest.json").write_text(text)
    with pytest.raises(BundleError):
        read_bundle(copied_bundle)
    (copied_repository / "manifest.json").write_text(text)
    with pytest.raises(RepositoryError):
        read_repository(copied_repository)


def test_a_forged_repository_is_read_or_refused(copied_repository: Path) -> None:
    manifest = copied_repository / "manifest.json"
    good = json.loads(manifest.read_text())
    files = dict(list(good["files"].items())[:1])
    refused = 0
    for forged in forgeries({**good, "versions": {}, "files": files}):
        if isinstance(forged, dict) and forged.get("files") == files:
            forged["files"] = good["files"]
        manifest.write_text(json.dumps(forged))
        try:
            repository = read_repository(copied_repository)
            assert repository.inner_models == ("shapes_preprocess", "shapes_alarm")
            check_configs(repository)
        except InputError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize(
    "models",
    [["shapes"], ["shapes", "shapes_preprocess", "shapes_classifier", "shapes_alarm", "another"], "shapes"],
)
def test_only_the_models_that_export_makes_are_served(copied_repository: Path, models: Any) -> None:
    manifest = copied_repository / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"models": models}))
    with pytest.raises(RepositoryError, match=r"models? (that is none|is not a list)"):
        read_repository(copied_repository)


def test_forged_golden_answers_are_refused(copied_repository: Path) -> None:
    folder = read_repository(copied_repository).golden
    answers = json.loads((folder / "answers.json").read_text())
    answers["images"] = answers["images"][:2]
    shape = (2, len(answers["images"][0]["probabilities"]))
    zeros = Prediction(logits=np.zeros(shape), probabilities=np.zeros(shape), alarm=np.zeros(2))
    for forged in forgeries(answers):
        (folder / "answers.json").write_text(json.dumps(forged))
        with pytest.raises(CbptError):  # an answer of zeros is never right
            read_golden(folder).check(zeros, where="a server")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tolerance", 1.0, f"a tolerance of 1, not of at most {TOLERANCE:g}"),
        ("file", "../../x", "the file name"),
    ],
)
def test_answers_that_allow_anything_or_lie_elsewhere_are_refused(
    copied_repository: Path, key: str, value: Any, message: str
) -> None:
    folder = read_repository(copied_repository).golden
    answers = json.loads((folder / "answers.json").read_text())
    (answers if key in answers else answers["images"][0])[key] = value
    (folder / "answers.json").write_text(json.dumps(answers))
    with pytest.raises(RepositoryError, match=message):
        read_golden(folder)


@pytest.mark.parametrize("text", ["name: {", "", 'name: "shapes_classifier"', 'name: "other"', "\udcff"])
def test_forged_configurations_are_refused(
    copied_repository: Path, resealed: Callable[[Path], None], text: str
) -> None:
    for file in copied_repository.glob("shapes_classifier/**/*.pbtxt"):
        file.write_text(text, encoding="utf-8", errors="surrogateescape")
    resealed(copied_repository)
    repository = read_repository(copied_repository)
    server: Any = SimpleNamespace(backends=("python", "onnxruntime"))
    with pytest.raises(RepositoryError, match="configuration of shapes_classifier"):
        place(repository, server, ServeConfig(profile="cpu"))


def test_a_forged_graph_is_refused(copied_repository: Path) -> None:
    repository = read_repository(copied_repository)
    for content in (b"", b"\x08", b"\xff" * 100, os.urandom(1000)):
        repository.graph.write_bytes(content)
        with pytest.raises(CbptError):
            check_graph(repository)


def test_pipes_and_devices_are_never_read(copied_bundle: Path, copied_repository: Path) -> None:
    for folder, file in ((copied_bundle, "encoder.safetensors"), (copied_repository, "shapes/labels.txt")):
        (folder / file).unlink()
        os.mkfifo(folder / file)
    with pytest.raises(BundleError, match="Not a regular file"):
        read_bundle(copied_bundle)
    with pytest.raises(RepositoryError, match=r"labels\.txt is not a plain file"):
        read_repository(copied_repository)
    for folder in (copied_bundle, copied_repository):
        (folder / "manifest.json").unlink()
        (folder / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(BundleError, match="Not a regular file"):
        read_bundle(copied_bundle)
    with pytest.raises(RepositoryError, match="Not a regular file"):
        read_repository(copied_repository)


def test_a_repository_that_was_resealed_since_is_another_one(
    copied_repository: Path, resealed: Callable[[Path], None]
) -> None:
    repository = read_repository(copied_repository)
    require_unchanged(repository)
    (copied_repository / "parity.json").write_text("{}")
    resealed(copied_repository)
    with pytest.raises(RepositoryError, match="another repository has its place"):
        require_unchanged(repository)
