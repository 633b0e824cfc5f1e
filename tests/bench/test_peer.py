"""perf_analyzer is not installed here; a stand-in on PATH shows that it is asked and read rightly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cbpt_runtime.bench.peer import cross_check, find_peer
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
        find_peer()
