"""The command on a tiny bundle and its repository. How fast they are is never asserted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cbpt_runtime.bench import measuring
from cbpt_runtime.bench.generator import Answers
from cbpt_runtime.bundle import Bundle

QUICK = ("--duration-s", "0.4", "--warmup-s", "0.1", "--threads", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results") / "first"


def test_every_scenario_of_a_bundle_and_its_repository(
    run: Callable, tiny_bundle: Bundle, tiny_served: Path, tiny_image_folder: Path, results: Path
) -> None:
    done = run(
        *("bench", "run", tiny_bundle.path, tiny_served, "--images", tiny_image_folder, *QUICK),
        *("--concurrency", 1, "--concurrency", 3, "--batch", 1, "--batch", 4, "--batch", 64),
        *("--classes", 10, "--classes", 200, "--triggered", tiny_image_folder, "--target", "blue_stripes"),
        *("--output", results),
    )
    assert done.code == 0, done.err
    assert "CA " in done.out
    assert "closed loop 3 at once" in done.out
    assert "server: left out, for it is none" in done.err
    names = {path.name for path in results.iterdir()}
    plots = {"latency-distribution", "throughput-latency", "scaling-batch", "scaling-classes"}
    assert names - {".cbpt-runtime.json"} == {"bench.json", "report.html"} | {
        f"{p}.{k}" for p in plots for k in ("svg", "png")
    }
    found = json.loads((results / "bench.json").read_text())
    assert {"processor", "affinity", "usable_cpus", "gpus"} <= set(found["machine"])
    assert {"torch", "onnxruntime", "cbpt-runtime"} <= set(found["versions"])
    assert found["images"]["count"] == 36
    bundle, repository = found["targets"]
    assert (bundle["kind"], repository["kind"]) == ("bundle", "repository")
    assert repository["facts"]["provider"] == "CPUExecutionProvider"
    assert repository["facts"]["bundle_digest"] == bundle["facts"]["bundle_digest"] == tiny_bundle.digest
    assert bundle["quality"]["clean_accuracy"] == repository["quality"]["clean_accuracy"]
    assert repository["quality"]["attack_success_rate"]["total"] == 24
    for target in (bundle, repository):
        scenarios = target["scenarios"]
        assert set(scenarios) == {"single-stream", "offline", "sweep"}  # an open loop is for servers
        for each in (*scenarios["single-stream"]["runs"], *scenarios["sweep"]["runs"]):
            assert set(each["outcomes"]) == {"answered"}
            assert each["generator"]["processes"] == 0
            assert each["answers"]["checked"] > 0
            assert each["stages"]["mean_batch_size"] == 1
        assert {each["loop"] for each in scenarios["sweep"]["runs"]} == {"closed"}
        sizes = [each["batch_size"] for each in scenarios["offline"]["runs"]]
        assert sizes == ([1, 4, 64] if target is bundle else [1, 4])  # no larger than it takes
        assert all(each["answers"]["wrong"] == 0 for part in scenarios.values() for each in part["runs"])
    assert [entry["classes"] for entry in repository["scenarios"]["offline"]["classes"]] == [10, 200]


def test_two_results_are_compared(run: Callable, results: Path, tmp_path: Path) -> None:
    assert results.exists(), "made by the test before"
    done = run("bench", "compare", results / "bench.json", results)
    assert done.code == 0
    assert "second / first" in done.out
    assert "1.000×" in done.out
    parsed = json.loads(run("bench", "compare", results, results, "--json").out)
    assert all(row["low"] <= row["ratio"] == 1 <= row["high"] for row in parsed["rows"])
    other = json.loads((results / "bench.json").read_text())
    other["machine"]["processor"] = "another"
    (tmp_path / "other.json").write_text(json.dumps(other))
    refused = run("bench", "compare", results, tmp_path / "other.json")
    assert (refused.code, refused.out) == (2, "")
    assert "--different-hardware" in refused.err
    meant = run("bench", "compare", results, tmp_path / "other.json", "--different-hardware")
    assert (meant.code, "different hardware" in meant.err) == (0, True)


def test_the_server_scenario_is_for_servers(
    run: Callable, tiny_graph: Path, tiny_image_folder: Path, tmp_path: Path
) -> None:
    done = run(
        *("bench", "run", tiny_graph, "--images", tiny_image_folder, *QUICK, "--scenario", "server"),
        *("--output", tmp_path / "out"),
    )
    assert (done.code, done.out) == (2, "")
    assert "cbpt-runtime serve" in done.err
    assert not (tmp_path / "out").exists()


def test_a_system_without_a_sub_command_is_told_how_to_be_measured(run: Callable, tiny_graph: Path) -> None:
    done = run("bench", tiny_graph, "--images", "photos")
    assert (done.code, done.out) == (2, "")
    assert "cbpt-runtime bench run" in " ".join(done.err.replace("│", " ").split())


def test_answers_that_change_under_load_fail_the_command_after_all_is_written(
    run: Callable,
    tiny_bundle: Bundle,
    tiny_image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measuring, "TOLERANCE", -1.0)  # of what is compared during the timing only
    done = run(
        *("bench", "run", tiny_bundle.path, "--images", tiny_image_folder, *QUICK),
        *("--scenario", "single-stream", "--output", tmp_path / "out"),
    )
    assert done.code == 1
    assert "answers from before the timing" in done.err
    assert (tmp_path / "out" / "bench.json").exists()


def test_a_system_that_contradicts_itself_is_not_measured(
    run: Callable, tiny_bundle: Bundle, tiny_image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cbpt_runtime.bench.systems import System

    rng = np.random.default_rng(0)

    def moody(self: System, files: tuple[bytes, ...]) -> Answers:
        count = len(files)
        return Answers(labels=np.zeros(count, int), probabilities=rng.random(count), alarms=np.zeros(count))

    monkeypatch.setattr(System, "answer", moody)
    done = run("bench", "run", tiny_bundle.path, "--images", tiny_image_folder, *QUICK)
    assert (done.code, done.out) == (1, "")
    assert "differs from itself" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing", "--images", "{images}"), "does not exist"),
        (("{bundle}", "--images", "{empty}"), "which has none"),
        (("{bundle}", "--images", "{broken}"), "broken.jpg"),
        (("{bundle}",), "--images"),
        (("{bundle}", "--images", "{images}", "--percentile", "42"), "one of 50, 90, 95, 99"),
        (("{bundle}", "--images", "{images}", "--duration-s", "0"), "duration_s"),
        (("{bundle}", "--images", "{images}", "--rate", "-3"), "rates_per_s"),
        (("{bundle}", "--images", "{images}", "--scenario", "offlin"), "offline"),
        (("{bundle}", "--images", "{images}", "--provider", "npu"), "'cpu', 'cuda', 'tensorrt'"),
        (("{bundle}", "--images", "{images}", "--target", "red_square"), "--triggered"),
        (("{bundle}", "--images", "{images}", "--triggered", "{images}", "--target", "lion"), "red_square"),
        (("{bundle}", "--images", "{images}", "--output", "{images}"), "exists"),
        (("grpc://127.0.0.1:1", "--images", "{images}"), "127.0.0.1:1"),
    ],
)
def test_bad_input_exits_two_says_why_and_writes_nothing(
    run: Callable,
    tiny_bundle: Bundle,
    tiny_image_folder: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
    places = {
        "bundle": tiny_bundle.path,
        "images": tiny_image_folder,
        "empty": tmp_path / "empty",
        "broken": tmp_path / "broken",
    }
    before = sorted(tmp_path.rglob("*"))
    done = run("bench", "run", *QUICK, *(argument.format(**places) for argument in arguments))
    assert done.out == ""
    assert done.code == (1 if "grpc" in arguments[0] else 2)
    assert message in " ".join(done.err.replace("│", " ").split())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.json",), "Missing argument"),
        (("a.json", "b.json"), "a.json"),
        (("{other}", "{other}"), "bench.json"),
    ],
)
def test_results_that_are_none_are_not_compared(
    run: Callable, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "other.json").write_text("[]")
    done = run(
        "bench", "compare", *(argument.format(other=tmp_path / "other.json") for argument in arguments)
    )
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_a_foreign_onnx_file_is_refused(run: Callable, tiny_image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other.onnx").write_bytes(b"")
    done = run("bench", "run", tmp_path / "other.onnx", "--images", tiny_image_folder)
    assert (done.code, done.out) == (2, "")
    assert "cbpt-runtime export" in done.err
