"""Photos of phones and of the web, where there is a decoder: HEIC with pillow-heif (extra `heif`), AVIF."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.errors import ImageDataError
from cbpt_runtime.models.image_files import sort_files
from cbpt_runtime.runtime.preprocess import decode_image

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="AVIF NOT TESTED: this Pillow has none")


def write_heic(path: Path, image: Image.Image) -> None:
    pillow_heif: Any = pytest.importorskip("pillow_heif", reason="HEIC NOT TESTED: the extra `heif`")
    pillow_heif.from_pillow(image).save(path, quality=90)


def write_avif(path: Path, image: Image.Image) -> None:
    image.save(path, "AVIF", quality=90)


FORMATS = pytest.mark.parametrize(
    ("suffix", "write"), [(".heic", write_heic), pytest.param(".avif", write_avif, marks=needs_avif)]
)


def halves() -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (96, 64), (200, 30, 30))
    image.paste((30, 30, 200), (48, 0, 96, 64))
    return image


@FORMATS
def test_pixels_are_those_of_the_picture(suffix: str, write: Callable, tmp_path: Path) -> None:
    path = tmp_path / f"photo{suffix}"
    write(path, halves())
    for source in (path, path.read_bytes()):
        found = decode_image(source)
        assert (found.mode, found.size) == ("RGB", (96, 64))
        error = np.abs(np.asarray(found).astype(int) - np.asarray(halves()))
        assert error[:, [*range(40), *range(56, 96)]].max() < 12
    with pytest.raises(ImageDataError, match="more than the 100 pixels allowed"):
        decode_image(path, max_pixels=100)


@FORMATS
def test_such_files_are_images_whatever_they_are_called(
    suffix: str, write: Callable, tmp_path: Path, run: Callable, tiny_bundle: Bundle
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    write(folder / f"photo{suffix}", halves())
    shutil.copy(folder / f"photo{suffix}", folder / "without")
    found = sort_files(folder, recursive=False)
    assert [path.name for path in found.images] == [f"photo{suffix}", "without"]
    assert found.left_out == {}
    done = run("classify", tiny_bundle.path, folder, "--json")
    assert len(json.loads(done.out)["images"]) == 2


@FORMATS
def test_damaged_ones_are_named_and_nobody_is_told_to_install_what_is_there(
    suffix: str, write: Callable, tmp_path: Path, run: Callable, tiny_bundle: Bundle
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    write(folder / f"photo{suffix}", halves())
    content = (folder / f"photo{suffix}").read_bytes()
    for length in (20, len(content) // 2):
        (folder / f"photo{suffix}").write_bytes(content[:length])
        done = run("classify", tiny_bundle.path, folder)
        assert done.code == 2
        assert f"photo{suffix}" in done.err
        assert "which needs" not in done.err
