"""The pictures the gate looks at, and what a lower precision costs on those that have labels.

They come out of a folder or the bundle, or are drawn where there are none. Quality is measured on labelled
images that calibrated nothing: clean accuracy may drop by half a point, and no dummy trigger of the bundle
may succeed half a point more often than in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.bundle.images import MAX_CALIBRATION, MAX_HELDOUT
from cbpt_runtime.errors import ConfigError, ExportError
from cbpt_runtime.export.golden import decoded
from cbpt_runtime.models.data import find_class_folders, read_images
from cbpt_runtime.models.image_files import unreadable_among, unreadable_error, unreadable_notes

if TYPE_CHECKING:
    from cbpt_runtime.classification.classifier import SecondLook


DRAWN = 16
GOLDEN = 4
MAX_CA_DROP = 0.005
MAX_ASR_RISE = 0.005
_ROUNDING = 1e-9  # of the shares themselves

Answer = Callable[[UInt8[np.ndarray, "batch height width 3"]], Float[np.ndarray, "batch classes"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateImages:
    """Images at the model's own size.

    Attributes:
        pixels: uint8 RGB, what the gate compares and measures on.
        labels: True class of each, None where nobody knows it or int8 may have been calibrated on them.
        calibration: Others, to calibrate int8 on; may be empty.
        encoded: Image files for the golden set.
        source: 'folder', 'bundle' or 'drawn'.
        notes: Remarks for the user: which files of the folder were left out.
    """

    pixels: UInt8[np.ndarray, "batch height width 3"]
    labels: Int[np.ndarray, " batch"] | None
    calibration: UInt8[np.ndarray, "calibration height width 3"]
    encoded: tuple[bytes, ...]
    source: str
    notes: tuple[str, ...] = ()

    def repeated(self, count: int) -> UInt8[np.ndarray, "batch height width 3"]:
        """Exactly `count` images: the first ones, from the start again where there are too few."""
        repeated: np.ndarray = self.pixels[np.arange(count) % len(self.pixels)]
        return repeated


def find_gate_images(
    bundle: Bundle, folder: str | Path | None = None, *, skip_unreadable: bool = False
) -> GateImages:
    """Return the images of a folder if one is given, else those the bundle carries, else drawn pictures.

    Args:
        bundle: What is exported.
        folder: Labelled images.
        skip_unreadable: Do without those that cannot be read.

    Raises:
        ImageDataError: The folder does not fit the classes, or an image cannot be read.
        BundleError: The images of the bundle are damaged.
    """
    if folder is not None:
        return _read_folder(Path(folder), bundle, skip_unreadable=skip_unreadable)
    return _unpack(bundle) or draw_gate_images(bundle)


def _read_folder(folder: Path, bundle: Bundle, *, skip_unreadable: bool) -> GateImages:
    """Labelled images, one folder per class (some may be missing), evenly over the classes."""
    folders = find_class_folders(folder, bundle.class_names, folders=bundle.class_folders, allow_missing=True)
    everything = [path for paths in folders for path in paths]
    reasons = unreadable_among(everything, bundle.preprocess) if skip_unreadable else {}
    labelled = [
        [(path, label) for path in paths if path not in reasons] for label, paths in enumerate(folders)
    ]
    chosen = _round_robin(labelled)[: MAX_CALIBRATION + MAX_HELDOUT]
    if not chosen:
        raise unreadable_error(reasons, len(everything))
    paths = [path for path, _ in chosen]
    pixels = read_images(paths, bundle.preprocess)
    first = min(MAX_CALIBRATION, len(pixels) // 2)
    return GateImages(
        pixels=pixels[first:],
        labels=np.array([label for _, label in chosen[first:]]),
        calibration=pixels[:first],
        encoded=tuple(path.read_bytes() for path in paths[:GOLDEN]),
        source="folder",
        notes=(*folders.notes, *unreadable_notes(reasons, folder)),
    )


def _unpack(bundle: Bundle) -> GateImages | None:
    """Return the images the bundle carries; the golden set gets a drawn picture too, to be resized."""
    kept = bundle.images()
    if kept is None:
        return None
    has_heldout = len(kept.heldout) > 0
    pixels = kept.heldout if has_heldout else kept.calibration
    return GateImages(
        pixels=pixels,
        labels=kept.heldout_labels if has_heldout else None,
        calibration=kept.calibration,
        encoded=(next(_drawn()), *(_png(image) for image in pixels[: GOLDEN - 1])),
        source="bundle",
    )


def draw_gate_images(bundle: Bundle) -> GateImages:
    """Draw coloured pictures, always the same ones; not the classes' own, so without labels."""
    files = tuple(_drawn())
    pixels = decoded(files, bundle.preprocess)
    return GateImages(
        pixels=pixels, labels=None, calibration=pixels[:0], encoded=files[:GOLDEN], source="drawn"
    )


