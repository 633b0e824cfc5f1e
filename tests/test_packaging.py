from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import cbpt_runtime

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    folders = {name.split("/")[0] for name in wheel.namelist()}
    assert {re.sub(r"-.*", "", folder) for folder in folders} == {"cbpt_runtime"}


def test_the_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    command = ["git", "ls-files", "cbpt_runtime"]
    listed = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    assert {"cbpt_runtime/report/report.html.jinja", "cbpt_runtime/py.typed"} <= set(listed)
    assert set(listed) <= set(wheel.namelist())


def test_every_dependency_is_pinned_for_ci_without_hosts_or_hashes() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all(
        re.fullmatch(r"[a-z0-9.-]+==[A-Za-z0-9.+!]+( ; python_version < '3.13')?", line) for line in lines
    )
    pinned = {line.split("==")[0] for line in lines}
    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] + extras["test"] + extras["server"] + extras["sign"] + extras["docs"]
    names = {re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    assert names <= pinned


def test_the_ci_script_runs_make_test() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    commands = [line for line in script.splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make test"]


def test_no_public_function_hides_its_keywords() -> None:
    for name in cbpt_runtime.__all__:
        public = getattr(cbpt_runtime, name)
        if callable(public):
            kinds = {parameter.kind for parameter in inspect.signature(public).parameters.values()}
            assert inspect.Parameter.VAR_KEYWORD not in kinds, name
