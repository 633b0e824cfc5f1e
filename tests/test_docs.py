"""What docs/ say is tested is tested: every test they name exists, every layout of a file has one."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_test_that_a_document_names_exists(document: Path) -> None:
    missing = [
        f"{file}::{name}"
        for file, name in NAMED.findall(document.read_text(encoding="utf-8"))
        if not (ROOT / file).is_file() or (name and f"def {name}(" not in (ROOT / file).read_text())
    ]
    assert missing == []


@pytest.mark.parametrize("name", ["checkpoints.md", "images.md"])
def test_every_row_of_a_table_of_layouts_names_its_test(name: str) -> None:
    lines = (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    headings = [line for line, below in pairwise(lines) if below.startswith("|---")]
    assert len(rows) > len(headings) > 0
    assert [row for row in rows if row not in headings and not NAMED.search(row)] == []
