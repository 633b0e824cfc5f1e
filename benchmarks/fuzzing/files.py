"""Surfaces that are one file or one request: images, texts that people write, and what HTTP may ask."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import numpy as np
from multidict import CIMultiDict
from PIL import Image, TiffImagePlugin

from cbpt_runtime.bench.records import KIND, SCHEMA_VERSION
from cbpt_runtime.bench.results import compare, read_results
from cbpt_runtime.errors import CbptError
from cbpt_runtime.export.profiles import read_profile
from cbpt_runtime.models.class_lists import read_class_list
from cbpt_runtime.pipeline import read_method
from cbpt_runtime.runtime.preprocess import (
    Preprocess,
    can_decode,
    decode_image,
    is_image,
    missing_decoder,
    to_pixels,
)
from cbpt_runtime.serving.guard import admission
from fuzzing import mutations
from fuzzing.surface import Input, Surface, require

MAX_PIXELS = 1_000_000
_WHOLE_RATE = 0.02
_PREPROCESS = Preprocess(image_size=(32, 32))


class Images(Surface):
    """What `decode_image` reads, in every format; seeds are made by Pillow in several modes and sizes."""

    name = "images"
    formats = tuple(
        name
        for name in ("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "TIFF", "PPM")
        if can_decode(name)
    )
    limit_s = 10.0
    limit_mb = 192
    is_on_disk = False

    def prepare(self, folder: Path) -> None:
        """Draw a picture and save it in every way."""
        rng = np.random.default_rng(0)
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        picture = coarse.resize((47, 33), Image.Resampling.BICUBIC)
        frames = [picture.rotate(angle) for angle in (90, 180)]
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "a picture"
        turned = {"exif": exif.tobytes()}
        several = {"save_all": True, "append_images": frames}
        ways: dict[str, list[tuple[str, dict[str, Any]]]] = {
            "JPEG": [
                ("RGB", turned), ("L", {}), ("CMYK", {"progressive": True}),
                ("RGB", {"restart_marker_rows": 1}), ("RGB", {"format": "MPO", **several}),
            ],
            "PNG": [
                ("RGB", {}), ("RGBA", turned), ("P", {"transparency": 0}), ("I;16", {}), ("1", {}),
                ("RGB", several),
            ],
            "WEBP": [("RGB", turned), ("RGBA", {"lossless": True}), ("RGB", several)],
            "AVIF": [("RGB", turned), ("RGBA", {}), ("RGB", several)],
            "HEIF": [("RGB", turned), ("RGBA", {}), ("RGB", several)],
            "GIF": [("P", {"transparency": 1}), ("RGB", several)],
            "BMP": [("RGB", {}), ("P", {}), ("1", {}), ("RGBA", {})],
            "TIFF": [
                *((mode, {"compression": way}) for mode in ("RGB", "CMYK", "I;16")
                  for way in (None, "tiff_lzw")),
                *(("RGB", {"compression": way}) for way in ("jpeg", "tiff_adobe_deflate", "packbits")),
                ("1", {"compression": "group4"}), ("RGB", several), ("RGB", {"tiffinfo": _rotated()}),
            ],
            "PPM": [("RGB", {}), ("L", {}), ("1", {}), ("I;16", {})],
        }  # fmt: skip
        for form in self.formats:
            for number, (mode, options) in enumerate(ways[form]):
                converted = picture.convert("I;16" if mode == "I;16" else mode)
                if "append_images" in options:  # saving leaves traces in them
                    options = {**options, "append_images": [frame.copy() for frame in frames]}
                converted.save(folder / f"{form}-{number}", **{"format": form, **options})

    def load(self, folder: Path) -> None:
        """Read them."""
        self.seeds = {
            form: [path.read_bytes() for path in sorted(folder.glob(f"{form}-*"))] for form in self.formats
        }
        self.all = [content for group in self.seeds.values() for content in group]

    def make(self, rng: Random, form: str) -> Input:
        """One file; of half the PNGs the checksums are right again."""
        group = self.seeds[form]
        data = rng.choice(group)
        if rng.random() < _WHOLE_RATE:
            return Input(files={"image": data}, is_whole=True)
        data = mutations.spoil(rng, data, group if rng.random() < 0.9 else self.all)
        if form == "PNG" and rng.random() < 0.5:
            data = mutations.with_checksums(data)
        return Input(files={"image": data})

    def run(self, made: Input, folder: Path) -> None:
        """Decode and resize."""
        data = made.files["image"]
        assert isinstance(data, bytes)
        missing_decoder(data)
        image = decode_image(data, max_pixels=MAX_PIXELS)
        require(image.mode == "RGB", "8-bit RGB")
        require(image.width * image.height <= MAX_PIXELS, f"at most {MAX_PIXELS:,} pixels")
        require(to_pixels(image, _PREPROCESS).shape == (32, 32, 3), "the size of the model")


def _rotated() -> Any:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[0x0112] = 8
    return tags


class Texts(Surface):
    """Class lists, profiles, configurations and results of `bench`: text files that people name."""

    name = "texts"
    formats = (
        "txt",
        "csv",
        "tsv",
        "json",
        "index.json",
        "profile.toml",
        "purify.json",
        "finetuning.json",
        "bench.json",
    )
    _lists: ClassVar[dict[str, str]] = {
        "txt": "cat\nfire truck\nn01440764 tench, Tinca tinca\n",
        "csv": 'folder,name,template\nn01,cat,a photo of a {}.\nn02,"truck, red",a {} in the rain\n',
        "tsv": "n01\tcat\ta photo of a {}.\nn02\tfire truck\n",
        "profile.toml": 'provider = "cpu"\nprecision = "fp32"\nmax_batch = 8\ninstances = 1\n',
    }
    _documents: ClassVar[dict[str, Any]] = {
        "json": [
            "cat", {"name": "fire truck", "folder": "n02", "templates": ["a photo of a {}."]}, {"name": "dog"}
        ],
        "index.json": {"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]},
        "purify.json": {"seed": 1},
        "finetuning.json": {"epochs": 1, "learning_rate": 1e-4},
    }  # fmt: skip

    def load(self, folder: Path) -> None:
        """Take the defaults of the configurations as whole ones."""
        self.documents = self._documents | {
            "purify.json": json.loads(json.dumps(read_method("cbpt").to_dict())),
            "bench.json": json.loads((folder / "bench.json").read_text()),
        }

    def prepare(self, folder: Path) -> None:
        """Write a result of `bench`, shortened."""
        latencies = [1.0 + 0.1 * number for number in range(8)]
        run = {"loop": "closed", "concurrency": 2, "batch_size": 1, "latencies_ms": latencies}
        search = {
            "percentile": 99.0,
            "latency_bound_ms": 50.0,
            "held_per_s": 9.0,
            "failed_per_s": 10.0,
            "trials": [1],
        }
        passes = {"loop": "none", "batch_size": 8, "passes_per_s": latencies}
        scenarios = {
            "closed": {"runs": [run]},
            "offline": {"runs": [passes]},
            "search": {"runs": [], "search": search},
        }
        result = {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "machine": {"cpu": "any"},
            "versions": {"torch": "2"},
            "images": {"digest": "0"},
            "targets": [{"name": "a", "scenarios": scenarios}],
        }
        (folder / "bench.json").write_text(json.dumps(result))

    def make(self, rng: Random, form: str) -> Input:
        """One file."""
        is_whole = rng.random() < _WHOLE_RATE
        if form in self._lists:
            data = self._lists[form].encode()
            data = (
                data
                if is_whole
                else mutations.spoil(rng, data, [text.encode() for text in self._lists.values()])
            )
        else:
            value = self.documents[form]
            data = (
                json.dumps(value).encode()
                if is_whole
                else mutations.json_bytes(rng, mutations.spoil_json(rng, value))
            )
        return Input(files={f"a.{form}" if "." not in form else form: data}, is_whole=is_whole)

    def run(self, made: Input, folder: Path) -> None:
        """Read it as what it is named."""
        (path,) = folder.iterdir()
        is_image(path)
        match path.name:
            case "profile.toml":
                json.dumps(read_profile(path).to_dict(), allow_nan=False)
            case "purify.json":
                read_method("cbpt", path)
            case "finetuning.json":
                read_method("ft", path)
            case "bench.json":
                result = read_results(path)
                compare(result, result)
            case _:
                classes = read_class_list(path, templates=["a photo of a {}."])
                require(len(classes.names) == len(classes.templates) > 0, "templates for every class")
                "".join(itertools.chain(classes.names, *classes.templates)).encode()


class RefusedError(CbptError):
    """A request that was refused, as this program's other surfaces say it."""


