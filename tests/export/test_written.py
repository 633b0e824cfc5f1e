"""Code, configurations and labels that this version would not have written are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cbpt_runtime.errors import RepositoryError
from cbpt_runtime.export.manifest import read_repository
from cbpt_runtime.export.verify import verify_repository
from cbpt_runtime.export.written import foreign_files, require_own_files
from cbpt_runtime.serving.config import ServeConfig
from cbpt_runtime.serving.triton.startup import make_plan

Reseal = Callable[[Path], None]
CHANGES: dict[str, tuple[str, Callable[[str], str]]] = {
    "preprocessing": (
        "shapes_preprocess/1/runtime/preprocess.py",
        lambda code: code + "\nimport os\n",
    ),
    "entry": ("shapes_classifier/1/model.py", lambda code: code.replace("True", "False")),
    "a way round the counter": (
        "shapes/config.pbtxt",
        lambda text: text.replace('value: "uncounted_alarm"', 'value: "alarm"'),
    ),
    "a larger queue": ("shapes_classifier/config.pbtxt", lambda text: text.replace("256", "9999")),
    "another backend": (
        "shapes_classifier/configs/cpu.pbtxt",
        lambda text: text.replace("onnxruntime", "dali"),
    ),
    "labels": ("shapes/labels.txt", lambda text: text.replace("red_square", "green")),
}


def test_what_export_writes_is_its_own(copied_repository: Path) -> None:
    assert foreign_files(read_repository(copied_repository)) == []


def test_the_level_of_the_alarm_is_that_of_the_manifest(copied_repository: Path) -> None:
    file = copied_repository / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "alarm_threshold": 0.25}))
    repository = read_repository(copied_repository)
    assert repository.manifest.alarm_threshold == 0.25
    assert set(foreign_files(repository)) == {"shapes/config.pbtxt", "shapes_alarm/config.pbtxt"}


@pytest.mark.parametrize("level", [-0.1, 1.5, "high", True])
def test_a_level_of_the_alarm_that_is_none_is_refused(level: object, copied_repository: Path) -> None:
    file = copied_repository / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "alarm_threshold": level}))
    with pytest.raises(RepositoryError, match="alarm_threshold"):
        read_repository(copied_repository)


@pytest.mark.parametrize(("file", "change"), CHANGES.values(), ids=CHANGES)
def test_a_change_that_the_manifest_fits_is_refused_by_name(
    copied_repository: Path, resealed: Reseal, file: str, change: Callable[[str], str]
) -> None:
    before = (copied_repository / file).read_text()
    (copied_repository / file).write_text(change(before))
    assert (copied_repository / file).read_text() != before
    resealed(copied_repository)
    repository = read_repository(copied_repository)
    with pytest.raises(RepositoryError, match=f"something else in {file}.*--allow-foreign-code"):
        require_own_files(repository)
    assert require_own_files(repository, allow_foreign_code=True) == [file]


@pytest.mark.parametrize(
    "name", ["shapes_alarm/1/extra.py", "shapes/1/golden/run.py", "shapes_alarm/2/model.py", "x"]
)
def test_a_file_too_many_is_refused_by_name(copied_repository: Path, resealed: Reseal, name: str) -> None:
    (copied_repository / name).parent.mkdir(exist_ok=True)
    (copied_repository / name).write_text("print()")
    resealed(copied_repository)
    with pytest.raises(RepositoryError, match=f"something else in {name}"):
        require_own_files(read_repository(copied_repository))


def test_verify_and_serve_refuse_and_name_what_they_let_in(copied_repository: Path, resealed: Reseal) -> None:
    file = "shapes_alarm/1/runtime/triton_models.py"
    (copied_repository / file).write_text("raise SystemExit")
    resealed(copied_repository)
    for refuse in (verify_repository, lambda path: make_plan(path, ServeConfig())):
        with pytest.raises(RepositoryError, match=f"something else in {file}"):
            refuse(copied_repository)
    assert verify_repository(copied_repository, allow_foreign_code=True).foreign == (file,)


def test_instances_and_threads_of_another_machine_are_no_change(
    copied_repository: Path, resealed: Reseal
) -> None:
    file = copied_repository / "shapes_classifier" / "config.pbtxt"
    file.write_text(file.read_text().replace("count: 1", "count: 16"))
    resealed(copied_repository)
    assert foreign_files(read_repository(copied_repository)) == []
    file.write_text(file.read_text().replace("count: 16", "count: 100000"))
    resealed(copied_repository)
    assert foreign_files(read_repository(copied_repository)) == ["shapes_classifier/config.pbtxt"]


def test_a_manifest_that_says_too_little_is_refused(copied_repository: Path) -> None:
    manifest = json.loads((copied_repository / "manifest.json").read_text())
    del manifest["checkpoint_sha256"]
    (copied_repository / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RepositoryError, match="checkpoint_sha256"):
        foreign_files(read_repository(copied_repository))
