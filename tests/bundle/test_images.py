"""The clean images of a bundle: bounded, balanced, checked, and optional."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from cbpt_runtime.bundle import (
    IMAGES,
    MANIFEST,
    BundleContent,
    CleanImages,
    choose_clean_images,
    images,
    read_bundle,
    write_bundle,
)
from cbpt_runtime.errors import BundleError
from cbpt_runtime.models.data import CleanSplit

MakeContent = Callable[..., BundleContent]


def split(classes: int, shots: int, heldout_shots: int, *, size: int = 2) -> CleanSplit:
    def part(count: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.arange(first, first + classes * count, dtype=np.uint8)  # each image has its own colour
        images = np.broadcast_to(pixels[:, None, None, None], (len(pixels), size, size, 3)).copy()
        return images, np.repeat(np.arange(classes), count)

    tune, heldout = part(shots, 0), part(heldout_shots, 100)
    return CleanSplit(
        tune_images=tune[0],
        tune_labels=tune[1],
        heldout_images=heldout[0],
        heldout_labels=heldout[1],
        digest="",
    )


def three_classes() -> CleanImages:
    return choose_clean_images(split(3, 2, 2, size=32))


def test_all_images_are_kept_where_they_are_few_and_in_turns_over_the_classes() -> None:
    chosen = choose_clean_images(split(3, 2, 1))
    assert chosen.calibration_labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert chosen.calibration[:, 0, 0, 0].tolist() == [0, 2, 4, 1, 3, 5]
    assert chosen.heldout_labels.tolist() == [0, 1, 2]
    assert chosen.heldout[:, 0, 0, 0].tolist() == [100, 101, 102]


@pytest.mark.parametrize(("classes", "shots"), [(3, 90), (100, 16), (300, 2)])
def test_the_images_kept_are_bounded_and_balanced(classes: int, shots: int) -> None:
    chosen = choose_clean_images(split(classes, shots, shots))
    assert len(chosen.calibration) == images.MAX_CALIBRATION
    assert len(chosen.heldout) == min(images.MAX_HELDOUT, classes * shots)
    for labels in (chosen.calibration_labels, chosen.heldout_labels):
        counts = np.bincount(labels, minlength=classes)
        assert counts.max() - counts.min() <= 1
    assert chosen.calibration_labels[-1] == classes - 1  # not just the first classes of the list


def test_large_images_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_SIZE_BYTES", 50 * 3 * 8 * 8)
    chosen = choose_clean_images(split(10, 16, 16, size=8))
    assert (len(chosen.calibration), len(chosen.heldout)) == (10, 40)


def test_one_image_per_class_leaves_none_held_out() -> None:
    chosen = choose_clean_images(split(4, 1, 0))
    assert (len(chosen.calibration), len(chosen.heldout)) == (4, 0)


def test_images_read_back_as_written(tmp_path: Path, make_content: MakeContent) -> None:
    kept = three_classes()
    write_bundle(tmp_path / "bundle", content=make_content(images=kept))
    bundle = read_bundle(tmp_path / "bundle")
    assert bundle.manifest["files"][IMAGES]["size_bytes"] == (tmp_path / "bundle" / IMAGES).stat().st_size
    read = bundle.images()
    assert read is not None
    for name, tensor in kept.to_tensors().items():
        np.testing.assert_array_equal(read.to_tensors()[name], tensor)


def test_a_bundle_without_images_still_reads(tmp_path: Path, make_content: MakeContent) -> None:
    bundle = write_bundle(tmp_path / "bundle", content=make_content())
    assert IMAGES not in bundle.manifest["files"]
    assert bundle.images() is None


def test_a_changed_pixel_is_found(tmp_path: Path, make_content: MakeContent) -> None:
    write_bundle(tmp_path / "bundle", content=make_content(images=three_classes()))
    content = bytearray((tmp_path / "bundle" / IMAGES).read_bytes())
    content[-1] ^= 1
    (tmp_path / "bundle" / IMAGES).write_bytes(content)
    with pytest.raises(BundleError, match=f"{IMAGES}.*changed or damaged"):
        read_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("heldout_labels"), "no heldout images with labels"),
        (lambda t: t.update(heldout_images=t["heldout_images"][:, :3]), r"heldout_images is uint8 \[6, 3"),
        (lambda t: t.update(calibration_labels=t["calibration_labels"] + 1), "a class that is not there"),
        (
            lambda t: t.update(calibration_labels=t["calibration_labels"][1:]),
            r"calibration_labels is int64 \[5",
        ),
    ],
)
def test_images_that_do_not_fit_the_model_are_refused(
    tmp_path: Path, make_content: MakeContent, change: Callable[[dict], object], named: str
) -> None:
    bundle = write_bundle(tmp_path / "bundle", content=make_content(images=three_classes()))
    tensors = three_classes().to_tensors()
    change(tensors)
    data = safetensors_numpy.save({key: np.ascontiguousarray(value) for key, value in tensors.items()})
    (bundle.path / IMAGES).write_bytes(data)
    manifest = json.loads((bundle.path / MANIFEST).read_text())
    manifest["files"][IMAGES]["sha256"] = hashlib.sha256(data).hexdigest()
    with pytest.raises(BundleError, match=named):
        replace(bundle, manifest=manifest).images()
