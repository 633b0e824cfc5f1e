from __future__ import annotations

from typing import Any

import pytest

from cbpt_runtime.bench.statistics import difference, served_models


def counters(images: int, executions: int, *, infer_ms: float, failed: int = 0) -> dict[str, Any]:
    """As Triton gives them: over gRPC the numbers are texts."""
    return {
        "inference_count": str(images),
        "execution_count": str(executions),
        "inference_stats": {
            "success": {"count": str(images), "ns": str(int(images * (infer_ms + 1) * 1e6))},
            "fail": {"count": str(failed)},
            "queue": {"count": str(images), "ns": str(int(images * 0.5e6))},
            "compute_input": {"ns": str(int(images * 0.25e6))},
            "compute_infer": {"ns": str(int(images * infer_ms * 1e6))},
            "compute_output": {"ns": str(int(images * 0.25e6))},
        },
    }


def test_what_happened_in_between_is_split_into_parts() -> None:
    before = {"clip_classifier": counters(10, 10, infer_ms=100)}
    after = {"clip_classifier": counters(110, 30, infer_ms=20, failed=3)}
    found = difference(before, after)["clip_classifier"]
    assert (found["images"], found["executions"], found["failed"]) == (100, 20, 3)
    assert found["mean_batch_size"] == 5
    assert found["compute_infer_ms"] == pytest.approx((110 * 20 - 10 * 100) / 100)
    assert found["queue_ms"] == pytest.approx(0.5)


def test_a_model_nobody_asked_has_no_times() -> None:
    same = {"clip": counters(5, 5, infer_ms=1)}
    found = difference(same, same)["clip"]
    assert (found["images"], found["mean_batch_size"]) == (0, None)
    assert "compute_infer_ms" not in found


def test_a_fresh_server_that_has_counted_nothing_is_no_error() -> None:
    assert difference({}, {"clip": {}})["clip"]["answered"] == 0


def test_one_classifier_is_served_as_four_models() -> None:
    assert served_models("a") == ("a", "a_preprocess", "a_classifier", "a_alarm")
