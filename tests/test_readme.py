"""What the README shows must work: Python runs, commands and flags exist, links lead somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.cli
import typer.main
from typer.testing import CliRunner

from cbpt_runtime.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    return [words for words in map(shlex.split, lines) if words[0] == "cbpt-runtime"]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(
    code: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_checkpoint_folder: Path,
    tiny_class_file: Path,
    tiny_image_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(tiny_checkpoint_folder, tmp_path / "suspect")
    shutil.copy(tiny_class_file, tmp_path / "classes.txt")
    shutil.copytree(tiny_image_folder, tmp_path / "clean")
    shutil.copy(min(tiny_image_folder.rglob("*.png")), tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_python_session_has_six_lines() -> None:
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(lines) == 6


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_parse(words: list[str]) -> None:
    group = typer.main.get_command(app)
    verb, given = group.commands[words[1]], words[2:]  # type: ignore[attr-defined]
    if given[0] in getattr(verb, "commands", {}):
        verb, given = verb.commands[given[0]], given[1:]
    assert verb.make_context(words[1], given, resilient_parsing=False).params


def test_flags_named_in_the_table_exist(run_help: Callable[[str], str]) -> None:
    rows = re.findall(r"^\| `cbpt-runtime (\w+(?: run)?)[^|]*\|.*$", README, flags=re.MULTILINE)
    verbs = [
        "scan",
        "purify",
        "inspect",
        "convert",
        "classify",
        "label",
        "evaluate",
        "export",
        "verify",
        "sign",
        "serve",
        "bench run",
        "demo",
        "attack",
    ]
    assert rows == verbs
    for line in README.splitlines():
        if found := re.match(r"\| `cbpt-runtime (\w+(?: run)?)", line):
            text = run_help(found[1])
            for flag in re.findall(r"--[a-z]+", line):
                assert flag in text, f"{found[1]} has no {flag}"


@pytest.fixture
def run_help(capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    def help_of(verb: str) -> str:
        with pytest.raises(SystemExit):
            app([*verb.split(), "--help"])
        return capsys.readouterr().out

    return help_of


def test_the_command_page_is_what_help_says() -> None:
    words = ["cbpt_runtime.cli.app", "utils", "docs", "--name", "cbpt-runtime"]
    printed = CliRunner().invoke(typer.cli.app, words).stdout
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert printed.strip() == written.strip(), "run make docs"


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert missing == []


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in re.findall(r"\bmake ([a-z]+)\b", README):
        assert re.search(rf"^{name}:", makefile, flags=re.MULTILINE)
