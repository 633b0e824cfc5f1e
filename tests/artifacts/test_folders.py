"""Whole or absent, never over what is not of the kind, one run at a time."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cbpt_runtime.artifacts import MARKER, Kind, claimed, folders, marked, new_file, new_folder, reserved
from cbpt_runtime.errors import OutputError

KIND = marked("test folder")


def own_page(path: Path) -> tuple[str, ...] | None:
    return () if path.is_file() and path.read_bytes().startswith(b"ours") else None


PAGE = Kind(name="page", own_files=own_page, is_file=True)


def put(path: Path, text: str = "new", *, force: bool = False) -> None:
    with new_folder(path, KIND, force=force) as staging:
        (staging / "a.txt").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_folder_appears_when_it_is_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    with new_folder(tmp_path / "new" / "out", KIND) as staging:
        assert not (tmp_path / "new" / "out").exists()
        (staging / "a.txt").write_text("x")
    assert names(tmp_path) == ["new", "new/out", f"new/out/{MARKER}", "new/out/a.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failure_leaves_nothing_not_even_parents(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):  # noqa: PT012, SIM117
        with new_folder(tmp_path / "new" / "out", KIND) as staging:
            (staging / "a.txt").write_text("x")
            raise error
    assert names(tmp_path) == []


def test_force_replaces_a_folder_of_its_kind_and_an_empty_one(tmp_path: Path) -> None:
    put(tmp_path / "out", "old")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutputError, match="replace the test folder there with --force"):
        put(tmp_path / "out")
    for name in ("out", "empty"):
        put(tmp_path / name, force=True)
        assert (tmp_path / name / "a.txt").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out"]


def test_force_refuses_other_kinds_links_and_what_somebody_put_there(tmp_path: Path) -> None:
    put(tmp_path / "mixed")
    (tmp_path / "mixed" / "thesis.txt").write_text("four years")
    put(tmp_path / "own")
    (tmp_path / "link").symlink_to(tmp_path / "own")
    with new_folder(tmp_path / "other", marked("other folder")):
        pass
    for name, said in (("mixed", "thesis.txt"), ("link", "a link"), ("other", "something else")):
        with pytest.raises(OutputError, match=said):
            put(tmp_path / name, force=True)
    assert (tmp_path / "mixed" / "thesis.txt").read_text() == "four years"
    assert (tmp_path / "own" / "a.txt").read_text() == "new"


@pytest.mark.parametrize(
    ("force", "files", "said"),
    [
        (False, ["thesis.txt"], "meanwhile"),
        (False, [], "meanwhile"),
        (True, ["thesis.txt"], "something else"),
    ],
)
def test_a_folder_made_during_the_run_is_never_deleted(
    tmp_path: Path, force: bool, files: list[str], said: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=said):  # noqa: PT012, SIM117
        with new_folder(out, KIND, force=force):
            out.mkdir()
            for name in files:
                (out / name).write_text("four years")
    assert names(tmp_path) == ["out", *(f"out/{name}" for name in files)]


def test_a_file_made_during_the_run_is_never_deleted(tmp_path: Path) -> None:
    with reserved(tmp_path / "page", PAGE):
        (tmp_path / "page").write_bytes(b"theirs")
        with pytest.raises(OutputError, match="meanwhile"):
            new_file(tmp_path / "page", PAGE, b"ours")
    assert (tmp_path / "page").read_bytes() == b"theirs"


def test_a_file_replaces_a_file_of_its_kind_and_never_a_folder(tmp_path: Path) -> None:
    new_file(tmp_path / "page", PAGE, b"ours, old")
    new_file(tmp_path / "page", PAGE, b"ours, new", force=True)
    assert (tmp_path / "page").read_bytes() == b"ours, new"
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / "folder").mkdir()
    for name in ("theirs", "folder"):
        with pytest.raises(OutputError, match="something else"):
            new_file(tmp_path / name, PAGE, b"ours", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "page", "theirs"]


def test_of_two_runs_into_one_output_one_is_refused_at_once(tmp_path: Path) -> None:
    put(tmp_path / "out", "old", force=True)
    seen: list[str] = []

    def second() -> None:
        try:
            put(tmp_path / "out", "second", force=True)
        except OutputError as error:
            seen.append(str(error))

    with new_folder(tmp_path / "out", KIND, force=True) as staging:
        (staging / "a.txt").write_text("first")
        other = threading.Thread(target=second)
        other.start()
        other.join()
    assert "another run that is writing there" in seen[0]
    assert (tmp_path / "out" / "a.txt").read_text() == "first"


def test_two_processes_share_the_lock(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cbpt_runtime.artifacts import marked, reserved\n"
        "with reserved(Path(sys.argv[1]), marked('test folder')): print('x', flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"x\n"
    with pytest.raises(OutputError, match="another run"):
        put(tmp_path / "out")
    other.send_signal(signal.SIGKILL)
    other.communicate()
    assert (tmp_path / "out.partial").is_dir()
    put(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_work_folder_of_somebody_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "download").write_text("half")
    with pytest.raises(OutputError, match="somebody else"):
        put(tmp_path / "out", force=True)
    assert names(tmp_path) == ["out.partial", "out.partial/download"]


def test_what_somebody_puts_into_the_work_folder_stays(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", KIND) as staging:
        (staging.parent / "notes.txt").write_text("mine")
    assert (tmp_path / "out.partial" / "notes.txt").read_text() == "mine"


def test_stages_are_kept_for_the_next_run_until_one_succeeds(tmp_path: Path) -> None:
    def go(error: bool, resume: bool) -> list[str]:
        with reserved(tmp_path / "out", KIND, resume=resume) as stages:
            found = names(stages) if stages.exists() else []
            stages.mkdir(exist_ok=True)
            (stages / "one").write_text("x")
            if error:
                raise KeyboardInterrupt
        return found

    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            go(True, resume)
    assert go(False, True) == ["one"]
    assert names(tmp_path) == []
    with pytest.raises(KeyboardInterrupt):
        go(True, False)
    assert go(False, False) == []


@pytest.mark.parametrize("step", ["_take", "rename"])
def test_what_was_to_be_replaced_survives_a_kill_between_the_last_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    put(tmp_path / "out", "old")
    child = os.fork()
    if child == 0:  # killed when the old folder is aside and the new one has not its place
        take = folders._take

        def die(path: Path, *, is_folder: bool) -> None:
            if step == "rename":
                take(path, is_folder=is_folder)
            os._exit(9)

        monkeypatch.setattr(folders, "_take", die)
        put(tmp_path / "out", force=True)
    os.waitpid(child, 0)
    assert not (tmp_path / "out" / "a.txt").exists()
    with pytest.raises(ValueError, match="stop"), new_folder(tmp_path / "out", KIND, force=True):
        raise ValueError("stop")
    assert (tmp_path / "out" / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failing_last_step_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "out", "old")

    def fail(path: Path, *, is_folder: bool) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(folders, "_take", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        put(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_everything_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    sync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (steps.append(Path(f"/proc/self/fd/{fd}").readlink().name), sync(fd))[1]
    )
    monkeypatch.setattr(Path, "rename", lambda path, to: (steps.append("rename"), rename(path, to))[1])
    put(tmp_path / "out")
    assert steps.index("a.txt") < steps.index("rename")
    assert steps.index("new") < steps.index("rename")
    assert steps[-1] == tmp_path.name


def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="to be able to write"):
        put(tmp_path / "file" / "out")

    def refuse(path: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # permission bits do not stop root, as whom CI may run
    with pytest.raises(OutputError, match=r"Permission denied.*may write to"):
        put(tmp_path / "out")


def test_a_claimed_folder_keeps_its_marker_while_there_is_something_in_it(tmp_path: Path) -> None:
    with claimed(tmp_path / "demo", "demo"):
        (tmp_path / "demo" / "a.txt").write_text("x")
    with claimed(tmp_path / "demo", "demo"):
        (tmp_path / "demo" / "a.txt").unlink()
    assert names(tmp_path) == []
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("x")
    with pytest.raises(OutputError, match="somebody else"), claimed(tmp_path / "other", "demo"):
        pass


def test_an_output_that_is_the_current_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.txt").write_text("four years")
    monkeypatch.chdir(tmp_path)
    for name in (".", "..", "/"):
        with pytest.raises(OutputError, match="something else"):
            put(Path(name), force=True)
    assert names(tmp_path) == ["thesis.txt"]
