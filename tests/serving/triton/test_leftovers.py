"""What killed launchers left behind goes; what a living one has, or somebody else, stays."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cbpt_runtime.errors import ConfigError
from cbpt_runtime.serving.triton import leftovers


@pytest.fixture(params=["collected", "zombie"])
def dead(request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        if request.param == "collected":
            process.wait()
        yield process.pid


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(leftovers, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_the_dead_left_goes_and_all_else_stays(place: Path, dead: int) -> None:
    region, folder = leftovers.region_prefix(), leftovers.scratch_prefix()
    goes = [
        f"cbpt_{dead}_01234567_89abcdef_uuid",
        f"cbpt-serve-{dead}-x",
        f"cbpt_{os.getpid()}_01234567_89abcdef_uuid",  # of the last process with this number
    ]
    stays = [
        f"{region}uuid",
        f"{folder}x",
        f"cbpt_{os.getppid()}_01234567_89abcdef_uuid",
        f"cbpt-serve-{os.getppid()}-x",
        "cbpt_other",
        "cbpt-serve-other",
    ]
    for name in goes + stays:
        (place / name).mkdir() if "serve" in name else (place / name).write_bytes(b"x")
    leftovers.sweep()
    assert sorted(path.name for path in place.iterdir()) == sorted(stays)


def test_what_belongs_to_others_stays(place: Path, dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / f"cbpt_{dead}_01234567_89abcdef_uuid").write_bytes(b"x")
    (place / f"cbpt-serve-{dead}-x").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    leftovers.sweep()
    assert len(list(place.iterdir())) == 2


def test_every_server_has_a_region_of_its_own() -> None:
    assert leftovers.region_prefix() != leftovers.region_prefix()


@pytest.mark.parametrize("name", ["a b", "x$(id)y", "new\nline", "é", "plain"])
def test_the_scratch_folder_has_a_name_no_shell_reads_otherwise(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, other = tmp_path / name, tmp_path / "other"
    usual.mkdir()
    other.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(usual))
    monkeypatch.setattr(leftovers, "_OTHER_FOLDERS", (tmp_path / "missing", other))
    assert leftovers.scratch_root() == (usual if name == "plain" else other)
    monkeypatch.setattr(leftovers, "_OTHER_FOLDERS", ())
    if name != "plain":
        with pytest.raises(ConfigError, match="Set TMPDIR"):
            leftovers.scratch_root()
