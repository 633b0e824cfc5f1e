"""Papers for auditors: what `purify` and `export` put beside their work, in formats other tools read.

The verdict about the checkpoint is an in-toto Statement v1
(https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md); its predicate is our own, as
``docs/verdict-v1.schema.json`` describes it. What went into the classifier is a CycloneDX ML-BOM
(https://cyclonedx.org/docs/1.6/json/), as plain JSON: cyclonedx-python-lib (11.12), which checks it in the
tests, knows no model cards yet, and without one it is no ML-BOM. Both have a date in them; nothing of the
product ever reads them back.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any
from urllib.parse import quote

from cbpt_runtime.bundle import Bundle

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:cbpt-runtime:verdict:v1"
SPEC_VERSION = "1.6"
_MODEL = "machine-learning-model"
_CLASSIFIER = "classifier"
ATTESTATION = "verdict.intoto.json"
BOM = "mlbom.cdx.json"

__all__ = ["ATTESTATION", "BOM", "bundle_papers", "ml_bom", "repository_papers", "verdict_statement"]


def verdict_statement(
    bundle: Bundle,
    *,
    date: str,
    products: Mapping[str, str],
    export: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what was found about the suspect checkpoint, how, and what was made of it.

    Args:
        bundle: What purification made.
        date: Of the statement, as RFC 3339 has it, in UTC.
        products: SHA-256 of what was made, by file name.
        export: For a model repository: how it was exported and what the gate saw. The statement then names
            the bundle, too.

    Returns:
        The statement, JSON-able; its subject is the checkpoint.
    """
    manifest = bundle.manifest
    predicate: dict[str, Any] = {
        "verdict": bundle.verdict,
        "date": date,
        "tool": {"name": "cbpt-runtime", "version": version("cbpt-runtime")},
        "method": manifest["method"],
        "classes": len(bundle.class_names),
        "p_value": bundle.evidence.p_value,
        "suspects": manifest["suspects"],
        "metrics": bundle.metrics,
        "products": [_resource(name, sha256) for name, sha256 in sorted(products.items())],
    }
    if export is not None:
        predicate |= {"bundle": _resource("manifest.json", bundle.digest), "export": dict(export)}
    return {
        "_type": STATEMENT_TYPE,
        "subject": [_resource(bundle.origin.source, bundle.origin.sha256)],
        "predicateType": PREDICATE_TYPE,
        "predicate": predicate,
    }


def _resource(name: str, sha256: str) -> dict[str, Any]:
    """Return a ResourceDescriptor."""
    return {"name": name, "digest": {"sha256": sha256}}


def ml_bom(
    bundle: Bundle,
    *,
    name: str,
    date: str,
    products: Mapping[str, str],
    versions: Mapping[str, str],
    is_made_from_bundle: bool = False,
) -> dict[str, Any]:
    """Return the bill of materials of a classifier.

    Args:
        bundle: What purification made.
        name: Of the classifier.
        date: Of the document, as RFC 3339 has it, in UTC.
        products: SHA-256 of its files by name.
        versions: Of the packages that made it.
        is_made_from_bundle: Whether it was exported from the bundle, rather than being the bundle.

    Returns:
        The document, JSON-able.
    """
    parts = [_file(*product) for product in sorted(products.items())] + [
        _library(*package) for package in sorted(versions.items())
    ]
    refs = [part["bom-ref"] for part in parts]
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC_VERSION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": date,
            "tools": {
                "components": [
                    {"type": "application", "name": "cbpt-runtime", "version": version("cbpt-runtime")}
                ]
            },
            "component": {
                "type": _MODEL,
                "bom-ref": _CLASSIFIER,
                "name": name,
                "description": f"Zero-shot classifier over {len(bundle.class_names)} classes, purified.",
                "pedigree": {"ancestors": list(_ancestors(bundle, is_made_from_bundle))},
                "modelCard": _model_card(bundle),
                "properties": list(_properties(bundle)),
            },
        },
        "components": parts,
        "dependencies": [{"ref": _CLASSIFIER, "dependsOn": refs}, *({"ref": ref} for ref in refs)],
    }


