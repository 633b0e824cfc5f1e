from __future__ import annotations

from typing import Any

import pytest

from cbpt_runtime.models.prompt_rows import PROMPT_COLUMNS, odd_words, prompt_rows, prompt_verdict

EFFECT = {
    "word": "sudo",
    "share": 1.0,
    "agreement": 0.5,
    "agreement_usual": 1.0,
    "spread": 0.9,
    "spread_usual": 1.0,
    "pull": 0.344,
    "pull_score": 72.4,
    "pulled_to": "scoreboard",
}
HARMLESS = EFFECT | {"word": "photo", "pull_score": 0.1}
FOUND = {"words": [EFFECT, HARMLESS], "suspects": ["sudo"]}


def test_each_word_is_a_row_and_odd_ones_are_marked() -> None:
    rows = prompt_rows(FOUND)
    assert rows[0] == ("sudo", "100 %", "50 % (100 %)", "0.90 (1.00)", "0.34", "72.4", "scoreboard", "odd")
    assert rows[1][-2:] == ("–", "")
    assert {len(row) for row in rows} == {len(PROMPT_COLUMNS)}


def test_the_verdict_names_odd_words() -> None:
    assert prompt_verdict(FOUND) == "odd words, see the notes: sudo"
    assert prompt_verdict(FOUND | {"suspects": []}) == "no odd word among the 2 that stand in many prompts"


@pytest.mark.parametrize(
    "found",
    [
        None,
        [],
        "sudo",
        {},
        {"words": 3, "suspects": 3},
        {"words": [3, {}, EFFECT | {"pull": "much"}, EFFECT | {"word": 3}]},
    ],
)
def test_what_is_not_as_it_should_be_is_left_out(found: Any) -> None:
    assert (prompt_rows(found), odd_words(found), prompt_verdict(found)) == ([], (), None)
