"""What was exported is measured as its bundle is, with the purified head alone."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.evaluation import Evaluation, evaluate_all, tables
from cbpt_runtime.redteam.image_triggers import BadNet
from cbpt_runtime.report import render_evaluation


@pytest.fixture(scope="module")
def found(
    tiny_bundle: Bundle, tiny_graph: Path, tiny_served: Path, tiny_image_folder: Path
) -> tuple[Evaluation, ...]:
    """Of the bundle, its graph and its repository."""
    return evaluate_all(
        [tiny_bundle, tiny_graph, tiny_served],
        tiny_image_folder,
        target="blue stripes",
        attack=BadNet(size=8),
        device="cpu",
    )


def test_graph_and_repository_have_the_rates_of_the_purified_head(found: tuple[Evaluation, ...]) -> None:
    bundle, *exported = found
    assert bundle.before is not None
    for evaluation, kind in zip(exported, ("onnx", "repository"), strict=True):
        assert (evaluation.kind, evaluation.before, evaluation.encoder) == (kind, None, None)
        assert evaluation.after == bundle.after
        assert (evaluation.detector, evaluation.suspects) == ("alarm", bundle.suspects)
        assert evaluation.alarm.auroc.value == pytest.approx(bundle.alarm.auroc.value, abs=0.02)


def test_the_dictionary_has_the_same_keys_and_nothing_before(found: tuple[Evaluation, ...]) -> None:
    plain = [json.loads(json.dumps(evaluation.to_dict(), allow_nan=False)) for evaluation in found]
    assert plain[0].keys() == plain[1].keys() == plain[2].keys()
    assert plain[1]["before"] is None
    assert plain[1]["after"] == asdict(found[1].after)
    assert set(plain[1]["per_class"][0]) == {"name", "images", "right_after"}
    assert sum(row["after"] for row in plain[1]["triggered_predictions"]) == 36


def test_tables_have_a_row_for_the_one_head(found: tuple[Evaluation, ...]) -> None:
    rows = list(csv.DictReader(io.StringIO(tables.comma_separated(found))))
    assert [(row["kind"], row["head"]) for row in rows] == [
        ("bundle", "before"), ("bundle", "after"), ("onnx", "after"), ("repository", "after")
    ]  # fmt: skip
    assert rows[2]["alarm_auroc"] != ""


@pytest.mark.parametrize("chosen", [slice(1, 2), slice(0, 3)])
def test_the_page_shows_one_head_and_says_so(found: tuple[Evaluation, ...], chosen: slice) -> None:
    page = render_evaluation(found[chosen])
    assert "what was exported has the purified head alone" in page
    assert "Nothing here is purified" not in page


def test_the_command_says_that_nothing_is_measured_before(
    tiny_graph: Path, tiny_served: Path, tiny_image_folder: Path, run: Callable
) -> None:
    images = ("--images", tiny_image_folder, "--triggered", tiny_image_folder, "--target", "blue_stripes")
    alone = run("evaluate", tiny_graph, *images)
    assert alone.code == 0, alone.err
    assert "not measured: what was exported has the purified head alone" in alone.out
    assert all(word in alone.out for word in ("ASR", "recall", "AUROC", "verdict"))
    both = run("evaluate", tiny_graph, tiny_served, *images)
    assert both.err.count("what was exported has the purified head alone") == 2


def test_a_repository_has_to_be_the_trusted_one(
    tiny_served: Path, tiny_graph: Path, tiny_image_folder: Path, run: Callable
) -> None:
    images = ("--images", tiny_image_folder)
    digest = json.loads(run("evaluate", tiny_served, *images, "--json").out)["digest"]
    assert run("evaluate", tiny_served, *images, "--digest", digest).code == 0
    for source, wanted in ((tiny_served, "0" * 64), (tiny_graph, digest)):
        refused = run("evaluate", source, *images, "--digest", wanted)
        assert (refused.code, refused.out) == (2, "")


def test_a_strangers_graph_is_refused(
    tiny_graph: Path, tiny_image_folder: Path, tmp_path: Path, run: Callable
) -> None:
    import onnx

    model = onnx.load(tiny_graph)
    model.graph.node[0].domain = "com.evil"
    (tmp_path / "evil.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "other.onnx").write_bytes(b"")
    for name in ("evil.onnx", "other.onnx"):
        done = run("evaluate", tmp_path / name, "--images", tiny_image_folder)
        assert (done.code, done.out) == (2, "")
        assert name in done.err.replace("\n", "")
