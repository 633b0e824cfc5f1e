"""What went into a classifier, as a CycloneDX ML-BOM: https://cyclonedx.org/docs/1.6/json/.

Written as plain JSON: cyclonedx-python-lib (11.12), which checks it in the tests, knows no model cards yet,
and without one it is no ML-BOM.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any
from urllib.parse import quote

from cbpt_runtime.bundle import Bundle

SPEC_VERSION = "1.6"
_MODEL = "machine-learning-model"
_CLASSIFIER = "classifier"


def ml_bom(
    bundle: Bundle,
    *,
    name: str,
    date: str,
    products: Mapping[str, str],
    versions: Mapping[str, str],
    is_made_from_bundle: bool = False,
) -> dict[str, Any]:
    """The bill of materials of a classifier.

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
    model = bundle.manifest["model"]
    yield {
        "type": _MODEL,
        "name": str(model["source"]),
        "description": f"The suspect checkpoint, verdict: {bundle.verdict}.",
        "hashes": _hashes(str(model["sha256"])),
    }
    if is_made_from_bundle:
        yield {
            "type": _MODEL,
            "name": "bundle",
            "description": "The purified bundle; the hash is that of its manifest.json.",
            "hashes": _hashes(bundle.digest),
        }


def _model_card(bundle: Bundle) -> dict[str, Any]:
    method = bundle.manifest["method"]
    seen = {key: method[key] for key in ("tune_images", "heldout_images", "split_digest") if key in method}
    metrics = {key: value for key, value in bundle.metrics.items() if value is not None}
    return {
        "modelParameters": {
            "task": "zero-shot image classification",
            "architectureFamily": "CLIP",
            "datasets": [
                {"type": "dataset", "name": "clean images", "contents": {"properties": _pairs(seen)}}
            ],
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
    method = bundle.manifest["method"]
    facts = {
        "verdict": bundle.verdict,
        "method": method["name"],
        "parameterization": method["parameterization"],
        "encoder": bundle.encoder,
        "seed": method["seed"],
        "p_value": bundle.manifest.get("evidence", {}).get("p_value"),
    }
    yield from _pairs({key: value for key, value in facts.items() if value is not None})
    for suspect in bundle.suspects:
        yield from _pairs({"suspected_target": suspect["name"]})


def _pairs(facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """Facts as CycloneDX's properties, in a namespace of their own."""
    return [{"name": f"cbpt-runtime:{key}", "value": str(value)} for key, value in facts.items()]
