"""Parquet files of rows: one for each partition, whole or absent."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cbpt_runtime.artifacts import writing
from cbpt_runtime.batch.rows import COLUMNS
from cbpt_runtime.errors import LabelError


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
