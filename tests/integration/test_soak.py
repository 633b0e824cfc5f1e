"""The soak program, shortened: it runs and counts. Memory is judged by the committed long run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_short_soak_gives_no_wrong_answer(repository: Path, tmp_path: Path) -> None:
    output = tmp_path / "soak.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), str(repository)]
    done = subprocess.run(
        [*command, "--seconds", "20", "--clients", "4", "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert output.is_file(), done.stderr
    result = json.loads(output.read_text())
    outcomes = result["outcomes"]
    assert sum(outcomes.values()) == result["sent"] > 0
    assert set(outcomes) <= {"right answer", "bad request refused", "cleanly refused"}
    assert result["descriptor_growth"] <= 2
