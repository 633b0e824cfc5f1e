"""The documentation site builds without a warning and shows every public name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cbpt_runtime

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    pytest.importorskip("zensical", reason="SITE NOT BUILT: the extra `docs`")
    folder = tmp_path_factory.mktemp("site") / "docs"
    command = [sys.executable, ROOT / "docs" / "build_site.py", folder]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def test_every_public_name_has_an_entry_with_its_text(site: Path) -> None:
    page = (site / "docs" / "python" / "index.html").read_text(encoding="utf-8")
    names = set(cbpt_runtime.__all__) - {"__version__", "purify_checkpoint"}
    assert {name for name in names if f'id="cbpt_runtime.{name}"' not in page} == set()
    assert "Turn a suspect checkpoint, class names and a few clean images into a purified classifier." in page


def test_every_page_in_the_repository_is_in_the_site_and_its_menu(site: Path) -> None:
    menu = set(
        re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    pages = {path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("[bdes]*/*.md")]}
    assert menu == pages - {"README.md"} | {"index.md"}
    for name in menu:
        folder = site / name.removesuffix("README.md").removesuffix("index.md").removesuffix(".md")
        assert "<article" in (folder / "index.html").read_text(encoding="utf-8"), name


def test_links_to_files_outside_docs_hold_in_the_site(site: Path) -> None:
    assert json.loads((site / "benchmarks" / "results" / "soak.json").read_text(encoding="utf-8"))
    assert 'href="SECURITY/#serving"' in (site / "index.html").read_text(encoding="utf-8")
    assert (site / "server" / "compose.yaml").read_bytes() == (ROOT / "server" / "compose.yaml").read_bytes()


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    loaded = [
        tag
        for page in pages
        for tag in re.findall(r"<(?:script|img|link|iframe)\b[^>]*>", page.read_text(encoding="utf-8"))
        if re.search(r"(?:src|href)=\"?(?:https?:)?//", tag) and 'rel="canonical"' not in tag
    ]
    assert len(pages) > 20
    assert loaded == []
