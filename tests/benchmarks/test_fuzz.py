"""The fuzz program: a short run of every surface finds nothing, and every planted fault is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "benchmarks" / "fuzz.py"
SURFACES = ("images", "requests", "messages", "texts", "checkpoints", "bundles", "repositories")


@pytest.fixture
def fuzz(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Returns a function that runs a program with the benchmarks' own modules in reach."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join((str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")))
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )

    return run


@pytest.mark.slow
def test_a_short_run_of_every_surface_finds_nothing(
    fuzz: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    output = tmp_path / "fuzz.json"
    done = fuzz(PROGRAM, "--seed", 1, "--inputs", 2000, "--output", output)
    assert output.is_file(), done.stderr
    result = json.loads(output.read_text())
    assert (result["findings"], done.returncode) == ([], 0)
    assert tuple(result["surfaces"]) == SURFACES
    counts = [row for surface in result["surfaces"].values() for row in surface["formats"].values()]
    assert sum(row["accepted"] + row["refused"] for row in counts) == result["inputs"] == 2000
    for name in SURFACES:
        rows = result["surfaces"][name]["formats"].values()
        assert sum(row["accepted"] for row in rows) > 0, name
        assert sum(row["refused"] for row in rows) > 0, name


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program says of a reader with every fault."""
    folder = tmp_path_factory.mktemp("planted")
    path = os.pathsep.join((str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "benchmarks" / "planted.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout)
    return outcome


@pytest.mark.parametrize(
    ("fault", "kind", "detail"),
    [
        ("whole refused", "broken promise", "a whole input was refused"),
        ("traceback", "traceback", "KeyError: 'planted'"),
        ("exit", "traceback", "SystemExit"),
        ("empty message", "message", "nothing under fix"),
        ("promise", "broken promise", "planted"),
        ("hang", "hang", "more than 2 s"),
        ("memory", "memory", "MiB more than before"),
        ("endless memory", "memory", "and growing"),
        ("crash", "crash", "SIGSEGV"),
        ("stray file", "stray file", "/work/left-behind (0)"),
        ("stray home", "stray file", "/home/left-behind (0)"),
        ("changed input", "stray file", "/work/input/file"),
        ("program", "side effect", "subprocess.Popen"),
        ("elsewhere", "side effect", "elsewhere"),
    ],
)
def test_a_planted_fault_is_found_and_named(
    planted: dict[str, Any], fault: str, kind: str, detail: str
) -> None:
    (found,) = [finding for finding in planted["findings"] if finding["format"] == fault]
    assert (found["kind"], found["surface"]) == (kind, "planted")
    assert detail in found["detail"]


def test_what_is_right_is_counted_and_no_finding(planted: dict[str, Any]) -> None:
    assert planted["counts"]["right"] == {"accepted": 1, "refused": 0}
    assert planted["counts"]["right again"] == {"accepted": 1, "refused": 0}
    assert planted["counts"]["refusal"] == {"accepted": 0, "refused": 1}
    assert len(planted["findings"]) == 14


@pytest.mark.slow
def test_a_surface_measured_again_keeps_the_others(
    fuzz: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    output = tmp_path / "fuzz.json"
    for surface, inputs in (("requests", 100), ("texts", 200), ("texts", 100)):
        done = fuzz(PROGRAM, "--surface", surface, "--inputs", inputs, "--output", output)
        assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert {name: surface["inputs"] for name, surface in result["surfaces"].items()} == {
        "requests": 17,
        "texts": 12,
    }
    assert result["inputs"] == 29
    assert (
        "same seed"
        in fuzz(PROGRAM, "--surface", "texts", "--seed", 9, "--inputs", 9, "--output", output).stderr
    )


@pytest.mark.slow
def test_seed_surface_and_number_give_the_same_input_again(
    fuzz: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    one, other, third = tmp_path / "one", tmp_path / "other", tmp_path / "third"
    for folder, number in ((one, 4), (other, 4), (third, 13)):
        fuzz(PROGRAM, "--surface", "texts", "--seed", 5, "--number", number, "--write", folder)
    contents = [next(folder.iterdir()).read_bytes() for folder in (one, other, third)]
    assert contents[0] == contents[1] != contents[2]
