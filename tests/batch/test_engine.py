"""A Ray cluster that is not there: an error that says so within seconds, without waiting for Ray."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cbpt_runtime.batch import engine
from cbpt_runtime.batch.engine import reach_cluster
from cbpt_runtime.errors import ConfigError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Ray that connects at once; the addresses it was asked for."""
    found: list[str] = []
    ray = SimpleNamespace(is_initialized=lambda: bool(found), init=lambda address, **_: found.append(address))
    monkeypatch.setitem(sys.modules, "ray", ray)
    return found


@pytest.fixture
def closed() -> str:
    """Host and port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_without_ray_a_cluster_is_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"the package ray for --cluster.*cbpt-runtime\[cluster\]"):
        reach_cluster("ray://nowhere:1")


@pytest.mark.parametrize("scheme", ["ray://", ""])
def test_where_nobody_listens_ray_is_not_asked(scheme: str, asked: list[str], closed: str) -> None:
    with pytest.raises(ConfigError, match=f"a Ray cluster at {scheme}{closed}.*refused.*RAY_ADDRESS"):
        reach_cluster(f"{scheme}{closed}")
    assert not asked


def test_a_host_that_says_nothing_is_not_waited_for(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_PATIENCE_S", 0.5)
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # more than wait in its queue
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        begun = time.monotonic()
        with pytest.raises(ConfigError, match="timed out"):
            reach_cluster("ray://{}:{}".format(*server.getsockname()))
    assert time.monotonic() - begun < 5
    assert not asked


@pytest.mark.parametrize("address", ["head", "ray://head", "ray://:10001", "head:port", "ray://head:99999"])
def test_half_an_address_is_none(address: str, asked: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"a Ray cluster at {address}"):
        reach_cluster(address)
    assert not asked


def test_ray_is_asked_once(asked: list[str]) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        address = f"ray://[::1]:{server.getsockname()[1]}"
        reach_cluster(address)
        reach_cluster(address)
    assert asked == [address]


@pytest.mark.parametrize("address", ["auto", "local"])
def test_what_ray_finds_itself_is_left_to_it(address: str, asked: list[str]) -> None:
    reach_cluster(address)
    assert asked == [address]


@pytest.mark.parametrize("verb", ["label", "purify", "scan"])
def test_every_verb_says_so_with_exit_code_2(
    verb: str,
    asked: list[str],
    closed: str,
    run: Callable[..., Any],
    tiny_checkpoint_folder: Path,
    tiny_class_file: Path,
    tiny_image_folder: Path,
    tmp_path: Path,
) -> None:
    if verb == "label":
        pytest.importorskip("daft", reason="BATCHES NOT TESTED: install cbpt-runtime[batch]")
    checkpoint, images, output = tiny_checkpoint_folder, tiny_image_folder, ("--output", tmp_path / "out")
    words = {
        "label": [images, "--classifier", tmp_path, *output],
        "purify": ["--checkpoint", checkpoint, "--classes", tiny_class_file, "--images", images, *output],
        "scan": [checkpoint, "--images", images],
    }
    done = run(verb, *words[verb], "--cluster", f"ray://{closed}")
    assert done.code == 2
    assert f"a Ray cluster at ray://{closed}" in " ".join(done.err.split())
    assert not asked
    assert not (tmp_path / "out").exists()
