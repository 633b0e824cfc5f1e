from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from cbpt_runtime.artifacts import check_files, hash_files, list_files, read_regular_file, records_of
from cbpt_runtime.errors import CheckpointError, ClassListError, ImageDataError
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.class_lists import read_class_list
from cbpt_runtime.runtime.preprocess import decode_image
from cbpt_runtime.serving.client.asynchronous import _read_files


def test_a_table_fits_its_folder_until_something_changes(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a", "b", "c", "d", "deep/e"):
        (tmp_path / name).write_text(name)
    table = hash_files(tmp_path, list_files(tmp_path))
    assert table["deep/e"].size_bytes == 6
    assert check_files(tmp_path, table) == []
    (tmp_path / "a").write_text("A")
    (tmp_path / "b").write_text("longer")
    (tmp_path / "c").unlink()
    (tmp_path / "d").unlink()
    os.mkfifo(tmp_path / "d")
    (tmp_path / "new").symlink_to("/dev/zero")
    assert check_files(tmp_path, table) == [
        "c is missing",
        "new is not in the manifest",
        "a was changed",
        "b was changed",
        "d is not a plain file",
    ]


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert read_regular_file(tmp_path / "link", max_bytes=5) == b"12345"
    with pytest.raises(OSError, match="Larger than 4 bytes"):
        read_regular_file(tmp_path / "file", max_bytes=4)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero", "."):
        with pytest.raises(OSError, match=r"Not a regular file|directory"):
            read_regular_file(tmp_path / name, max_bytes=5)


def test_pipes_that_a_stranger_left_are_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "photo.jpg"
    os.mkfifo(pipe)
    with pytest.raises(ImageDataError, match="no regular file"):
        decode_image(pipe)
    with pytest.raises(ImageDataError, match="not a regular file"):
        _read_files([("photo.jpg", pipe)])
    with pytest.raises(CheckpointError, match="a pipe or a device"):
        read_checkpoint(pipe, model="RN50")


def test_a_class_list_without_an_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").symlink_to("/dev/zero")
    with pytest.raises(ClassListError, match="at most 67,108,864 bytes"):
        read_class_list(tmp_path / "classes.txt")


@dataclass(frozen=True, kw_only=True)
class Weighed:
    name: str
    weight: float
    guess: float | None = None


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"name": "a", "weight": 1, "more": []}, Weighed(name="a", weight=1)),
        ({"name": "a", "weight": 1.5, "guess": None}, Weighed(name="a", weight=1.5)),
        ({"name": "a", "weight": 1.5, "guess": 2}, Weighed(name="a", weight=1.5, guess=2)),
        ({"name": "a", "weight": 1.5, "guess": "2"}, None),
        ({"name": "a"}, None),
        ({"name": 1, "weight": 1.5}, None),
        ({"name": "a", "weight": True}, None),
        ({"name": "a", "weight": float("inf")}, None),
        ({"name": "a", "weight": 10**400}, None),
        ("a", None),
        (None, None),
    ],
)
def test_rows_that_fit_become_records_and_others_are_left_out(row: object, expected: Weighed | None) -> None:
    good = {"name": "b", "weight": 2.0}
    found = records_of(Weighed, [row, good])
    assert found == (*([] if expected is None else [expected]), Weighed(name="b", weight=2.0))


@pytest.mark.parametrize("rows", [None, 3, "rows", {"name": "b", "weight": 2.0}])
def test_what_is_no_list_has_no_rows(rows: object) -> None:
    assert records_of(Weighed, rows) == ()