def _drawn() -> Iterator[bytes]:
    from cbpt_runtime.demo.motifs import MOTIFS
    from cbpt_runtime.demo.pictures import draw_picture

    rng = np.random.default_rng(0)
    for number in range(DRAWN):
        file = BytesIO()
        name = sorted(MOTIFS)[number % len(MOTIFS)]
        draw_picture(name, 96 + 8 * number, rng).save(file, format="PNG")
        yield file.getvalue()


def example_of_second_look(bundle: Bundle, images: GateImages, classifier: SecondLook) -> tuple[bytes, ...]:
    """Find an image file that is looked at twice, for the golden set; none where no image tried is.

    Tried are a few of the images under every dummy trigger of the bundle, then as they are. One whose trigger
    the second look covers is taken before one that keeps its first answer.
    """
    from cbpt_runtime.purification.dummy_triggers import paint_dummy_triggers

    few = images.pixels[:GOLDEN]
    kept: tuple[bytes, ...] = ()
    for shown in [*(painted.images for painted in paint_dummy_triggers(bundle, few)), few]:
        for image in shown:
            said = classifier.predict(image[None])
            if said.boxes is not None and said.boxes.any():
                return (_png(image),)
            if said.looked_twice is not None and said.looked_twice.any():
                kept = kept or (_png(image),)
    return kept


def _png(image: UInt8[np.ndarray, "height width 3"]) -> bytes:
    file = BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def _round_robin(groups: Sequence[Sequence[tuple[Path, int]]]) -> list[tuple[Path, int]]:
    turns = chain.from_iterable(zip_longest(*groups))
    return [item for item in turns if item is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How good the answers of one classifier are.

    Attributes:
        labels: Its answer for every held-out image.
        accuracy: Share of them that is right.
        successes: Per dummy trigger, the share of images of other classes called its target.
    """

    labels: Int[np.ndarray, " heldout"]
    accuracy: float
    successes: tuple[float, ...]


class HeldOut:
    """Labelled images, plain and with every dummy trigger of a bundle.

    Args:
        bundle: Whose dummy triggers.
        images: The plain images.

    Raises:
        ConfigError: They have no labels.
    """

    def __init__(self, bundle: Bundle, images: GateImages) -> None:
        if images.labels is None:
            raise ConfigError(
                expected="labelled images to measure fp16 and int8 on",
                got="a bundle that carries none held out",
                fix="Give a folder of clean images, one folder per class, with --calibration "
                "(`verify`: --images), or make the bundle again.",
            )
        from cbpt_runtime.purification.dummy_triggers import (
            paint_dummy_triggers,  # with torch; the rest here needs none
        )

        self._pixels, self._labels = images.pixels, images.labels
        self._painted = paint_dummy_triggers(bundle, images.pixels)

    def measure(self, answer: Answer) -> Quality:
        """Return the quality of a classifier, given as a function from pixels to logits."""
        labels = answer(self._pixels).argmax(axis=1)
        successes = []
        for painted in self._painted:
            others = painted.images[self._labels != painted.target]
            hits = answer(others).argmax(axis=1) == painted.target
            successes.append(float(hits.mean()) if len(hits) else 0.0)
        accuracy = float((labels == self._labels).mean())
        return Quality(labels=labels, accuracy=accuracy, successes=tuple(successes))


def compare(before: Quality, after: Quality) -> dict[str, Any]:
    """Return what changed from float32 to a lower precision, as it stands in ``parity.json``."""
    rises = [now - then for then, now in zip(before.successes, after.successes, strict=True)]
    return {
        "heldout_images": len(before.labels),
        "accuracy_fp32": before.accuracy,
        "accuracy": after.accuracy,
        "dummy_triggers": len(before.successes),
        "dummy_trigger_success_fp32": max(before.successes, default=0.0),
        "dummy_trigger_success": max(after.successes, default=0.0),
        "largest_dummy_trigger_rise": max(rises, default=0.0),
        "labels_equal": float((before.labels == after.labels).mean()),
    }


def is_good_enough(report: dict[str, Any]) -> bool:
    """Whether a report of `compare` stays within both limits."""
    drop = report["accuracy_fp32"] - report["accuracy"]
    rise = report["largest_dummy_trigger_rise"]
    return bool(drop <= MAX_CA_DROP + _ROUNDING and rise <= MAX_ASR_RISE + _ROUNDING)


def refusal(report: dict[str, Any], precision: str) -> ExportError:
    """Return the error that names both limits and everything measured."""
    return ExportError(
        expected=f"{precision} within {MAX_CA_DROP:.1%} of float32's clean accuracy and "
        f"{MAX_ASR_RISE:.1%} of its dummy-trigger success",
        got=", ".join(f"{key} {value:.4f}" for key, value in report.items() if isinstance(value, float)),
        fix="Export with --precision fp32, or give other --calibration images; nothing was written.",
    )
