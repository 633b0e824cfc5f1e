"""What came out of a batch, counted over its files, one at a time."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cbpt_runtime.runtime.triton_models import ALARM_THRESHOLD

_LOUDEST = 48
_REASONS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Loud:
    """An image and its alarm.

    Attributes:
        alarm: In [0, 1].
        key: Its name.
        label: What the purified head calls it.
        probability: Of the label.
        suspected_target: What the alarm speaks of.
        partition: Where it is in the plan.
        row: Where it is in the partition.
    """

    alarm: float
    key: str
    label: str
    probability: float
    suspected_target: str | None
    partition: int
    row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What the files hold.

    Attributes:
        images: Rows.
        failures: Rows with an error.
        alarms: Images whose alarm is at least 0.5, what a server counts from where no level was chosen.
        suspicious: Images whose alarm lies above the level chosen at purification; none where none was.
        classes: Images of each class that has any, most first.
        alarm_targets: Of the images that alarm, how many about each suspected target.
        reasons: The most frequent errors.
        loudest: Images with the largest alarm, those that count as alarms only.
    """

    images: int
    failures: int
    alarms: int
    suspicious: int
    classes: dict[str, int]
    alarm_targets: dict[str, int]
    reasons: dict[str, int]
    loudest: tuple[Loud, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON can hold them."""
        values = asdict(self)
        values["loudest"] = [
            {key: value for key, value in loud.items() if key not in ("partition", "row")}
            for loud in values["loudest"]
        ]
        return {**values, "alarm_threshold": ALARM_THRESHOLD}


def count_rows(files: Mapping[int, Path]) -> Counts:
    """Count the rows of finished partitions."""
    images = failures = suspicious = 0
    classes: Counter[str] = Counter()
    targets: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    loudest: list[tuple[float, int, int, Loud]] = []
    for number, file in files.items():
        table = pq.read_table(file)
        images += len(table)
        failures += len(table) - table.column("error").null_count
        suspicious += pc.sum(table.column("suspicious")).as_py() or 0
        classes += _counted(table.column("label"))
        reasons += _counted(table.column("error"))
        alarm = pc.fill_null(table.column("alarm"), -1.0).to_numpy()
        loud = (alarm >= ALARM_THRESHOLD).nonzero()[0]
        targets += _counted(table.column("suspected_target").take(pa.array(loud)))
        found = [
            _loud(table, number, int(row)) for row in loud[(-alarm[loud]).argsort(kind="stable")[:_LOUDEST]]
        ]
        # the first of equal ones, in the order of the plan
        loudest = heapq.nlargest(
            _LOUDEST, [*loudest, *((one.alarm, -one.partition, -one.row, one) for one in found)], key=_order
        )
    return Counts(
        images=images,
        failures=failures,
        alarms=sum(targets.values()),
        suspicious=suspicious,
        classes=dict(classes.most_common()),
        alarm_targets=dict(targets.most_common()),
        reasons=dict(reasons.most_common(_REASONS)),
        loudest=tuple(entry[-1] for entry in loudest),
    )


def _order(entry: tuple[float, int, int, Loud]) -> tuple[float, int, int]:
    return entry[:3]


def _counted(column: pa.ChunkedArray) -> Counter[str]:
    pairs: Iterable[dict[str, Any]] = pc.value_counts(column.drop_null()).to_pylist()
    return Counter({pair["values"]: pair["counts"] for pair in pairs})


def _loud(table: pa.Table, partition: int, row: int) -> Loud:
    (values,) = table.slice(row, 1).to_pylist()
    names = ("alarm", "key", "label", "probability", "suspected_target")
    return Loud(**{name: values[name] for name in names}, partition=partition, row=row)
