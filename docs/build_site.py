"""Builds the documentation site: gathers the pages as they lie in the repository, then runs Zensical on them.

python docs/build_site.py [FOLDER]

The site is FOLDER/site, and FOLDER must not be there yet; without it the site is build/docs/site, made anew.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "docs/*.md", "benchmarks/*.md", "export/*.md", "server/*.md", "docs/images/*")
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def main() -> None:
    """Build it in the folder named on the command line, or in build/docs."""
    if len(sys.argv) > 1:
        build(Path(sys.argv[1]))
        return
    own = ROOT / "build" / "docs"
    shutil.rmtree(own, ignore_errors=True)
    build(own)


def build(folder: Path) -> None:
    """Write the site into a new folder; raise CalledProcessError where Zensical has an error or a warning."""
    folder.mkdir(parents=True)
    gather(folder / "pages")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    settings = settings.replace("paths: [.]", f"paths: [{json.dumps(str(ROOT))}]")
    (folder / "mkdocs.yml").write_text(settings, encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    subprocess.run(command, cwd=folder, check=True)


def gather(pages: Path) -> None:
    """Copy every page and what it links to, at the same paths, so that links hold in both places."""
    sources = sorted(path for pattern in PAGES for path in ROOT.glob(pattern))
    for source in sources:
        copied = pages / source.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            copied.write_text(linked(source, pages), encoding="utf-8")
        else:
            shutil.copy(source, copied)
    (pages / "README.md").rename(pages / "index.md")


def linked(source: Path, pages: Path) -> str:
    """Return a page whose linked files lie beside it; a link to a folder, which no site has, is its text."""

    def replace(match: re.Match[str]) -> str:
        text, name, anchor = match[1], match[2], match[3] or ""
        target = (source.parent / name).resolve()
        if "://" in name or name.startswith("mailto:"):
            return match[0]
        if target.is_dir():
            return text
        if target == ROOT / "README.md":
            name = name.replace("README.md", "index.md")
        if target.suffix != ".md":
            copied = pages / target.relative_to(ROOT)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(target, copied)
        return f"[{text}]({name}{anchor})"

    return LINK.sub(replace, source.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
