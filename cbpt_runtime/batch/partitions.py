"""The partitions of a run, on disk: a plan of the images there are, and the rows of those that are labelled.

A plan is listed once and kept until the run is done. Rows are written in Parquet files, one for each
partition, whole or absent.
"""

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

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cbpt_runtime.artifacts import MAX_MANIFEST_BYTES, read_json_file, writing
from cbpt_runtime.artifacts.names import json_text
from cbpt_runtime.batch.references import REFERENCE, Reference, references_of
from cbpt_runtime.classification import Answer
from cbpt_runtime.errors import ConfigError, LabelError

_REFERENCES = pa.schema(
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
_PLAN_FILE = "plan.json"


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

    def pending(self, done: Iterable[int]) -> list[int]:
        """Return the partitions that are still to be labelled."""
        return sorted(set(range(len(self.sizes))) - set(done))


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
    (folder / _PLAN_FILE).unlink(missing_ok=True)
    sizes: list[int] = []
    rows = iter(references)
    plan = Plan(folder=folder, settings=settings, sizes=(), notes=())
    try:
        while batch := list(itertools.islice(rows, size)):
            write_whole(plan.file(len(sizes)), _reference_table(len(sizes), batch))
            sizes.append(len(batch))
    except BaseException:  # such as a source with nothing in it: there is nothing to go on with
        shutil.rmtree(folder)
        with contextlib.suppress(OSError):  # there is something else in it
            folder.parent.rmdir()
        raise
    content = {"settings": settings, "sizes": sizes, "notes": notes}
    partial = folder / f"{_PLAN_FILE}.tmp"
    partial.write_text(json_text(content), encoding="utf-8")
    partial.replace(folder / _PLAN_FILE)
    return Plan(folder=folder, settings=settings, sizes=tuple(sizes), notes=tuple(notes))


def read_plan(folder: Path, settings: Mapping[str, Any]) -> Plan | None:
    """Return the plan of an earlier run; None where there is none.

    Raises:
        ConfigError: That run was another one.
    """
    try:
        _, content = read_json_file(folder / _PLAN_FILE, max_bytes=MAX_MANIFEST_BYTES)
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


def _reference_table(partition: int, references: list[Reference]) -> pa.Table:
    columns: dict[str, list[Any]] = {
        name: [getattr(reference, name) for reference in references] for name in REFERENCE
    }
    columns["place"] = [os.fsencode(reference.place) for reference in references]
    columns |= {"partition": [partition] * len(references), "row": list(range(len(references)))}
    return pa.table(columns, schema=_REFERENCES)


ANSWER = pa.struct(
    {
        "label": pa.string(),
        "probability": pa.float32(),
        "top": pa.list_(pa.struct({"label": pa.string(), "probability": pa.float32()})),
        "alarm": pa.float32(),
        "suspicious": pa.bool_(),
        "suspected_target": pa.string(),
        "error": pa.string(),
    }
)
"""What a worker says of an image; whatever else an `Answer` comes to hold is added here and in `to_row`."""
COLUMNS = pa.schema([("key", pa.string()), *((field.name, field.type) for field in ANSWER)])
"""Columns of the files that are written."""


def to_row(answer: Answer) -> dict[str, Any]:
    """Return the columns of an image that was classified."""
    return {
        "label": answer.labels[0].name,
        "probability": answer.labels[0].probability,
        "top": [{"label": label.name, "probability": label.probability} for label in answer.labels],
        "alarm": answer.alarm,
        "suspicious": answer.suspicious,
        "suspected_target": answer.alarm_target,
        "error": None,
    }


def failed(why: str) -> dict[str, Any]:
    """Return the columns of an image that was not."""
    return {**dict.fromkeys(field.name for field in ANSWER), "error": why}


def write_whole(path: Path, table: pa.Table) -> None:
    """Write a Parquet file that is on the disk before it has its name.

    Raises:
        OutputError: It cannot be written.
    """
    partial = path.with_suffix(".tmp")
    with writing(path):
        with partial.open("wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


class Partitions:
    """A folder of finished partitions, and the rows of those that are not finished yet.

    Args:
        folder: Made here.
        sizes: Rows of each partition that is to come.
    """

    def __init__(self, folder: Path, sizes: Mapping[int, int]) -> None:
        self.folder = folder
        self._sizes = sizes
        self._waiting: dict[int, list[pa.Table]] = {}
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def file(self, partition: int) -> Path:
        """Where the rows of a partition are, once all of them are there."""
        return self.folder / f"part-{partition:05}.parquet"

    def add(self, batch: pa.RecordBatch) -> int:
        """Take rows, in any order; write what is complete with them.

        Args:
            batch: Columns ``partition``, ``row``, ``key`` and ``answer``.

        Returns:
            How many rows these were.

        Raises:
            LabelError: Rows came twice.
            OutputError: A file cannot be written.
        """
        table = pa.Table.from_batches([batch])
        for number in pc.unique(table.column("partition")).to_pylist():
            own = table.filter(pc.equal(table.column("partition"), number))
            waiting = self._waiting.setdefault(number, [])
            waiting.append(own)
            if sum(map(len, waiting)) >= self._sizes[number]:
                self._finish(number, pa.concat_tables(self._waiting.pop(number)))
        return len(table)

    def forget(self) -> None:
        """Drop what is not complete: it will come again."""
        self._waiting.clear()

    def done(self) -> Iterator[int]:
        """Return the partitions that are finished."""
        for file in sorted(self.folder.glob("part-*.parquet")):
            yield int(file.stem.removeprefix("part-"))

    def _finish(self, number: int, table: pa.Table) -> None:
        table = table.sort_by("row")
        rows = table.column("row").to_numpy()
        if not np.array_equal(rows, np.arange(self._sizes[number])):
            raise LabelError(
                expected=f"each of the {self._sizes[number]:,} rows of partition {number} once",
                got=f"{len(rows):,} rows, {len(np.unique(rows)):,} different ones",
                fix="Go on with --resume; if it comes again, report it.",
            )
        answer = table.column("answer").combine_chunks()
        columns = [
            table.column("key"),
            *(pc.struct_field(answer, field.name) for field in COLUMNS if field.name != "key"),
        ]
        write_whole(self.file(number), pa.table(columns, names=COLUMNS.names).cast(COLUMNS).combine_chunks())
