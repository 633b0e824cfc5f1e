from __future__ import annotations

import pytest

from cbpt_runtime.serving.wire import Kind, _kind

DEAD = "in ensemble 'shapes', Stub process 'shapes_classifier_0_0' is not healthy."
STARVED = "in ensemble 'shapes', expected 2 inputs but got 0 inputs for model 'shapes_alarm'. Got input(s) []"


@pytest.mark.parametrize(
    ("kind", "message", "seen_as"),
    [
        ("refused", STARVED, "busy"),
        ("refused", "unexpected shape for input 'images'", "refused"),
        ("broken", STARVED, "broken"),
        ("broken", DEAD, "busy"),
        ("broken", "Failed to process the request(s)", "broken"),
    ],
)
def test_a_step_starved_by_a_full_queue_or_left_without_its_process_means_busy(
    kind: Kind, message: str, seen_as: Kind
) -> None:
    assert _kind(kind, message) == seen_as