class Requests(Surface):
    """What HTTP lets through to Triton: callers, heads and bodies, each compared with rules written anew."""

    name = "requests"
    formats = ("caller", "head", "json", "binary")
    limit_mb = 128
    is_on_disk = False
    _max_body = 2**20
    _hosts = (
        "localhost:8000", "127.0.0.1", "[::1]:8000", "127.1.2.3:1", "evil.example", "localhost.evil.example",
        "", "10.0.0.1:8000", "triton", "a.svc", "a.svc.evil.example", "user@localhost", "localhost:8000/",
        "[::1", "a b",
    )  # fmt: skip
    _paths = (
        "/v2", "/v2/health/live", "/v2/models/shapes", "/v2/models/shapes/infer", "/v2/repository/index",
        "/metrics", "/v2/models/shapes/versions/1/infer", "/v2/models/shapes_alarm/infer",
        "/v2/models/shapes/load", "//v2",
        "/v2/models/%73hapes_alarm/infer", "/v2/models/../repository", "/v2/systemsharedmemory/status",
    )  # fmt: skip
    _names = (
        "Content-Length", "Content-Type", "Content-Encoding", "Transfer-Encoding", "Origin", "Sec-Fetch-Site",
        admission.HEADER_LENGTH, "X-Other",
    )  # fmt: skip
    _values = (
        "0", "12", "1048576", "1048577", "-1", "1e3", "९", "9" * 30, "", "gzip", "chunked",
        "application/json", "application/octet-stream; a=b", "text/plain", "multipart/form-data", "null",
        "http://localhost:8000", "http://evil.example", "same-origin", "cross-site", "none",
    )  # fmt: skip

    def make(self, rng: Random, form: str) -> Input:
        """Who asks, what for, and with what."""
        names = rng.sample(self._names, rng.randrange(5))
        headers = {"Host": rng.choice(self._hosts), **{name: rng.choice(self._values) for name in names}}
        if rng.random() < 0.3:
            name = rng.choice(list(headers))
            headers[name] = mutations.spoil(rng, headers[name].encode()).decode("latin-1")
        path = rng.choice(self._paths)
        if rng.random() < 0.3:
            path = mutations.spoil(rng, path.encode(), [other.encode() for other in self._paths]).decode(
                "latin-1"
            )
        head = {"method": rng.choice(("GET", "POST", "POST", "PUT", "")), "path": path, "headers": headers}
        body, is_whole = b"", False
        if form in ("json", "binary"):
            shape = [1, 32, 32, 3] if rng.random() < 0.9 else [2 ** rng.randrange(70) - rng.randrange(2)]
            tensor = {"name": "images", "shape": shape, "datatype": "UINT8", "data": [1, 255, '[{\\"', 0]}
            value: Any = {"id": "a", "inputs": [tensor], "outputs": [{"name": "alarm"}]}
            is_whole = rng.random() < _WHOLE_RATE and len(shape) > 1
            if is_whole:
                body = json.dumps(value).encode()
            elif rng.random() < 0.2:
                depth = rng.randrange(25, 40)
                body = (rng.choice(("[", '{"a":', '["[",')) * depth + '"' + "]" * rng.randrange(4)).encode()
            else:
                body = mutations.json_bytes(rng, mutations.spoil_json(rng, value))
            if form == "binary":
                length = (
                    len(body) if is_whole else rng.choice((len(body), len(body) // 2, len(body) + 99, -1, ""))
                )
                headers[admission.HEADER_LENGTH] = str(length)
                body += rng.randbytes(40)
        return Input(
            files={"head.json": json.dumps(head).encode(), "body": body}, how=form, is_whole=is_whole
        )

    def run(self, made: Input, folder: Path) -> None:
        """Ask, and compare."""
        head, body = json.loads(made.files["head.json"]), made.files["body"]
        assert isinstance(body, bytes)
        headers: Any = CIMultiDict(head["headers"])
        if made.how == "caller":
            refusal = admission.refuse_caller(headers, admission.Names())
            if refusal is None:
                host = re.fullmatch(
                    r"(?:[^@/]*@)?(\[[^]]*\]|[^:/?#]*)(?::.*|[/?#].*)?", headers["Host"], re.DOTALL
                )
                name = host[1].strip("[]").lower().rstrip(".") if host else ""
                require(name == "localhost" or name.startswith("127.") or ":" in name, f"no host {name!r}")
                require(headers.get("Origin") in (None, f"http://{headers['Host']}"), "no other page")
        elif made.how == "head":
            refusal = admission.refuse_request(
                head["method"],
                head["path"],
                headers,
                max_body_bytes=self._max_body,
                inner_models=("shapes_alarm",),
            )
            if refusal is None:
                require(head["path"].isascii() and ".." not in head["path"].split("/"), "a plain path")
                require("Content-Encoding" not in headers, "nothing compressed")
                require("shapes_alarm/infer" not in head["path"], "no inner model")
                if head["method"] == "POST":
                    require("Transfer-Encoding" not in headers, "a length")
                    require(0 <= int(headers["Content-Length"]) <= self._max_body, "a small body")
        else:
            given = headers.get(admission.HEADER_LENGTH) if made.how == "binary" else None
            refusal = admission.refuse_body(body, given)
            if refusal is None:
                text = body if given is None else body[: int(given)]
                deepest, digits = _measured(text)
                require(deepest <= admission.MAX_JSON_DEPTH, f"{deepest} levels let through")
                require(digits <= admission.MAX_DIGITS, f"a number of {digits} digits let through")
        if refusal is not None:
            require(bool(refusal.text.strip()) and 400 <= refusal.status < 500, "a reason")
            raise RefusedError(expected="a request", got=refusal.text, fix="See above.")


def _measured(text: bytes) -> tuple[int, int]:
    """Most levels open at once, and digits in a row, outside of strings; byte by byte."""
    depth = deepest = digits = most = 0
    is_text = is_escaped = False
    for byte in text:
        if is_text:
            is_text = is_escaped or byte != 0x22
            is_escaped = not is_escaped and byte == 0x5C
            continue
        is_text = byte == 0x22
        depth += (byte in b"[{") - (byte in b"]}")
        deepest = max(deepest, depth)
        digits = digits + 1 if byte in b"0123456789" else 0
        most = max(most, digits)
    return deepest, most
