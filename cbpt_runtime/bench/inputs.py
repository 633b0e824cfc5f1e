"""What is measured and how long, and the image files that are sent.

Files are sent as they are on disk, of mixed sizes, in an order drawn once.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image

from cbpt_runtime.artifacts.names import name_bytes
from cbpt_runtime.config import Above, Between, Config
from cbpt_runtime.errors import ImageDataError
from cbpt_runtime.models.data import class_key
from cbpt_runtime.models.image_files import (
    left_out_notes,
    sort_files,
    undecodable,
    unreadable_error,
    unreadable_notes,
)

Scenario = Literal["single-stream", "server", "offline", "sweep"]
SCENARIOS: tuple[Scenario, ...] = ("single-stream", "server", "offline", "sweep")
PERCENTILES = (50.0, 90.0, 95.0, 99.0)
BEYOND = 10  # observations that must lie beyond a percentile before it is named
MAX_TRIAL_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig(Config):
    """What is measured, and how long.

    Attributes:
        scenarios: Any of single-stream, server, offline and sweep.
        rates_per_s: Open-loop rates of the server scenario; searched for when empty.
        concurrencies: Requests on their way at once in the closed-loop sweep.
        batch_sizes: Images per batch in the offline scenario; larger ones than the target takes are left out.
        class_counts: Sizes of heads timed with the graph of an ONNX file or repository.
        duration_s: Of each run, without warm-up.
        warmup_s: Before each run; what happens in it is not counted.
        latency_bound_ms: What the searched rate must stay under ...
        percentile: ... in this share of the requests, in percent.
        timeout_s: After which a request counts as lost.
        clients: Processes that send requests to a server.
        check_every: One answer in so many is compared with the one from before the timing.
        max_images: Files read from the folder of images.
        skip_unreadable: Do without files that are no whole images.
        seed: Of arrivals and of the order of images.

    Raises:
        ConfigError: A value is out of range.
    """

    scenarios: tuple[Scenario, ...] = SCENARIOS
    rates_per_s: tuple[Annotated[float, Above(0)], ...] = ()
    concurrencies: tuple[Annotated[int, Between(1)], ...] = (1, 2, 4, 8, 16)
    batch_sizes: tuple[Annotated[int, Between(1)], ...] = (1, 2, 4, 8, 16, 32)
    class_counts: tuple[Annotated[int, Between(2)], ...] = ()
    duration_s: Annotated[float, Above(0)] = 10.0
    warmup_s: Annotated[float, Between(0)] = 1.0
    latency_bound_ms: Annotated[float, Above(0)] = 100.0
    percentile: float = 95.0
    timeout_s: Annotated[float, Above(0)] = 10.0
    clients: Annotated[int, Between(1)] = 1
    check_every: Annotated[int, Between(1)] = 4
    max_images: Annotated[int, Between(1)] = 256
    skip_unreadable: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        Config.__post_init__(self)
        if self.percentile not in PERCENTILES:
            self.refuse({"percentile": "one of " + ", ".join(f"{one:g}" for one in PERCENTILES)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Image files in memory.

    Attributes:
        folder: Where they came from.
        names: Paths below it.
        files: Their content.
        notes: Remarks for the user: what was left out.
    """

    folder: Path
    names: tuple[str, ...]
    files: tuple[bytes, ...]
    notes: tuple[str, ...] = ()

    def labels(self, class_names: Sequence[str], class_folders: Sequence[str] = ()) -> list[int | None]:
        """Return the true class of every file by its folder, named as the class or as its own folder."""
        indices = {class_key(name): index for index, name in enumerate(class_names)}
        indices |= {class_key(name): index for index, name in enumerate(class_folders)}
        return [indices.get(class_key(Path(name).parent.name)) for name in self.names]

    def describe(self) -> dict[str, Any]:
        """Digest, sizes and formats, as JSON can hold them."""
        digest = hashlib.sha256()
        formats: Counter[str] = Counter()
        sizes = []
        for name, file in zip(self.names, self.files, strict=True):
            digest.update(name_bytes(name) + b"\0" + hashlib.sha256(file).digest())
            with Image.open(BytesIO(file)) as image:
                formats[str(image.format)] += 1
                sizes.append(image.width * image.height)
        lengths = [len(file) for file in self.files]
        return {
            "folder": str(self.folder),
            "count": len(self.files),
            "notes": list(self.notes),
            "digest": digest.hexdigest(),
            "formats": dict(formats),
            "megapixels": _spread([size / 1e6 for size in sizes]),
            "kilobytes": _spread([length / 1e3 for length in lengths]),
        }


def read_pictures(folder: str | Path, *, most: int, seed: int, skip_unreadable: bool = False) -> Pictures:
    """Read image files below a folder, evenly over all there are, in an order drawn from the seed.

    Args:
        folder: Images, in folders or not.
        most: How many at most.
        seed: Of the order.
        skip_unreadable: Do without files that are no whole images.

    Raises:
        ImageDataError: There are none, or some of them are not whole images: all are named.
    """
    folder = Path(folder)
    found = sort_files(folder, recursive=True)
    reasons = undecodable(found.images) if skip_unreadable else {}
    paths = [path for path in found.images if path not in reasons]
    if not paths:
        notes = (*left_out_notes(found.left_out, folder), *unreadable_notes(reasons, folder))
        raise ImageDataError(
            expected="a folder with image files",
            got="; ".join((f"{folder}, which has none", *notes)),
            fix="Name one with --images, best with a folder of images per class.",
        )
    rng = np.random.default_rng(seed)
    rows = np.unique(np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int))
    chosen = [paths[row] for row in rng.permutation(rows)]
    if bad := undecodable(chosen):
        raise unreadable_error(bad | undecodable(paths), len(paths))
    return Pictures(
        folder=folder,
        names=tuple(path.relative_to(folder).as_posix() for path in chosen),
        files=tuple(path.read_bytes() for path in chosen),
        notes=(*left_out_notes(found.left_out, folder), *unreadable_notes(reasons, folder)),
    )


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.percentile(values, (0, 50, 100))
    return {"min": round(float(low), 4), "median": round(float(middle), 4), "max": round(float(high), 4)}
