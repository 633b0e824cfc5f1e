"""Every verb over a folder of bad inputs: exit code 2, expected, got, what to do; nothing half written."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cbpt_runtime.artifacts.names import is_folder
from cbpt_runtime.artifacts.signing import SIGNATURE
from cbpt_runtime.bundle import Bundle
from cbpt_runtime.cli.app import app
from cbpt_runtime.export.manifest import KIND
from cbpt_runtime.export.repository import export_bundle

LEAST = 60
TENSORS = {"visual.conv1.weight": torch.ones(2, 3)}


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("false",)


def _files(root: Path) -> None:
    """Files that are no checkpoint, list, image or configuration, or damaged ones."""
    contents: dict[str, bytes] = {
        "empty": b"",
        "empty.pt": b"",
        "empty.safetensors": b"",
        "empty.json": b"",
        "one-class.txt": b"cat\n",
        "one-class.json": b'["cat"]',
        "page.html.pt": b"<!DOCTYPE html><html><title>404</title></html>",
        "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "latin-1.txt": b"caf\xe9\n\xe9t\xe9\n",
        "utf-16.txt": "cat\ndog\n".encode("utf-16"),
        "broken.json": b'{"seed": 1,',
        "list.json": b"[1, 2]",
        "number.json": b"1",
        "null.json": b"null",
        "deep.json": b"[" * 100_000,
        "half.json": rb'["cat\ud800", "dog"]',
        "doubled.json": b'["cat", "Cat"]',
        "bare-words.json": b'{"n01440764": ["tench"], "n01443537": ["goldfish"]}',
        "negative.json": b'{"seed": -1}',
        "unknown-key.json": b'{"sede": 1}',
        "random.bin": np.random.default_rng(0).bytes(1000),
        "zeros.bin": bytes(1000),
        "gzip.pt": b"\x1f\x8b\x08" + bytes(40),
        "header-only.safetensors": struct.pack("<Q", 2**31) + b"{}",
        "nonsense-header.safetensors": struct.pack("<Q", 9) + b'{"a": 1}}',
        "protocol.pt": b"\x80\x02",
        "\n.txt": b"cat\n",
        os.fsdecode(b"caf\xe9.txt"): b"cat\n",
    }
    for name, content in contents.items():
        (root / name).write_bytes(content)
    torch.save(TENSORS, root / "whole.pt")
    content = (root / "whole.pt").read_bytes()
    (root / "whole.pt").unlink()
    (root / "cut.pt").write_bytes(content[: len(content) // 2])
    (root / "cut-end.pt").write_bytes(content[:-10])
    torch.save({"a": 1, "b": "text"}, root / "no-tensors.pt")
    torch.save([1, 2], root / "list.pt")
    torch.save(torch.ones(3), root / "tensor.pt")
    torch.save({"state": {}, "param_groups": [{"lr": 0.1}]}, root / "optimizer.pt")
    torch.save({"layer.lora_A.weight": torch.ones(2, 2)}, root / "lora.pt")
    torch.save({"weight": Evil()}, root / "evil.pt")
    np.savez(root / "arrays.npz", a=np.ones(3))
    with zipfile.ZipFile(root / "archive.zip", "w") as archive:
        archive.writestr("readme.txt", "x")
    save_file({}, root / "no-tensors.safetensors")
    save_file(TENSORS, root / "no-architecture.safetensors")
    Image.new("RGB", (8, 8)).save(root / "image.png")
    (root / "cut.png").write_bytes((root / "image.png").read_bytes()[:40])


def _links(root: Path) -> None:
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("nowhere")
    (root / "to-file").symlink_to("empty")


def _checkpoints(root: Path, good: Path) -> None:
    """Folders that look like checkpoints."""
    for name, change in {
        "unknown-setting": {"surprise": 1},
        "no-embed-dim": {"embed_dim": None},
        "huge": {"embed_dim": 10**9},
        "captions": {"multimodal_cfg": {}},
        "text-setting": {"embed_dim": "16"},
    }.items():
        shutil.copytree(good, root / name)
        config = json.loads((root / name / "open_clip_config.json").read_text())
        config["model_cfg"] |= change
        (root / name / "open_clip_config.json").write_text(json.dumps(config))
    for name, text in {
        "config-is-list": "[]",
        "config-is-cut": '{"model_cfg": {',
        "config-is-empty": "",
    }.items():
        shutil.copytree(good, root / name)
        (root / name / "open_clip_config.json").write_text(text)
    for name in ("no-weights", "cut-weights"):
        shutil.copytree(good, root / name)
        weights = root / name / "open_clip_model.safetensors"
        content = weights.read_bytes()
        weights.unlink()
        if name == "cut-weights":
            weights.write_bytes(content[:5000])
    (root / "bert").mkdir()
    (root / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text("{}")
    (root / "distributed").mkdir()
    (root / "distributed" / ".metadata").write_bytes(b"")
    (root / "distributed" / "__0_0.distcp").write_bytes(b"")
    (root / "shards").mkdir()
    (root / "shards" / "config.json").write_text('{"model_type": "clip"}')
    (root / "shards" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret.bin"}}')


def _bundles_and_repositories(root: Path, bundle: Path) -> None:
    """Folders that look like bundles or repositories."""
    for name, change in {
        "bundle-of-tomorrow": {"schema_version": 99},
        "bundle-without-classes": {"classes": None},
        "bundle-that-leaves": {"files": {"../../secret": {"sha256": "0"}}},
    }.items():
        shutil.copytree(bundle, root / name)
        manifest = json.loads((root / name / "manifest.json").read_text()) | change
        (root / name / "manifest.json").write_text(json.dumps(manifest))
    shutil.copytree(bundle, root / "bundle-without-head")
    (root / "bundle-without-head" / "head.safetensors").unlink()
    shutil.copytree(bundle, root / "bundle-changed")
    with (root / "bundle-changed" / "encoder.safetensors").open("ab") as stream:
        stream.write(b"x")
    for name, text in {
        "manifest-is-list": "[]",
        "manifest-is-cut": "{",
        "manifest-is-deep": "[" * 100_000,
        "repository-without-keys": json.dumps({"kind": KIND, "schema_version": 1}),
        "repository-that-leaves": json.dumps({"kind": KIND, "schema_version": 1, "files": {"../x": {}}}),
        "repository-of-tomorrow": json.dumps({"kind": KIND, "schema_version": 99}),
    }.items():
        (root / name).mkdir()
        (root / name / "manifest.json").write_text(text)


def _image_folders(root: Path, images: Path) -> None:
    """Folders that look like class folders."""
    (root / "empty-folder").mkdir()
    (root / "folder-of-text").mkdir()
    (root / "folder-of-text" / "notes.txt").write_text("x")
    shutil.copytree(images, root / "cut-images")
    for path in (root / "cut-images").glob("*/*.png"):
        path.write_bytes(path.read_bytes()[:100])
    shutil.copytree(images, root / "no-images-in-a-class")
    for path in (root / "no-images-in-a-class" / "red_square").iterdir():
        path.unlink()


@pytest.fixture(scope="module")
def bad(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint_folder: Path,
    tiny_image_folder: Path,
    tiny_bundle: Bundle,
) -> list[Path]:
    """Paths of bad inputs, and some that are no paths of anything."""
    root = tmp_path_factory.mktemp("bad")
    _files(root)
    _links(root)
    _checkpoints(root, tiny_checkpoint_folder)
    _bundles_and_repositories(root, tiny_bundle.path)
    _image_folders(root, tiny_image_folder)
    there = sorted(root.iterdir())
    assert len(there) >= LEAST
    return [*there, root / "missing", root / "empty" / "below", root / ("x" * 300), root / "a#b"]


# Where each bad input is put; {x} is the bad one, the others are good ones.
SLOTS: dict[str, str] = {
    "inspect": "inspect {x}",
    "convert": "convert {x} --output {output}",
    "scan": "scan {x} --images {images} --report {output}",
    "scan --images": "scan {checkpoint} --images {x} --report {output}",
    "scan --classes": "scan {checkpoint} --images {images} --classes {x} --report {output}",
    "scan --reference": "scan {checkpoint} --images {images} --reference {x} --report {output}",
    "scan --config": "scan {checkpoint} --images {images} --config {x} --report {output}",
    "purify --checkpoint": "purify --checkpoint {x} --classes {classes} --images {images} --output {output}",
    "purify --classes": "purify --checkpoint {checkpoint} --classes {x} --images {images} --output {output}",
    "purify --images": "purify --checkpoint {checkpoint} --classes {classes} --images {x} --output {output}",
    "purify --config": "purify --checkpoint {checkpoint} --classes {classes} --images {images} --config {x}"
    " --output {output}",
    "purify --method": "purify --checkpoint {checkpoint} --classes {classes} --images {images} --config {x}"
    " --method ft --output {output}",
    "classify": "classify {x} {images}/red_square/00.png",
    "classify IMAGE": "classify {bundle} {x}",
    "label --classifier": "label {images} --classifier {x} --output {output}",
    "classify --classes": "classify {checkpoint} {images}/red_square/00.png --classes {x}",
    "evaluate": "evaluate {x} --classes {classes} --images {images} --report {output}",
    "evaluate --images": "evaluate {bundle} --images {x} --report {output}",
    "evaluate --classes": "evaluate {checkpoint} --classes {x} --images {images} --report {output}",
    "evaluate --attack": "evaluate {bundle} --images {images} --attack {x} --target red_square",
    "export": "export {x} --output {output}",
    "export --calibration": "export {bundle} --calibration {x} --output {output}",
    "export --profile": "export {bundle} --profile {x} --output {output}",
    "verify": "verify {x}",
    "verify --bundle": "verify {repository} --bundle {x}",
    "verify --trust": "verify {repository} --trust {x}",
    "sign": "sign {x} --key {key}",
    "sign --key": "sign {bundle} --key {x}",
    "sign --certificate": "sign {bundle} --key {key} --certificate {x}",
    "serve": "serve {x}",
    "serve --print-command": "serve {x} --print-command",
    "bench run": "bench run {x} --images {images} --output {output}",
    "bench run --images": "bench run {bundle} --images {x} --output {output}",
    "bench compare": "bench compare {x} {x}",
    "demo": "demo --output {x}",
    "attack apply": "attack apply badnet --images {x} --output {output}",
    "attack apply FILE": "attack apply {x} --images {images} --output {output}",
    "attack implant": "attack implant badnet --checkpoint {x} --images {images} --classes {classes}"
    " --target red_square --output {output}",
    "attack implant --images": "attack implant badnet --checkpoint {checkpoint} --images {x}"
    " --classes {classes} --target red_square --output {output}",
}
# What is bad elsewhere and good there.
LISTS = {"pointer.safetensors"}  # three lines of text are three classes
EMPTY = {
    "empty",
    "empty.json",
    "empty.pt",
    "empty.safetensors",
    "to-file",
}  # the profile that changes nothing
FINE = {
    "demo": {"empty-folder", "missing", "a#b"},
    "export --profile": EMPTY,
    "scan --classes": LISTS,
    "purify --classes": LISTS,
    "evaluate --classes": LISTS,
    "classify --classes": LISTS,
    "inspect": {"no-architecture.safetensors"},
    "classify IMAGE": {"image.png", "no-images-in-a-class"},
    "scan --images": {"no-images-in-a-class"},
    "bench run --images": {"no-images-in-a-class"},
    "export --calibration": {"no-images-in-a-class"},
    "attack apply": {"no-images-in-a-class"},
}


def list_signatures(folder: Path) -> list[Path]:
    return list(folder.glob(f"{SIGNATURE}*")) if is_folder(folder) else []


# One slot of every verb; the others take minutes.
ALWAYS = (
    *(
        "inspect",
        "convert",
        "scan",
        "purify --checkpoint",
        "classify",
        "label --classifier",
        "evaluate",
        "export",
        "verify",
        "sign",
        "serve",
    ),
    *("bench run", "bench compare", "attack apply", "attack implant", "demo"),
)


@pytest.fixture(scope="module")
def repository(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good one."""
    return export_bundle(tiny_bundle, tmp_path_factory.mktemp("good") / "repository").path


