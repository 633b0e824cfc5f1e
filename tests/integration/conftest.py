"""A real tritonserver around the tiny bundle, started by the tests."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.errors import ConfigError, ServingError
from cbpt_runtime.export.manifest import write_manifest
from cbpt_runtime.export.profiles import Profile
from cbpt_runtime.export.repository import export_bundle
from cbpt_runtime.runtime.prediction import Prediction
from cbpt_runtime.serving import AsyncClient, RunningServer, ServeConfig, running_server
from cbpt_runtime.serving.triton.servers import TritonServer, find_server

TOLERANCE = 1e-4
MAX_BATCH = 8
QUEUE = 32


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def tritonserver() -> TritonServer:
    """The server; skips loudly only where none can be installed."""
    try:
        return find_server()
    except ConfigError as error:
        message = f"NO REAL SERVER TESTED: {error}"
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.warn(message, stacklevel=1)
        pytest.skip(message)


@pytest.fixture(scope="session")
def repository(
    tritonserver: TritonServer,
    tiny_bundle: Bundle,
    tiny_image_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The repository of the tiny bundle. Read only."""
    output = tmp_path_factory.mktemp("served") / "repository"
    profile = Profile(max_batch=MAX_BATCH, decoders=2, threads=1, max_queue_size=QUEUE, max_pixels=4_000_000)
    export_bundle(tiny_bundle, output, name="shapes", profile=profile, calibration=tiny_image_folder)
    return output


@pytest.fixture(scope="session")
def serve(repository: Path) -> Callable[..., AbstractContextManager[RunningServer]]:
    """`serve(**settings)`: a server of the repository on free ports while the block runs."""

    def start(**settings: Any) -> AbstractContextManager[RunningServer]:
        ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0, "drain_timeout_s": 10.0}
        return running_server(repository, ServeConfig(**(ports | settings)), tell=print)

    return start


@pytest.fixture(scope="session")
def server(serve: Callable[..., AbstractContextManager[RunningServer]]) -> Iterator[RunningServer]:
    """One server for all tests that leave it as it was."""
    with serve() as running:
        yield running
        running.require_running()


@pytest.fixture(scope="session")
def classifier(tiny_bundle: Bundle) -> BundleClassifier:
    """What the server must agree with."""
    return BundleClassifier.from_bundle(tiny_bundle)


@dataclass(frozen=True)
class Pictures:
    """Image files and what the bundle says about them."""

    files: list[bytes]
    pixels: np.ndarray
    expected: Prediction


def make_pictures(files: list[bytes], classifier: BundleClassifier) -> Pictures:
    pixels = classifier.read(files)
    return Pictures(files=files, pixels=pixels, expected=classifier.predict(pixels))


@pytest.fixture(scope="session")
def drawn(classifier: BundleClassifier) -> Pictures:
    """200 generated images of many sizes, formats and colour modes."""
    generator = np.random.default_rng(11)
    files = []
    for number in range(200):
        height, width = generator.integers(8, 120, 2)
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BILINEAR)
        mode = ("RGB", "L", "RGBA", "P", "CMYK")[number % 5]
        file = io.BytesIO()
        image.convert(mode).save(file, format="JPEG" if mode in ("RGB", "CMYK", "L") else "PNG")
        files.append(file.getvalue())
    return make_pictures(files, classifier)


@pytest.fixture(scope="session")
def large(classifier: BundleClassifier) -> Pictures:
    """Eight pictures of almost 4 million pixels: to decode them all takes a good part of a second."""
    generator = np.random.default_rng(3)
    files = []
    for _ in range(8):
        file = io.BytesIO()
        coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((1990, 1990), Image.Resampling.BILINEAR).save(file, format="JPEG")
        files.append(file.getvalue())
    return make_pictures(files, classifier)


@pytest.fixture(scope="session")
def real(shared_data: Path, classifier: BundleClassifier) -> Pictures:
    """200 real photographs: the full-size ones, then small ones."""
    files: list[bytes] = []
    for archive in ("imagenet-samples.zip", "tiny-imagenet-100.zip"):
        with zipfile.ZipFile(shared_data / "data" / archive) as content:
            names = sorted(n for n in content.namelist() if n.lower().endswith((".jpg", ".jpeg", ".png")))
            files += [content.read(name) for name in names[:: max(1, len(names) // 100)][:100]]
    assert len(files) == 200
    return make_pictures(files, classifier)


@pytest.fixture(scope="session")
def load() -> Callable[..., Coroutine[Any, Any, Counter[str]]]:
    """`await load(url, pictures, number)`: send requests and count what became of them.

    A wrong answer fails the test at once. 'refused' is a refusal that says that nothing was done; any other
    error is 'lost'. `reasons` collects what the errors say.
    """

    async def send(
        url: str,
        pictures: Pictures,
        number: int,
        *,
        at_once: int = 16,
        batch: int = 1,
        reasons: set[str] | None = None,
        **options: Any,
    ) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        room = asyncio.Semaphore(at_once)
        async with AsyncClient(url, **options) as client:
            await client.info()

            async def ask(index: int) -> None:
                rows = [(index + i) % len(pictures.files) for i in range(batch)]
                async with room:
                    outcomes["sent"] += 1
                    try:
                        found = await client.predict_files([pictures.files[row] for row in rows])
                    except ServingError as error:
                        is_clean = getattr(error.__cause__, "kind", "") in ("busy", "unreachable")
                        outcomes["refused" if is_clean else "lost"] += 1
                        if reasons is not None:
                            reasons.add(error.got)
                        return
                expected = pictures.expected.probabilities[rows]
                np.testing.assert_allclose(found.probabilities, expected, atol=1e-4)
                outcomes["answered"] += 1

            await asyncio.gather(*(ask(index) for index in range(number)))
        return outcomes

    return send


@pytest.fixture(scope="session")
def changed_copy(repository: Path) -> Callable[[Path, Mapping[str, Callable[[str], str]]], Path]:
    """`changed_copy(target, {pattern: change})`: the repository with some files changed and hashed anew."""

    def copy(target: Path, changes: Mapping[str, Callable[[str], str]]) -> Path:
        shutil.copytree(repository, target)
        for pattern, change in changes.items():
            for file in target.glob(pattern):
                file.write_text(change(file.read_text()))
        manifest = json.loads((target / "manifest.json").read_text())
        (target / "manifest.json").unlink()
        about = {k: v for k, v in manifest.items() if k not in ("files", "kind", "schema_version")}
        write_manifest(target, about)
        return target

    return copy
