"""What is written of an image: one place that says the columns, and how an answer fills them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from cbpt_runtime.classification import Answer

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