def _file(name: str, sha256: str) -> dict[str, Any]:
    return {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": _hashes(sha256)}


def _library(name: str, number: str) -> dict[str, Any]:
    purl = f"pkg:pypi/{name.lower().replace('_', '-')}@{quote(number)}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": number, "purl": purl}


def _hashes(sha256: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": sha256}]


def _ancestors(bundle: Bundle, is_made_from_bundle: bool) -> Iterator[dict[str, Any]]:
    origin = bundle.origin
    yield {
        "type": _MODEL,
        "name": origin.source,
        "description": f"The suspect checkpoint, verdict: {bundle.verdict}.",
        "hashes": _hashes(origin.sha256),
    }
    if is_made_from_bundle:
        yield {
            "type": _MODEL,
            "name": "bundle",
            "description": "The purified bundle; the hash is that of its manifest.json.",
            "hashes": _hashes(bundle.digest),
        }


def _model_card(bundle: Bundle) -> dict[str, Any]:
    seen = _pairs(bundle.making.images)
    metrics = {key: value for key, value in bundle.metrics.items() if value is not None}
    return {
        "modelParameters": {
            "task": "zero-shot image classification",
            "architectureFamily": "CLIP",
            "datasets": [{"type": "dataset", "name": "clean images", "contents": {"properties": seen}}],
            "inputs": [{"format": "image"}],
            "outputs": [{"format": "class probabilities"}, {"format": "alarm in [0, 1]"}],
        },
        "quantitativeAnalysis": {
            "performanceMetrics": [{"type": key, "value": str(value)} for key, value in metrics.items()]
        },
        "considerations": {
            "useCases": ["Classification over the class list it was made for, and nothing else."],
            "technicalLimitations": _limits(bundle),
        },
    }


def _limits(bundle: Bundle) -> list[str]:
    limits = ["The verdict is evidence, not proof: what the search cannot form it does not find."]
    if bundle.encoder == "untouched":
        limits.append("The encoder is that of the checkpoint: a backdoor stays in it for any other use.")
    return limits


def _properties(bundle: Bundle) -> Iterator[dict[str, str]]:
    making = bundle.making
    facts = {
        "verdict": bundle.verdict,
        "method": making.method,
        "parameterization": making.parameterization,
        "encoder": making.encoder,
        "seed": making.seed,
        "p_value": bundle.evidence.p_value,
    }
    yield from _pairs({key: value for key, value in facts.items() if value is not None})
    for suspect in bundle.suspects:
        yield from _pairs({"suspected_target": suspect.name})


def _pairs(facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """Facts as CycloneDX's properties, in a namespace of their own."""
    return [{"name": f"cbpt-runtime:{key}", "value": str(value)} for key, value in facts.items()]


def bundle_papers(bundle: Bundle) -> dict[str, str]:
    """Return the papers of a bundle, by file name.

    Args:
        bundle: All of it but its papers.
    """
    date = _now()
    products = {name: file.sha256 for name, file in bundle.files.items()}
    statement = verdict_statement(bundle, date=date, products=products)
    bom = ml_bom(
        bundle,
        name="purified CLIP classifier",
        date=date,
        products=products,
        versions=bundle.manifest["versions"],
    )
    return {ATTESTATION: _text(statement), BOM: _text(bom)}


def repository_papers(
    bundle: Bundle,
    *,
    name: str,
    products: Mapping[str, str],
    versions: Mapping[str, str],
    export: Mapping[str, Any],
) -> dict[str, str]:
    """Return the papers of a model repository, by file name.

    Args:
        bundle: What was exported.
        name: Of the served model.
        products: SHA-256 of the graph by its path in the repository.
        versions: Of the packages that made it.
        export: How it was exported and what the gate saw, JSON-able.
    """
    date = _now()
    statement = verdict_statement(bundle, date=date, products=products, export=export)
    bom = ml_bom(bundle, name=name, date=date, products=products, versions=versions, is_made_from_bundle=True)
    return {ATTESTATION: _text(statement), BOM: _text(bom)}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _text(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
