"""Two Ray workers on this machine, one of which is killed, write what one process writes, byte for byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly


def label(source: Path, classifier: Path, output: Path, **more: str) -> subprocess.Popen[bytes]:
    words = [str(source), "--classifier", str(classifier), "--output", str(output), "--partition", "32"]
    command = [sys.executable, "-m", "cbpt_runtime", "label", *words]
    with output.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, stderr=log, env={**os.environ, **more})


def workers() -> list[int]:
    """Processes of Daft's workers."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                if b"ray::RaySwordfishActor" in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


@pytest.mark.parametrize("kind", ["HOST:PORT", "ray://HOST:PORT"])
def test_two_workers_write_what_one_process_writes(
    kind: str, ray_cluster: dict[str, str], flat: Path, tiny_graph: Path, tmp_path: Path
) -> None:
    (flat / "07.png").write_bytes(b"no image")
    for number in range(20):
        for path in sorted(flat.glob("??.png")):
            (flat / f"{number:02}-{path.name}").hardlink_to(path)
    assert label(flat, tiny_graph, tmp_path / "here").wait(timeout=600) == 0
    there = label(flat, tiny_graph, tmp_path / "there", RAY_ADDRESS=ray_cluster[kind])
    killed = False
    while there.poll() is None:
        if not killed and list((tmp_path / "there.partial").glob("stages/labels/part-*.parquet")):
            for process in workers()[:1]:
                os.kill(process, signal.SIGKILL)
                killed = True
        time.sleep(0.05)
    assert there.returncode == 0, (tmp_path / "there.log").read_text()
    files = [sorted((tmp_path / name / "labels").iterdir()) for name in ("here", "there")]
    assert len(files[0]) == -(-21 * 36 // 32)
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    assert killed, "too fast: nothing was finished before the end"
