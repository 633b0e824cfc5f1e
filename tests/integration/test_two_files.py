"""A graph with its weights in a file beside it, forced by a tiny limit, on a real server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.export import weights
from cbpt_runtime.export.manifest import WEIGHTS
from cbpt_runtime.export.profiles import Profile
from cbpt_runtime.export.repository import export_bundle
from cbpt_runtime.serving import Client, ServeConfig, running_server
from cbpt_runtime.serving.triton.servers import TritonServer


def test_a_server_answers_from_a_graph_in_two_files(
    tritonserver: TritonServer,
    tiny_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    drawn: Any,
) -> None:
    monkeypatch.setattr(weights, "_MAX_FILE_BYTES", 10_000)
    output = tmp_path / "repository"
    export_bundle(tiny_bundle, output, name="shapes", profile=Profile(max_batch=8))
    assert (output / "shapes_classifier" / "1" / WEIGHTS).stat().st_size > 10_000
    config = ServeConfig(http_port=0, grpc_port=0, metrics_port=0)
    with running_server(output, config) as server, Client(server.config.grpc_url) as client:
        found = client.predict_files(drawn.files[:4])
    np.testing.assert_allclose(found.probabilities, drawn.expected.probabilities[:4], atol=1e-4)
