"""What docs/ say is tested is tested: every test they name exists, every layout of a file has one."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

WIDTH = 120
ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md")])
FOLDERS = [ROOT / name for name in ("benchmarks", "cbpt_runtime", "docs", "export", "tests")]
ELSEWHERE = {"1/model.py"}  # in a model repository
WRITTEN = [path for path in DOCUMENTS if path.name != "cli.md"]  # that one is printed by --help


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_test_that_a_document_names_exists(document: Path) -> None:
    missing = [
        f"{file}::{name}"
        for file, name in NAMED.findall(document.read_text(encoding="utf-8"))
        if not (ROOT / file).is_file() or (name and f"def {name}(" not in (ROOT / file).read_text())
    ]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_program_that_a_document_names_exists(document: Path) -> None:
    programs = re.findall(r"(?<![\w/.-])(\w[\w/.-]*\.py)\b", document.read_text(encoding="utf-8"))
    places = [f"/{path.relative_to(ROOT).as_posix()}" for folder in FOLDERS for path in folder.rglob("*.py")]
    lost = {name for name in programs if not any(place.endswith(f"/{name}") for place in places)}
    assert lost <= ELSEWHERE


@pytest.mark.parametrize("name", ["checkpoints.md", "images.md"])
def test_every_row_of_a_table_of_layouts_names_its_test(name: str) -> None:
    lines = (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    headings = [line for line, below in pairwise(lines) if below.startswith("|---")]
    assert len(rows) > len(headings) > 0
    assert [row for row in rows if row not in headings and not NAMED.search(row)] == []


@pytest.mark.parametrize("document", WRITTEN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_prose_is_no_wider_than_the_page(document: Path) -> None:
    prose = re.sub(
        r"^ *```.*?^ *```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    wide = [line for line in prose.splitlines() if len(line) > WIDTH and can_be_broken(line)]
    assert wide == []


def can_be_broken(line: str) -> bool:
    """Whether a line is text with a space to break it at: no table, no code, no single long link."""
    return not line.startswith(("|", "    ")) and " " in re.sub(r"`[^`]*`|\]\([^)]*\)", "", line.strip())


def test_only_text_with_a_space_outside_code_and_links_can_be_broken() -> None:
    assert can_be_broken("one two")
    assert can_be_broken("see `code` there")
    assert not any(map(can_be_broken, ["| a | b |", "    a command", "`a b`", "[a](b c)"]))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8"))
    missing = [name for name in targets if "://" not in name and not (document.parent / name).exists()]
    assert missing == []
