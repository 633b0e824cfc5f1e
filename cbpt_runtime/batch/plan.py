"""The images of a run in partitions: listed once, kept on disk until the run is done."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cbpt_runtime.artifacts import MAX_MANIFEST_BYTES, read_json_file
from cbpt_runtime.artifacts.names import json_text
from cbpt_runtime.batch.partitions import write_whole
from cbpt_runtime.batch.references import Reference
from cbpt_runtime.batch.workers import references_of
from cbpt_runtime.errors import ConfigError

REFERENCE = ("key", "place", "kind", "position", "size", "column", "problem")
_SCHEMA = pa.schema(
    [
        ("partition", pa.int32()),
        ("row", pa.int32()),
        ("key", pa.string()),
        ("place", pa.binary()),  # the name of a file need not be text
        ("kind", pa.string()),
        ("position", pa.int64()),
        ("size", pa.int64()),
        ("column", pa.string()),
        ("problem", pa.string()),
    ]
)
_FILE = "plan.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run labels.

    Attributes:
        folder: With one Parquet file of references for each partition.
        settings: Everything the rows depend on.
        sizes: Images of each partition.
        notes: What was left out.
    """

    folder: Path
    settings: Mapping[str, Any]
    sizes: tuple[int, ...]
    notes: tuple[str, ...]

    def file(self, partition: int) -> Path:
        """Return the references of a partition."""
        return self.folder / f"{partition:05}.parquet"

    def references(self, partition: int) -> list[Reference]:
        """Return the same, read."""
        table = pq.read_table(self.file(partition), columns=list(REFERENCE))
        return references_of([column.to_pylist() for column in table.columns])


def make_plan(
    folder: Path,
    references: Iterable[Reference],
    settings: Mapping[str, Any],
    *,
    size: int,
    notes: list[str],
) -> Plan:
    """Write a plan: whole, or nothing of it stays.

    Args:
        folder: Made here.
        references: The images, in the order of their rows.
        settings: Everything the rows depend on.
        size: Images of a partition; the last may have fewer.
        notes: What was left out; may grow while the references are listed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FILE).unlink(missing_ok=True)
    sizes: list[int] = []
    rows = iter(references)
    plan = Plan(folder=folder, settings=settings, sizes=(), notes=())
    try:
        while batch := list(itertools.islice(rows, size)):
            write_whole(plan.file(len(sizes)), _table(len(sizes), batch))
            sizes.append(len(batch))
    except BaseException:  # such as a source with nothing in it: there is nothing to go on with
        shutil.rmtree(folder)
        with contextlib.suppress(OSError):  # there is something else in it
            folder.parent.rmdir()
        raise
    content = {"settings": settings, "sizes": sizes, "notes": notes}
    partial = folder / f"{_FILE}.tmp"
    partial.write_text(json_text(content), encoding="utf-8")
    partial.replace(folder / _FILE)
    return Plan(folder=folder, settings=settings, sizes=tuple(sizes), notes=tuple(notes))


def read_plan(folder: Path, settings: Mapping[str, Any]) -> Plan | None:
    """Return the plan of an earlier run; None where there is none.

    Raises:
        ConfigError: That run was another one.
    """
    try:
        _, content = read_json_file(folder / _FILE, max_bytes=MAX_MANIFEST_BYTES)
    except (OSError, ValueError):
        return None
    found = content["settings"]
    others = [name for name in settings if json.loads(json_text(settings[name])) != found.get(name)]
    if others:
        raise ConfigError(
            expected="--resume with what the run began with",
            got="; ".join(f"{name} {settings[name]}, which was {found.get(name)}" for name in others),
            fix="Repeat the command as it was, or leave --resume away to begin again.",
        )
    return Plan(folder=folder, settings=found, sizes=tuple(content["sizes"]), notes=tuple(content["notes"]))


def _table(partition: int, references: list[Reference]) -> pa.Table:
    columns: dict[str, list[Any]] = {
        name: [getattr(reference, name) for reference in references] for name in REFERENCE
    }
    columns["place"] = [os.fsencode(reference.place) for reference in references]
    columns |= {"partition": [partition] * len(references), "row": list(range(len(references)))}
    return pa.table(columns, schema=_SCHEMA)


def pending(plan: Plan, done: Iterator[int]) -> list[int]:
    """Return the partitions that are still to be labelled."""
    return sorted(set(range(len(plan.sizes))) - set(done))
