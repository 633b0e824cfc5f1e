"""The folder a run is written to, whole or not at all: numbers, plots, a page; and reading it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from cbpt_runtime.artifacts import Kind, marked, new_folder, read_json_file, shape_problems
from cbpt_runtime.artifacts.names import is_folder, json_text, readable
from cbpt_runtime.bench.run import KIND, SCHEMA_VERSION
from cbpt_runtime.errors import ConfigError

RESULT = "bench.json"
PAGE = "report.html"
_MAX_BYTES = 1 << 30
_SHAPE = {
    "machine": dict,
    "images": {"digest": str},
    "versions": dict,
    "targets": [{"name": str, "scenarios": {str: {"runs": [dict]}}}],
}
RESULTS: Final[Kind] = marked("folder of bench results")


def write_results(result: dict[str, Any], output: Path, *, force: bool) -> None:
    """Write ``bench.json``, every plot as SVG and PNG, and ``report.html``.

    Raises:
        OutputError: The folder cannot be written.
    """
    from cbpt_runtime.report.speed import draw_plots, render_bench

    with new_folder(output, RESULTS, force=force) as staging:
        text = json_text(result, indent=1)
        (staging / RESULT).write_text(text + "\n", encoding="utf-8")
        for plot in draw_plots(result):
            (staging / f"{plot.name}.svg").write_bytes(plot.svg)
            (staging / f"{plot.name}.png").write_bytes(plot.png)
        (staging / PAGE).write_text(readable(render_bench(result)), encoding="utf-8")


def read_results(path: str | Path) -> dict[str, Any]:
    """Read ``bench.json``, named itself or by its folder.

    Raises:
        ConfigError: Not results of a run, or of another version.
    """
    path = Path(path)
    file = path / RESULT if is_folder(path) else path
    fix = f"Name the {RESULT} (or its folder) that `cbpt-runtime bench --output` wrote."
    try:
        _, content = read_json_file(file, max_bytes=_MAX_BYTES)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(expected="results of a bench run", got=f"{file} ({reason})", fix=fix) from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not isinstance(content, dict) or content.get("kind") != KIND or version != SCHEMA_VERSION:
        raise ConfigError(
            expected=f"results of a bench run, schema version {SCHEMA_VERSION}",
            got=f"something else in {file}",
            fix=fix,
        )
    if problems := shape_problems(content, _SHAPE):
        raise ConfigError(expected=f"complete results in {file}", got="; ".join(problems), fix=fix)
    return content
