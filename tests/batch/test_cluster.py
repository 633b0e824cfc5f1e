"""Two Ray workers on this machine, one of which is killed, write what one process writes, byte for byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

try:
    import daft  # noqa: F401
    import ray  # noqa: F401
except ImportError as error:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.warn(f"CLUSTERS NOT TESTED: {error}; install cbpt-runtime[cluster]", stacklevel=1)
    pytest.skip("no ray", allow_module_level=True)

pytestmark = pytest.mark.nightly


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray cluster of two nodes with a CPU each, on the loopback."""
    program = (
        "import sys; from ray.cluster_utils import Cluster\n"
        "small = dict(num_cpus=1, object_store_memory=200 << 20, include_dashboard=False,"
        " node_ip_address='127.0.0.1')\n"
        "cluster = Cluster(initialize_head=True, head_node_args=small); cluster.add_node(**small)\n"
        "print(cluster.address, flush=True); sys.stdin.read(); cluster.shutdown()\n"
    )
    more = {"RAY_raylet_start_wait_time_s": "300", "RAY_USAGE_STATS_ENABLED": "0", "NO_PROXY": "*"}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **more},
    ) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        lines = (line.decode().strip() for line in running.stdout)
        address = next((line for line in lines if line.startswith("127.0.0.1:")), None)
        assert address is not None, "no Ray cluster came up: on a busy machine Ray gives up after 15 s"
        yield address
        running.stdin.close()
        running.wait(timeout=120)


def label(source: Path, classifier: Path, output: Path, **more: str) -> subprocess.Popen[bytes]:
    words = [str(source), "--classifier", str(classifier), "--output", str(output), "--partition", "32"]
    command = [sys.executable, "-m", "cbpt_runtime", "label", *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "NO_PROXY": "*", **more})


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


def test_two_workers_write_what_one_process_writes(
    cluster: str, flat: Path, tiny_graph: Path, tmp_path: Path
) -> None:
    (flat / "07.png").write_bytes(b"no image")
    for number in range(20):
        for path in sorted(flat.glob("??.png")):
            (flat / f"{number:02}-{path.name}").hardlink_to(path)
    assert label(flat, tiny_graph, tmp_path / "here").wait(timeout=600) == 0
    there = label(flat, tiny_graph, tmp_path / "there", RAY_ADDRESS=cluster)
    killed = False
    while there.poll() is None:
        if not killed and list((tmp_path / "there.partial").glob("stages/labels/part-*.parquet")):
            for process in workers()[:1]:
                os.kill(process, signal.SIGKILL)
                killed = True
        time.sleep(0.05)
    assert there.returncode == 0, there.stderr.read().decode() if there.stderr else ""
    files = [sorted((tmp_path / name / "labels").iterdir()) for name in ("here", "there")]
    assert len(files[0]) == -(-21 * 36 // 32)
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    assert killed, "too fast: nothing was finished before the end"
