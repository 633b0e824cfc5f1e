"""What Triton says of a run; perf_analyzer is not installed here: a stand-in on PATH is asked and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cbpt_runtime.bench.triton import cross_check, difference, find_perf_analyzer, served_models
from cbpt_runtime.errors import ConfigError, WorkError

STAND_IN = """#!/bin/sh
echo "$@" >> {log}
while [ "$1" != "-f" ]; do
  if [ "$1" = "--input-data" ]; then cp "$2" {log}.data; fi
  shift
done
printf '%s\\n' 'Concurrency,Inferences/Second,Client Send,p50 latency,p90 latency,p95 latency,p99 latency' \\
  '4,123.4,10,32000,40000,50000,60000' > "$2"
"""


def install(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "perf_analyzer"
    program.write_text(text)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_it_is_asked_about_the_same_files_and_its_table_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    install(tmp_path, STAND_IN.format(log=log), monkeypatch)
    found = cross_check("grpc://127.0.0.1:8001", "clip", [b"one", b"two"], (4,), duration_s=2, timeout_s=1)
    assert found == [
        {
            "concurrency": 4,
            "throughput_per_s": 123.4,
            "latency_ms": {"p50": 32.0, "p90": 40.0, "p95": 50.0, "p99": 60.0},
        }
    ]
    words = log.read_text().split()
    assert words[:6] == ["-m", "clip", "-u", "127.0.0.1:8001", "-i", "grpc"]
    assert len(json.loads((tmp_path / "log.data").read_text())["data"]) == 2


def test_its_failure_is_told_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "#!/bin/sh\necho failed to connect >&2\nexit 1\n", monkeypatch)
    with pytest.raises(WorkError, match="failed to connect"):
        cross_check("http://127.0.0.1:1", "clip", [b"one"], (1,), duration_s=1, timeout_s=1)


def test_without_it_the_error_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"perf_analyzer on PATH.*leave --tool out"):
        find_perf_analyzer()


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
