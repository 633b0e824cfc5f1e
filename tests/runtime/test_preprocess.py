from __future__ import annotations

import io
import json
import random
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cbpt_runtime.errors import ConfigError, ImageDataError
from cbpt_runtime.runtime.preprocess import Preprocess, decode_image, to_pixels


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def open_clip_pixels(image: Image.Image, preprocess: Preprocess, size: Any = None) -> np.ndarray:
    """What open_clip's own evaluation transform has in hand just before ToTensor."""
    transform = open_clip.image_transform(
        preprocess.image_size if size is None else size,
        is_train=False,
        mean=preprocess.mean,
        std=preprocess.std,
        interpolation=preprocess.interpolation,
        resize_mode=preprocess.resize_mode,
        fill_color=preprocess.fill_color,
    )
    for step in transform.transforms[:-2]:
        image = step(image)
    return np.asarray(image)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("target", [(32, 32), (24, 40), (40, 24)])
@given(width=st.integers(1, 90), height=st.integers(1, 90), fill=st.sampled_from([0, 128]))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_pixels_are_byte_identical_to_open_clips_transform(
    resize_mode: str, interpolation: str, target: tuple[int, int], width: int, height: int, fill: int
) -> None:
    preprocess = Preprocess(
        image_size=target, resize_mode=resize_mode, interpolation=interpolation, fill_color=fill
    )
    image = noise(width, height)
    try:
        expected = open_clip_pixels(image, preprocess)
    except ValueError:  # open_clip fails where 'longest' rounds a side to zero; ours keeps one pixel
        assert resize_mode == "longest"
        assert to_pixels(image, preprocess).shape == (*target, 3)
    else:
        np.testing.assert_array_equal(to_pixels(image, preprocess), expected)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_pixels_are_byte_identical_for_a_single_number_as_size(resize_mode: str) -> None:
    preprocess = Preprocess(image_size=(48, 48), resize_mode=resize_mode)
    for size in [(101, 67), (67, 101), (48, 48), (48, 50), (500, 49)]:
        image = noise(*size)
        np.testing.assert_array_equal(to_pixels(image, preprocess), open_clip_pixels(image, preprocess, 48))


