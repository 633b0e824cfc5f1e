"""Builds the documentation site: gathers the pages as they lie in the repository, then runs Zensical on them.

python docs/build_site.py [FOLDER]

The site is FOLDER/site; without FOLDER it is build/docs/site.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "docs/*.md", "benchmarks/*.md", "export/*.md", "server/*.md", "docs/images/*")
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def main() -> None:
    """Build it in the folder named on the command line, or in build/docs."""
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs")


def build(folder: Path) -> None:
    """Write the site anew; raise CalledProcessError where Zensical has an error or a warning."""
    shutil.rmtree(folder, ignore_errors=True)
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
    for notebook in sorted((ROOT / "docs").glob("*.ipynb")):
        page = pages / "docs" / f"{notebook.stem}.md"
        page.write_text(as_markdown(json.loads(notebook.read_text(encoding="utf-8")), page), encoding="utf-8")


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
        if target.suffix == ".ipynb":
            name = name.replace(".ipynb", ".md")
        elif target.suffix != ".md":
            copied = pages / target.relative_to(ROOT)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(target, copied)
        return f"[{text}]({name}{anchor})"

    return LINK.sub(replace, source.read_text(encoding="utf-8"))


def as_markdown(notebook: dict[str, Any], page: Path) -> str:
    """Return a notebook as a page; pictures among its outputs are written beside it."""
    parts: list[str] = []
    for number, cell in enumerate(notebook["cells"]):
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                picture = page.with_name(f"{page.stem}-{number}.png")
                picture.write_bytes(b64decode("".join(data["image/png"])))
                parts.append(f"![output of the cell above]({picture.name})")
            elif plain := "".join(output.get("text", data.get("text/plain", []))):
                parts.append(f"```text\n{plain.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
