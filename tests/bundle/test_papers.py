"""The papers of bundles and repositories, against the schemas of their formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from cbpt_runtime.bundle import (
    ENCODER,
    HEAD,
    TRIGGERS,
    Bundle,
    BundleContent,
    Evidence,
    read_bundle,
    write_bundle,
)
from cbpt_runtime.bundle.papers import ATTESTATION, BOM, bundle_papers, repository_papers
from cbpt_runtime.errors import BundleError

MakeContent = Callable[..., BundleContent]
CheckPaper = Callable[[str | bytes], dict[str, Any]]


@pytest.fixture
def bundle(tmp_path: Path, make_content: MakeContent) -> Bundle:
    """A small bundle with its papers."""
    path = tmp_path / "bundle"
    return write_bundle(path, content=make_content(), report=lambda _: "<p>", papers=bundle_papers)


def test_the_attestation_is_about_the_checkpoint_and_says_how_it_was_judged(
    bundle: Bundle, check_statement: CheckPaper
) -> None:
    text = bundle.read_file(ATTESTATION)
    predicate = check_statement(text)
    assert json.loads(text)["subject"] == [{"name": "suspect", "digest": {"sha256": "0" * 64}}]
    assert predicate["verdict"] == "backdoored"
    assert predicate["tool"]["version"] == version("cbpt-runtime")
    assert predicate["method"] == bundle.manifest["method"]
    assert (predicate["p_value"], predicate["suspects"]) == (0.001, bundle.manifest["suspects"])
    assert predicate["metrics"] == {"heldout_ca_before": 0.75, "heldout_ca_after": 0.74}
    products = {entry["name"]: entry["digest"]["sha256"] for entry in predicate["products"]}
    listed = bundle.manifest["files"]
    assert products == {name: listed[name]["sha256"] for name in (HEAD, ENCODER, TRIGGERS, "report.html")}
    age = datetime.now(UTC) - datetime.fromisoformat(predicate["date"])
    assert timedelta(0) <= age < timedelta(minutes=1)


def test_the_bill_of_materials_names_files_packages_and_the_checkpoint(
    bundle: Bundle, check_bom: CheckPaper
) -> None:
    bom = check_bom(bundle.read_file(BOM))
    model = bom["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    (ancestor,) = model["pedigree"]["ancestors"]
    assert ancestor["hashes"] == [{"alg": "SHA-256", "content": "0" * 64}]
    metrics = {
        entry["type"]: entry["value"]
        for entry in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    }
    assert metrics == {"heldout_ca_before": "0.75", "heldout_ca_after": "0.74"}
    properties = {entry["name"]: entry["value"] for entry in model["properties"]}
    assert properties["cbpt-runtime:verdict"] == "backdoored"
    assert properties["cbpt-runtime:suspected_target"] == "banana"
    hashes = {
        part["name"]: part["hashes"][0]["content"] for part in bom["components"] if part["type"] == "file"
    }
    assert hashes[HEAD] == bundle.manifest["files"][HEAD]["sha256"]
    assert "pkg:pypi/cbpt-runtime@0.1.0" in {part.get("purl") for part in bom["components"]}
    assert {ref for entry in bom["dependencies"] for ref in entry.get("dependsOn", ())} == {
        part["bom-ref"] for part in bom["components"]
    }


def test_the_papers_of_a_repository_name_the_bundle_and_the_graph(
    bundle: Bundle, check_statement: CheckPaper, check_bom: CheckPaper
) -> None:
    graph = "clip_classifier/1/model.onnx"
    papers = repository_papers(
        bundle,
        name="clip",
        products={graph: "1" * 64},
        versions={"torch": "2.15.0+cu130", "open_clip_torch": "3.3.0"},
        export={"profile": {"precision": "fp32"}, "parity": {"passed": True}},
    )
    predicate = check_statement(papers[ATTESTATION])
    assert predicate["bundle"]["digest"]["sha256"] == bundle.digest
    assert predicate["products"] == [{"name": graph, "digest": {"sha256": "1" * 64}}]
    bom = check_bom(papers[BOM])
    checkpoint, parent = bom["metadata"]["component"]["pedigree"]["ancestors"]
    assert checkpoint["hashes"][0]["content"] == "0" * 64
    assert parent["hashes"][0]["content"] == bundle.digest
    purls = {part["purl"] for part in bom["components"] if "purl" in part}
    assert purls == {"pkg:pypi/torch@2.15.0%2Bcu130", "pkg:pypi/open-clip-torch@3.3.0"}


@pytest.mark.parametrize(
    "changes",
    [
        {"verdict": "clean", "suspects": (), "metrics": {"heldout_ca_before": float("nan")}},
        {"verdict": "unknown", "suspects": (), "evidence": Evidence(), "metrics": {}},
    ],
)
def test_clean_and_unknown_verdicts_have_papers_too(
    tmp_path: Path,
    make_content: MakeContent,
    changes: dict[str, Any],
    check_statement: CheckPaper,
    check_bom: CheckPaper,
) -> None:
    bundle = write_bundle(tmp_path / "bundle", content=make_content(**changes), papers=bundle_papers)
    assert check_statement(bundle.read_file(ATTESTATION))["verdict"] == changes["verdict"]
    check_bom(bundle.read_file(BOM))


def test_a_changed_paper_is_noticed_and_a_bundle_without_any_is_read(
    bundle: Bundle, tmp_path: Path, make_content: MakeContent
) -> None:
    text = (bundle.path / ATTESTATION).read_text()
    (bundle.path / ATTESTATION).write_text(text.replace("backdoored", "clean"))
    with pytest.raises(BundleError, match=ATTESTATION):
        read_bundle(bundle.path)
    older = write_bundle(tmp_path / "older", content=make_content())
    assert BOM not in read_bundle(older.path).manifest["files"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s["subject"].clear(), "non-empty"),
        (lambda s: s["subject"][0]["digest"].update(sha256="0"), "does not match"),
        (lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"), "was expected"),
        (lambda s: s["predicate"].pop("metrics"), "'metrics' is a required property"),
        (lambda s: s["predicate"].update(date="today"), "date-time"),
        (lambda s: s["predicate"].update(p_value=2), "maximum"),
        (lambda s: s["predicate"].update(export={"profile": {}, "parity": {"passed": True}}), "dependency"),
    ],
)
def test_the_schemas_refuse_what_is_no_attestation_of_ours(
    bundle: Bundle, change: Callable[[dict[str, Any]], object], told: str, check_statement: CheckPaper
) -> None:
    statement = json.loads(bundle.read_file(ATTESTATION))
    change(statement)
    with pytest.raises(Exception, match=told):
        check_statement(json.dumps(statement))
