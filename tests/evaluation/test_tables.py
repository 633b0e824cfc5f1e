from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.evaluation import Evaluation, evaluate_all, tables
from cbpt_runtime.redteam.image_triggers import BadNet


@pytest.fixture(scope="module")
def pair(
    tiny_bundle: Bundle, tiny_checkpoint_folder: Path, tiny_image_folder: Path
) -> tuple[Evaluation, ...]:
    return evaluate_all(
        [tiny_bundle, tiny_checkpoint_folder],
        tiny_image_folder,
        target="blue stripes",
        attack=BadNet(size=8),
        device="cpu",
    )


def test_markdown_has_a_row_per_head_and_an_interval_in_every_cell(pair: tuple[Evaluation, ...]) -> None:
    lines = tables.markdown(pair).splitlines()
    assert len(lines) == 5
    heads = [line.split(" | ")[1] for line in lines]
    assert heads == ["head", "---", "before", "after", "zero-shot"]
    assert lines[0].count("|") == lines[3].count("|") == 11
    assert all(cell.count("[") == 1 for cell in lines[3].strip("| ").split(" | ")[2:])


def test_columns_nothing_was_measured_for_are_left_out(
    tiny_checkpoint_folder: Path, tiny_bundle: Bundle, tiny_image_folder: Path
) -> None:
    found = evaluate_all([tiny_bundle], tiny_image_folder, device="cpu")
    assert tables.table_rows(found)[0] == ["model", "head", "CA"]


def test_comma_separated_values_are_fractions_with_their_counts(pair: tuple[Evaluation, ...]) -> None:
    rows = list(csv.DictReader(io.StringIO(tables.comma_separated(pair))))
    assert [row["head"] for row in rows] == ["before", "after", "zero-shot"]
    for row, rates in zip(rows, (pair[0].before, pair[0].after, pair[1].before), strict=True):
        assert float(row["attack_success_rate"]) == rates.attack_success_rate.rate
        assert int(row["attack_success_rate_total"]) == 24
        assert float(row["clean_accuracy_low"]) == rates.clean_accuracy.low
    assert rows[0]["alarm_auroc"] == rows[2]["alarm_auroc"] == ""
    assert float(rows[1]["alarm_auroc_high"]) == pair[0].alarm.auroc.high


def test_names_are_as_short_as_they_can_be_told_apart(pair: tuple[Evaluation, ...]) -> None:
    from dataclasses import replace

    sources = ("runs/a/bundle", "runs/b/bundle", "runs/b/bundle")
    found = [replace(pair[0], source=source) for source in sources]
    assert tables.short_names(found) == ["a/bundle", "b/bundle", "b/bundle"]
    assert tables.short_names(found[:1]) == ["bundle"]
