"""What is measured where suspicious images are looked at twice."""

from __future__ import annotations

import json
from pathlib import Path

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.evaluation import evaluate
from cbpt_runtime.evaluation.measuring import evaluate_all
from cbpt_runtime.evaluation.tables import table_rows
from cbpt_runtime.report import render_evaluation


def test_the_level_is_judged_and_the_head_alone_stays_beside_the_second_look(
    levelled_bundle: Bundle, tiny_image_folder: Path
) -> None:
    target = levelled_bundle.suspects[0].name
    once = evaluate(levelled_bundle, tiny_image_folder, tiny_image_folder, target, device="cpu")
    twice = evaluate(
        levelled_bundle, tiny_image_folder, tiny_image_folder, target, device="cpu", second_look=True
    )
    assert once.after_head_alone is None
    assert twice.after_head_alone == once.after
    assert twice.decision == once.decision
    assert twice.decision is not None
    assert (twice.decision.false_alarm_rate.count, twice.decision.false_alarm_rate.total) == (18, 36)
    assert twice.decision.detection_rate is not None
    assert twice.decision.detection_rate.total == 24
    assert twice.after is not None
    assert once.after is not None
    for name in ("attack_success_rate", "floor", "target_recall"):
        assert getattr(twice.after, name).count <= getattr(once.after, name).count
    plain = json.loads(json.dumps(twice.to_dict()))
    assert plain["after_head_alone"] == json.loads(json.dumps(once.to_dict()))["after"]
    assert "</html>" in render_evaluation([twice])
    assert any("looked at twice" in note for note in twice.notes)
    assert [row[1] for row in table_rows([twice])[1]] == ["before", "after, head alone", "after"]


def test_a_checkpoint_beside_it_is_looked_at_once(
    levelled_bundle: Bundle, tiny_checkpoint_folder: Path, tiny_image_folder: Path
) -> None:
    sources = [levelled_bundle, str(tiny_checkpoint_folder)]
    _, checkpoint = evaluate_all(sources, tiny_image_folder, device="cpu", second_look=True)
    assert checkpoint.after_head_alone is None
    assert checkpoint.decision is None
