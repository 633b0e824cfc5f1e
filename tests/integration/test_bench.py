"""`bench` against a real Triton, over both protocols."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cbpt_runtime.bench.config import BenchConfig
from cbpt_runtime.bench.run import bench, wrong_answers
from cbpt_runtime.bundle import Bundle
from cbpt_runtime.report.speed import render_bench
from cbpt_runtime.serving import RunningServer


@pytest.fixture(scope="module", params=["grpc", "http"])
def result(request: pytest.FixtureRequest, server: RunningServer, tiny_image_folder: Path) -> dict[str, Any]:
    config = BenchConfig(
        rates_per_s=(25.0,),
        concurrencies=(4,),
        batch_sizes=(1, 4),
        duration_s=1.0,
        warmup_s=0.2,
        clients=2,
        check_every=1,
    )
    url = server.config.grpc_url if request.param == "grpc" else server.config.http_url
    return bench([url], tiny_image_folder, config)


def test_a_server_answers_rightly_while_it_is_timed(result: dict[str, Any]) -> None:
    assert wrong_answers(result) == 0
    (target,) = result["targets"]
    for measured in target["scenarios"].values():
        for run in measured["runs"]:
            assert run["outcomes"]["answered"] > 0
            assert run["answers"]["checked"] > 0
            assert run["generator"]["processes"] >= 1
            assert run["generator"]["cpu_share"] > 0


def test_what_is_served_is_named_and_its_accuracy_measured(
    result: dict[str, Any], tiny_bundle: Bundle
) -> None:
    (target,) = result["targets"]
    assert target["facts"]["bundle_digest"] == tiny_bundle.digest
    assert target["facts"]["server"].startswith("triton 2.")
    assert target["facts"]["provider"] == "cpu"
    assert target["quality"]["clean_accuracy"]["total"] == 36


def test_tritons_own_account_stands_beside_ours(result: dict[str, Any]) -> None:
    (target,) = result["targets"]
    (server,) = target["scenarios"]["server"]["runs"]
    decoder, classifier = (server["triton"][f"shapes_{step}"] for step in ("preprocess", "classifier"))
    assert decoder["answered"] == pytest.approx(sum(server["outcomes"].values()), abs=8)
    assert decoder["compute_infer_ms"] > 0
    assert classifier["compute_infer_ms"] > 0
    assert classifier["queue_ms"] >= 0
    assert classifier["mean_batch_size"] >= 1
    page = render_bench(json.loads(json.dumps(result)))
    assert "Where the time goes" in page


@pytest.mark.nightly  # as long as Triton 2.51 may blame a full queue on the request
def test_a_server_with_a_full_queue_is_counted_not_hidden(
    server: RunningServer, tiny_image_folder: Path
) -> None:
    config = BenchConfig(
        scenarios=("server",), rates_per_s=(3000.0,), duration_s=1.0, warmup_s=0.0, timeout_s=1.0
    )
    (target,) = bench([server.config.grpc_url], tiny_image_folder, config)["targets"]
    (run,) = target["scenarios"]["server"]["runs"]
    assert set(run["outcomes"]) <= {"answered", "busy", "timeout"}
    assert sum(run["outcomes"].values()) == pytest.approx(3000, abs=300)
    assert not run["kept_up"]
