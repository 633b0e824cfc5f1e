"""One exported repository of the tiny bundle, and the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cbpt_runtime.__main__ import main
from cbpt_runtime.bundle import Bundle
from cbpt_runtime.export.profiles import Profile
from cbpt_runtime.export.repository import export_bundle


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Runs the command line in this process and returns exit code, stdout and stderr."""

    def run_here(*arguments: object) -> Run:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Run(code=stopped.value.code or 0, out=captured.out, err=captured.err)

    return run_here


@pytest.fixture(scope="session")
def tiny_served(
    tiny_bundle: Bundle, tiny_image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A repository of the tiny bundle. Read only."""
    output = tmp_path_factory.mktemp("bench") / "repository"
    profile = Profile(max_batch=8, threads=1)
    export_bundle(tiny_bundle, output, name="shapes", profile=profile, calibration=tiny_image_folder)
    return output