@pytest.mark.parametrize(
    "slot", [slot if slot in ALWAYS else pytest.param(slot, marks=pytest.mark.nightly) for slot in SLOTS]
)
def test_bad_inputs_are_refused_with_advice_and_nothing_is_written(
    slot: str,
    run: Callable,
    bad: list[Path],
    tmp_path: Path,
    tiny_checkpoint_folder: Path,
    tiny_class_file: Path,
    tiny_image_folder: Path,
    tiny_bundle: Bundle,
    request: pytest.FixtureRequest,
) -> None:
    good: dict[str, Path] = {
        "checkpoint": tiny_checkpoint_folder,
        "classes": tiny_class_file,
        "images": tiny_image_folder,
        "bundle": tiny_bundle.path,
        "output": tmp_path / "output",
    }
    if "{repository}" in SLOTS[slot]:
        good["repository"] = request.getfixturevalue("repository")
    if slot.startswith("sign"):
        good["key"] = request.getfixturevalue("signing_keys") / "ours.pem"
    wrong = []
    for path in bad:
        if path.name in FINE.get(slot, ()):
            continue
        words = [word.format(x=path, **good) for word in SLOTS[slot].split()]
        start = time.monotonic()
        try:
            done = run(*words)
        except BaseException as error:
            wrong.append(f"{path.name!r}: {type(error).__name__}: {error}")
            continue
        lines = done.err.splitlines()
        says = [line for line in lines if line.startswith(("error: expected ", "       "))]
        if done.code != 2 or len(says) < 3 or done.out or "Traceback" in done.err:
            wrong.append(f"{path.name!r}: exit {done.code}: {done.err[-300:]!r}")
        if any(list_signatures(each) for each in (path, tiny_bundle.path)):
            wrong.append(f"{path.name!r}: was signed")
        if left := list(tmp_path.iterdir()):
            wrong.append(f"{path.name!r}: left {[entry.name for entry in left]}")
            shutil.rmtree(tmp_path, ignore_errors=True)
            tmp_path.mkdir()
        if time.monotonic() - start > 20:
            wrong.append(f"{path.name!r}: took {time.monotonic() - start:.0f} s")
    assert not wrong, "\n".join(wrong)


def test_every_verb_has_a_slot_that_ci_runs() -> None:
    verbs = {command.name for command in app.registered_commands} | {
        f"{group.name} {command.name}"
        for group in app.registered_groups
        for command in group.typer_instance.registered_commands
    }
    assert verbs - {"attack list"} == {slot.partition(" --")[0] for slot in ALWAYS}  # which takes no input
    assert set(ALWAYS) <= set(SLOTS)
