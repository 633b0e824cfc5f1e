"""`bench` against a real Triton, over both protocols."""

from __future__ import annotations

from pathlib import Path

import pytest

from cbpt_runtime.bench.inputs import BenchConfig
from cbpt_runtime.bench.records import BenchResult
from cbpt_runtime.bench.run import bench
from cbpt_runtime.bundle import Bundle
from cbpt_runtime.report.speed import render_bench
from cbpt_runtime.serving import RunningServer


@pytest.fixture(scope="module", params=["grpc", "http"])
def result(request: pytest.FixtureRequest, server: RunningServer, tiny_image_folder: Path) -> BenchResult:
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


def test_a_server_answers_rightly_while_it_is_timed(result: BenchResult) -> None:
    assert result.wrong_answers == 0
    (system,) = result.systems
    assert set(system.scenarios) == {"single-stream", "server", "offline", "sweep"}
    for _, run in system.runs():
        assert run.outcomes is not None
        assert run.outcomes["answered"] > 0
        assert run.answers.checked > 0
        assert run.generator.processes >= 1
        assert run.generator.cpu_share > 0


def test_what_is_served_is_named_and_its_accuracy_measured(result: BenchResult, tiny_bundle: Bundle) -> None:
    (system,) = result.systems
    assert system.facts["bundle_digest"] == tiny_bundle.digest
    assert system.facts["server"].startswith("triton 2.")
    assert system.facts["provider"] == "cpu"
    assert system.quality.clean_accuracy is not None
    assert system.quality.clean_accuracy.total == 36


def test_tritons_own_account_stands_beside_ours(result: BenchResult) -> None:
    (system,) = result.systems
    (run,) = system.scenarios["server"].runs
    assert (run.loop, run.target_rate_per_s) == ("open", 25)
    assert run.triton is not None
    assert run.outcomes is not None
    decoder, classifier = (run.triton[f"shapes_{step}"] for step in ("preprocess", "classifier"))
    assert decoder["answered"] == pytest.approx(sum(run.outcomes.values()), abs=8)
    assert decoder["compute_infer_ms"] > 0
    assert classifier["compute_infer_ms"] > 0
    assert classifier["queue_ms"] >= 0
    assert classifier["mean_batch_size"] >= 1
    assert "Where the time goes" in render_bench(result)


def test_a_rate_is_searched_under_a_latency_bound(server: RunningServer, tiny_image_folder: Path) -> None:
    config = BenchConfig(
        scenarios=("server",), percentile=50.0, latency_bound_ms=2000.0, duration_s=0.4, warmup_s=0.1
    )
    (system,) = bench([server.config.grpc_url], tiny_image_folder, config).systems
    measured = system.scenarios["server"]
    assert measured.search is not None
    assert len(measured.search.trials) == len(measured.runs) >= 1
    for trial, run in zip(measured.search.trials, measured.runs, strict=True):
        assert trial.held == run.held
        if trial.held:
            assert (run.ms("p50") or 0) <= 2000


@pytest.mark.nightly  # as long as Triton 2.51 may blame a full queue on the request
def test_a_server_with_a_full_queue_is_counted_not_hidden(
    server: RunningServer, tiny_image_folder: Path
) -> None:
    config = BenchConfig(
        scenarios=("server",), rates_per_s=(3000.0,), duration_s=1.0, warmup_s=0.0, timeout_s=1.0
    )
    (system,) = bench([server.config.grpc_url], tiny_image_folder, config).systems
    (run,) = system.scenarios["server"].runs
    assert run.outcomes is not None
    assert set(run.outcomes) <= {"answered", "busy", "timeout"}
    assert sum(run.outcomes.values()) == pytest.approx(3000, abs=300)
    assert not run.kept_up