def test_pixels_are_byte_identical_on_a_hundred_real_photographs(shared_data: Path) -> None:
    modes = [
        Preprocess(image_size=(224, 224), resize_mode=mode) for mode in ("shortest", "longest", "squash")
    ]
    with zipfile.ZipFile(shared_data / "data" / "imagenet-samples.zip") as archive:
        names = [name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg"))]
        assert len(names) == 100
        for name in names:
            content = archive.read(name)
            ours, theirs = decode_image(content), Image.open(io.BytesIO(content)).convert("RGB")
            for preprocess in modes:
                expected = open_clip_pixels(theirs, preprocess)
                np.testing.assert_array_equal(to_pixels(ours, preprocess), expected, err_msg=name)


def test_an_image_of_the_models_size_is_not_resampled() -> None:
    image = noise(32, 32)
    for resize_mode in ("shortest", "longest", "squash"):
        preprocess = Preprocess(image_size=(32, 32), resize_mode=resize_mode)
        np.testing.assert_array_equal(to_pixels(image, preprocess), np.asarray(image))


def test_pixels_are_writable_and_contiguous() -> None:
    pixels = to_pixels(noise(32, 32), Preprocess(image_size=(32, 32)))
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous


def test_a_thread_like_image_is_refused_before_it_is_resized() -> None:
    with pytest.raises(ImageDataError, match=r"factor of 100; got 1×101"):
        to_pixels(noise(1, 101), Preprocess(image_size=(224, 224)))


# Decoding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "JPEG", "WEBP"])
def test_every_common_format_is_decoded_to_rgb(kind: str) -> None:
    image = decode_image(encoded(noise(9, 7), kind))
    assert (image.mode, image.size) == ("RGB", (9, 7))


def test_a_path_and_its_bytes_decode_alike(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(encoded(noise(9, 7)))
    np.testing.assert_array_equal(decode_image(path), decode_image(path.read_bytes()))


@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_something_else_than_an_image_is_refused(content: bytes) -> None:
    with pytest.raises(ImageDataError, match="expected a whole, readable image") as caught:
        decode_image(content)
    assert "BytesIO" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageDataError, match=r"absent\.png; got no such file"):
        decode_image(tmp_path / "absent.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_truncated_image_is_refused(kind: str) -> None:
    content = encoded(noise(64, 64), kind)
    with pytest.raises(ImageDataError):
        decode_image(content[: len(content) // 2])


def test_an_image_with_too_many_pixels_is_refused_before_decoding() -> None:
    with pytest.raises(ImageDataError, match=r"at most 99 pixels in the image bytes; got 10×10"):
        decode_image(encoded(noise(10, 10)), max_pixels=99)
    assert decode_image(encoded(noise(10, 10)), max_pixels=100).size == (10, 10)


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))
    with pytest.raises(ImageDataError, match="at most 50,000,000 pixels"):
        decode_image(bomb)


def test_cmyk_jpegs_become_rgb() -> None:
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    pixels = np.asarray(decode_image(encoded(red, "JPEG", quality=100)))
    assert pixels.shape == (8, 8, 3)
    assert pixels[..., 0].min() > 240
    assert pixels[..., 1:].max() < 15


def test_16_bit_grey_is_scaled_to_8_bit_instead_of_clipped() -> None:
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    pixels = np.asarray(decode_image(encoded(Image.fromarray(values))))
    np.testing.assert_array_equal(pixels, np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=2))


def test_16_bit_grey_is_scaled_in_every_file_format_and_byte_order() -> None:
    values = np.array([[0, 255, 256, 65535]], dtype=np.uint16)
    big_endian = b"P5 4 1 65535\n" + values.astype(">u2").tobytes()
    for content in (encoded(Image.fromarray(values), "TIFF"), encoded(Image.fromarray(values)), big_endian):
        assert np.asarray(decode_image(content))[0, :, 0].tolist() == [0, 0, 1, 255]


def test_16_bit_colour_and_16_bit_grey_decode_alike() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    values = np.linspace(0, 65535, 32).astype(">u2")

    def png(colour_type: int, channels: int) -> bytes:
        row = b"\0" + np.repeat(values, channels).tobytes()
        header = struct.pack(">IIBBBBB", 32, 1, 16, colour_type, 0, 0, 0)
        parts = [(b"IHDR", header), (b"IDAT", zlib.compress(row)), (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)

    np.testing.assert_array_equal(decode_image(png(0, 1)), decode_image(png(2, 3)))


def test_grey_beyond_16_bit_and_floating_point_are_refused() -> None:
    wide = Image.fromarray(np.array([[0, 70_000]], dtype=np.int32))
    with pytest.raises(ImageDataError, match="grey values beyond 16 bit"):
        decode_image(encoded(wide, "TIFF"))
    real = Image.fromarray(np.array([[0.0, 1.0]], dtype=np.float32))
    with pytest.raises(ImageDataError, match="floating-point pixels"):
        decode_image(encoded(real, "TIFF"))


def test_palette_images_keep_their_colours() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    assert np.asarray(decode_image(encoded(image)))[0, 0].tolist() == [10, 200, 30]
    transparent = encoded(image, transparency=b"\x80\x00")
    assert np.asarray(decode_image(transparent))[0, 0].tolist() == [10, 200, 30]


@pytest.mark.parametrize(
    ("mode", "colour"), [("RGBA", (10, 200, 30, 0)), ("LA", (77, 0)), ("L", 77), ("1", 1)]
)
def test_alpha_is_dropped_and_grey_is_repeated(mode: str, colour: Any) -> None:
    image = Image.new(mode, (4, 4), colour)
    pixels = np.asarray(decode_image(encoded(image)))
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(content)) as image:
        assert image.n_frames == 2  # type: ignore[attr-defined]
    pixels = np.asarray(decode_image(content))
    assert pixels[..., 0].min() > 200
    assert pixels[..., 2].max() < 50


def test_exif_orientation_is_applied() -> None:
    image = noise(12, 5)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right
    turned = decode_image(encoded(image, exif=exif))
    assert turned.size == (5, 12)
    np.testing.assert_array_equal(turned, image.transpose(Image.Transpose.ROTATE_270))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_exif_does_not_spoil_the_image() -> None:
    content = encoded(noise(12, 5), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f garbage")
    assert decode_image(content).size == (12, 5)


DAMAGED_FORMATS = (
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("AVIF", {}),
    ("GIF", {}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
)


def damaged(file: bytes, dice: random.Random) -> bytes:
    """A file of which one to three places were overwritten, flipped, cut out or repeated."""
    content = bytearray(file)
    for _ in range(dice.randint(1, 3)):
        at, length = dice.randrange(len(content)), dice.randint(1, 16)
        match dice.randrange(5):
            case 0:
                content[at] ^= 1 << dice.randrange(8)
            case 1:
                content[at : at + 4] = dice.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", dice.randbytes(4)))
            case 2:
                del content[at : at + length]
            case 3:
                content[at:at] = content[at : at + length]
            case _:
                content = content[: max(at, 1)]
    return bytes(content)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(("kind", "options"), DAMAGED_FORMATS)
def test_damaged_files_never_raise_anything_but_an_image_error(kind: str, options: dict[str, Any]) -> None:
    """Among the AVIF files are some for which Pillow raises a RuntimeError."""
    dice = random.Random(7)
    file = encoded(noise(24, 20), kind, **options)
    preprocess = Preprocess(image_size=(8, 8))
    refused = 0
    for _ in range(500):
        try:
            pixels = to_pixels(decode_image(damaged(file, dice), max_pixels=1_000_000), preprocess)
        except ImageDataError:
            refused += 1
        else:
            assert pixels.shape == (8, 8, 3)
    assert refused > 50


@pytest.mark.parametrize(
    "kind", [RuntimeError, RecursionError, AssertionError, ZeroDivisionError, AttributeError, UserWarning]
)
def test_whatever_a_decoder_raises_is_an_error_of_its_image(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise kind("what a decoder says")

    image = noise(30, 20)
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ImageDataError, match=r"in image 2 of 3; got what a decoder says\. Replace"):
        decode_image(b"x", name="image 2 of 3")
    monkeypatch.setattr(Image.Image, "resize", fail)
    with pytest.raises(ImageDataError, match="resized to 8×8; got 30×20: what a decoder says"):
        to_pixels(image, Preprocess(image_size=(8, 8)))


# Settings -----------------------------------------------------------------------------------------


def test_preprocess_survives_json() -> None:
    preprocess = Preprocess(
        image_size=(32, 48), resize_mode="longest", interpolation="bilinear", fill_color=7
    )
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess


def test_open_clips_defaults_fill_what_the_configuration_leaves_out() -> None:
    default = open_clip.transform.PreprocessCfg()
    preprocess = Preprocess.from_open_clip({"mean": None}, 64)
    assert preprocess.image_size == (64, 64)
    assert (preprocess.mean, preprocess.std) == (default.mean, default.std)
    assert preprocess.interpolation == default.interpolation
    assert preprocess.resize_mode == default.resize_mode
    assert preprocess.fill_color == default.fill_color


def test_the_models_own_size_wins_over_the_configured_one() -> None:
    cfg = {"size": [224, 224], "mode": "RGB", "mean": 0.5, "interpolation": "random"}
    preprocess = Preprocess.from_open_clip(cfg, [32, 48])
    assert preprocess.image_size == (32, 48)
    assert preprocess.mean == (0.5, 0.5, 0.5)
    assert preprocess.interpolation == "bicubic"


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"crop": 1}, "preprocess_cfg keys out of"),
        ({"mode": "L"}, "mode RGB"),
        ({"mean": [0.5]}, "mean as three numbers"),
        ({"mean": "abc"}, "mean as three finite numbers"),
        ({"std": [0.5, 0.5, 0]}, "std as three finite numbers above zero"),
        ({"std": [0.5, 0.5, float("nan")]}, "std as three finite numbers"),
        ({"interpolation": "nearest"}, "interpolation out of bicubic, bilinear"),
        ({"interpolation": ["bicubic"]}, "interpolation out of bicubic, bilinear"),
        ({"resize_mode": "stretch"}, "resize_mode out of shortest, longest, squash"),
        ({"fill_color": 300}, "fill_color as a whole number"),
        ({"fill_color": "red"}, "fill_color as a whole number"),
    ],
)
def test_settings_out_of_range_are_refused(cfg: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Preprocess.from_open_clip(cfg, 32)


@pytest.mark.parametrize("size", [0, -1, 10_000, [1, 2, 3], [], 3.5, "32", None, True])
def test_sizes_out_of_range_are_refused(size: Any) -> None:
    with pytest.raises(ConfigError, match=r"image.size"):
        Preprocess.from_open_clip({}, size)


def test_a_dictionary_with_other_keys_is_refused() -> None:
    values = Preprocess(image_size=(32, 32)).to_dict()
    del values["mean"]
    with pytest.raises(ConfigError, match="the preprocessing keys"):
        Preprocess.from_dict(values)


def test_importing_the_module_imports_neither_torch_nor_open_clip() -> None:
    code = (
        "import sys, cbpt_runtime.runtime.preprocess; "
        "print(sorted({'torch', 'open_clip', 'jaxtyping', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
