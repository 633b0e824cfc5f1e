"""Papers for auditors: what `purify` and `export` put beside their work, in formats other tools read.

attestation   the verdict about the checkpoint, as an in-toto Statement v1
bom           what went into the classifier, as a CycloneDX 1.6 ML-BOM

Both are plain JSON with a date in them; nothing of the product ever reads them back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.papers.attestation import verdict_statement
from cbpt_runtime.papers.bom import ml_bom

ATTESTATION = "verdict.intoto.json"
BOM = "mlbom.cdx.json"

__all__ = ["ATTESTATION", "BOM", "bundle_papers", "ml_bom", "repository_papers", "verdict_statement"]


def bundle_papers(bundle: Bundle) -> dict[str, str]:
    """The papers of a bundle, by file name.

    Args:
        bundle: All of it but its papers.
    """
    date = _now()
    products = {name: str(entry["sha256"]) for name, entry in bundle.manifest["files"].items()}
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
    """The papers of a model repository, by file name.

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
