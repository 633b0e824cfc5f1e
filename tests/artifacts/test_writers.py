"""Every verb that writes: it refuses, before any work, whatever is not its own, with `--force`, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from cbpt_runtime.artifacts import claimed
from cbpt_runtime.artifacts.folders import WORK
from cbpt_runtime.bundle import Bundle

WRITERS = {
    "purify": "purify --checkpoint {checkpoint} --classes {classes} --images {images} --output {output}",
    "purify, another method": "purify --checkpoint {checkpoint} --classes {classes} --images {images} "
    "--method ft --output {output}",
    "export": "export {bundle} --output {output}",
    "bench": "bench run {bundle} --images {images} --output {output}",
    "attack apply": "attack apply sig --images {images} --output {output}",
    "attack implant": "attack implant badnet --checkpoint {checkpoint} --images {images} --classes {classes} "
    "--target red_square --output {output}",
    "evaluate": "evaluate {bundle} --images {images} --report {output}",
    "scan": "scan {checkpoint} --images {images} --report {output}",
    "demo": "demo --output {output}",
}
FOREIGN = {
    "a folder with a thesis": ["thesis.txt"],
    "a web app": ["manifest.json", "index.html"],
    "somebody's images": ["images/train/owl/1.png", "classes.txt"],
    "a checkpoint of somebody else": ["open_clip_config.json", "open_clip_model.safetensors"],
}


@pytest.fixture
def write(
    run: Callable,
    tmp_path: Path,
    tiny_checkpoint_folder: Path,
    tiny_class_file: Path,
    tiny_image_folder: Path,
    tiny_bundle: Bundle,
) -> Callable[..., SimpleNamespace]:
    """Returns a function that runs a verb of `WRITERS`."""

    def write_here(verb: str, output: Path, *more: str) -> SimpleNamespace:
        places = {
            "checkpoint": tiny_checkpoint_folder,
            "classes": tiny_class_file,
            "images": tiny_image_folder,
            "bundle": tiny_bundle.path,
            "output": output,
        }
        return run(*(word.format(**places) for word in WRITERS[verb].split()), *more)

    return write_here


def fill(folder: Path, files: list[str]) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("verb", WRITERS)
def test_a_foreign_folder_is_refused_with_force_too(
    write: Callable, tmp_path: Path, verb: str, files: list[str]
) -> None:
    fill(tmp_path / "home", files)
    before = everything(tmp_path)
    done = write(verb, tmp_path / "home", "--force")
    assert (done.code, done.out) == (2, "")
    assert "something else" in done.err or "somebody else" in done.err
    assert everything(tmp_path) == before


@pytest.mark.parametrize("verb", WRITERS)
def test_a_foreign_file_or_link_is_refused_with_force_too(write: Callable, tmp_path: Path, verb: str) -> None:
    fill(tmp_path, ["thesis.html"])
    (tmp_path / "link").symlink_to("thesis.html")
    for name in ("thesis.html", "link"):
        assert write(verb, tmp_path / name, "--force").code == 2
    assert everything(tmp_path) == ["link", "thesis.html"]
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("verb", [verb for verb in WRITERS if verb != "demo"])
def test_a_work_folder_of_somebody_else_is_refused(write: Callable, tmp_path: Path, verb: str) -> None:
    fill(tmp_path / "out.partial", ["download"])
    done = write(verb, tmp_path / "out")
    assert (done.code, "somebody else" in done.err) == (2, True)
    assert everything(tmp_path) == ["out.partial", "out.partial/download"]


@pytest.mark.parametrize("verb", WRITERS)
def test_an_output_that_another_run_is_writing_is_refused(write: Callable, tmp_path: Path, verb: str) -> None:
    busy, name = (tmp_path / "out", "demo") if verb == "demo" else (tmp_path / "out.partial", WORK)
    with claimed(busy, name):
        done = write(verb, tmp_path / "out", "--force")
    assert (done.code, "another run" in done.err) == (2, True)
    assert everything(tmp_path) == []
