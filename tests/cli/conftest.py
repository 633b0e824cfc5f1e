from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from cbpt_runtime.__main__ import main


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
