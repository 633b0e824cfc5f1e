"""What any web page, or any small request, can do to a real server through its HTTP ports: nothing."""

from __future__ import annotations

import gzip
import http.client
import json
import struct
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cbpt_runtime.serving import Client, RunningServer
from cbpt_runtime.serving.page import UiServer
from cbpt_runtime.serving.triton.process import group_usage

INFER = "/v2/models/shapes_classifier/infer"
ARRAYS = b"[" * 100_000 + b"]" * 100_000
NESTED = {
    "arrays": ARRAYS,
    "data": b'{"inputs": [{"name": "images", "shape": [1, 32, 32, 3], "datatype": "UINT8", "data": %b}]}'
    % ARRAYS,
}


def ask(
    address: str, port: int, method: str, path: str, body: bytes = b"", **headers: str
) -> tuple[int, str]:
    connection = http.client.HTTPConnection(address, port, timeout=60)
    try:
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace")
    finally:
        connection.close()


@pytest.fixture
def http_port(server: RunningServer) -> int:
    return server.config.http_port


def assert_unharmed(server: RunningServer, drawn: Any) -> None:
    assert (server.restarts, server.process.exit_code) == (0, None)
    with Client(server.config.http_url) as client:
        found = client.predict_files(drawn.files[:2])
    np.testing.assert_allclose(found.probabilities, drawn.expected.probabilities[:2], atol=1e-4)


@pytest.mark.parametrize("kind", ["text/plain", "application/json", "application/octet-stream"])
@pytest.mark.parametrize("is_header", [False, True])
@pytest.mark.parametrize("what", NESTED)
def test_nested_arrays_end_no_server(
    what: str, kind: str, is_header: bool, server: RunningServer, http_port: int, drawn: Any
) -> None:
    """Triton 2.51 reads JSON by recursion: it died of this, and stayed down after the fifth time."""
    extra = {"Inference_Header_Content_Length": str(len(NESTED[what]))} if is_header else {}
    for path in (INFER, "/v2/models/shapes/infer", "/v2/repository/index") * 2:
        status, text = ask("127.0.0.1", http_port, "POST", path, NESTED[what], Content_Type=kind, **extra)
        assert status in (400, 415), text
        assert json.loads(text)["error"]
    assert_unharmed(server, drawn)


@pytest.mark.parametrize("headers", [{"Host": "example.org"}, {"Origin": "https://example.org"}])
def test_neither_configuration_nor_metrics_are_told_to_other_pages(
    headers: dict[str, str], server: RunningServer, http_port: int
) -> None:
    metrics_port = server.config.metrics_port
    assert ask("127.0.0.1", http_port, "GET", "/v2/models/shapes/config", **headers)[0] == 403
    assert ask("127.0.0.1", metrics_port, "GET", "/metrics", **headers)[0] == 403
    assert ask("127.0.0.1", http_port, "POST", INFER, b"{}", **headers)[0] == 403
    assert ask("127.0.0.1", http_port, "GET", "/v2/models/shapes/config")[0] == 200
    with urllib.request.urlopen(server.config.metrics_url, timeout=10) as answer:
        text = answer.read().decode()
        assert answer.headers["Content-Type"].startswith("text/plain")
    assert "cbpt_images_total" in text


def test_a_compressed_body_takes_no_memory(server: RunningServer, http_port: int, drawn: Any) -> None:
    body = gzip.compress(b" " * 300_000_000)
    assert len(body) < 1_500_000
    before = group_usage(server.process.pid).memory_bytes
    for encoding in ("gzip", "deflate", "identity"):
        status, text = ask(
            "127.0.0.1",
            http_port,
            "POST",
            INFER,
            body,
            Content_Encoding=encoding,
            Content_Type="application/json",
        )
        assert status == 415, text
    assert group_usage(server.process.pid).memory_bytes - before < 20e6
    assert_unharmed(server, drawn)


def test_tritons_own_http_answers_nobody_but_the_guard(server: RunningServer) -> None:
    endpoint = server.endpoint
    assert endpoint.address.startswith("127.")
    assert endpoint.http_port not in (server.config.http_port, server.config.metrics_port)
    for method, path in (
        ("GET", "/v2"),
        ("GET", "/v2/health/ready"),
        ("GET", "/v2/models/shapes"),
        ("GET", "/v2/models/shapes/config"),
        ("GET", "/v2/models/stats"),
        ("POST", INFER),
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/models/shapes/generate"),
    ):
        status, text = ask(
            endpoint.address, endpoint.http_port, method, path, NESTED["data"] if method == "POST" else b""
        )
        assert 400 <= status < 500, (path, text)
        wrong = {"cbpt-guard": "guess"}
        connection = http.client.HTTPConnection(endpoint.address, endpoint.http_port, timeout=10)
        connection.request(method, path, headers=wrong)
        assert 400 <= connection.getresponse().status < 500
        connection.close()
    assert (server.restarts, server.process.exit_code) == (0, None)


def test_the_page_reaches_triton_through_the_guard_and_hands_on_its_refusals(
    server: RunningServer, drawn: Any
) -> None:
    file = drawn.files[0]
    tensor = {"name": "image", "shape": [1, 1], "datatype": "BYTES"}
    about = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": len(file) + 4}}]}).encode()
    body = about + struct.pack("<I", len(file)) + file
    with UiServer(server.config.http_url, "shapes") as page:
        port = int(page.url.rstrip("/").rpartition(":")[2])
        path = "/v2/models/shapes/infer"
        length = {"Inference_Header_Content_Length": str(len(about))}
        assert ask("127.0.0.1", port, "GET", "/v2/health/ready")[0] == 200
        assert ask("127.0.0.1", port, "POST", path, body, **length)[0] == 200
        status, text = ask("127.0.0.1", port, "POST", path, body[:-9], **length)
        assert 400 <= status <= 500
        assert json.loads(text)["error"]
        status, text = ask("127.0.0.1", port, "POST", path, b"[" * 50_000)
        assert (status, "nested at most" in text) == (400, True)
    assert_unharmed(server, drawn)


def test_a_name_may_be_allowed_and_the_secret_is_not_in_the_log(
    serve: Callable[..., AbstractContextManager[RunningServer]], tmp_path: Path
) -> None:
    names = frozenset({"clip.example.org"})
    with serve(log_file=tmp_path / "log.txt", host_names=names) as running:
        secret = running.endpoint.secret
        for name, status in (("clip.example.org:443", 200), ("example.org", 403)):
            assert ask("127.0.0.1", running.config.http_port, "GET", "/v2", Host=name)[0] == status
            assert ask("127.0.0.1", running.config.metrics_port, "GET", "/metrics", Host=name)[0] == status
    assert secret is not None
    log = (tmp_path / "log.txt").read_text()
    assert "Started HTTPService" in log
    assert secret not in log
