"""The verdict about a checkpoint as an in-toto attestation.

Statement v1: https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md. The predicate is our own;
``docs/verdict-v1.schema.json`` describes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from cbpt_runtime.bundle import Bundle

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:cbpt-runtime:verdict:v1"


def verdict_statement(
    bundle: Bundle,
    *,
    date: str,
    products: Mapping[str, str],
    export: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What was found about the suspect checkpoint, how, and what was made of it.

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
    evidence = manifest.get("evidence", {})
    predicate: dict[str, Any] = {
        "verdict": bundle.verdict,
        "date": date,
        "tool": {"name": "cbpt-runtime", "version": version("cbpt-runtime")},
        "method": manifest["method"],
        "classes": len(bundle.class_names),
        "p_value": evidence.get("p_value"),
        "suspects": bundle.suspects,
        "metrics": bundle.metrics,
        "products": [_resource(name, sha256) for name, sha256 in sorted(products.items())],
    }
    if export is not None:
        predicate |= {"bundle": _resource("manifest.json", bundle.digest), "export": dict(export)}
    return {
        "_type": STATEMENT_TYPE,
        "subject": [_resource(str(manifest["model"]["source"]), str(manifest["model"]["sha256"]))],
        "predicateType": PREDICATE_TYPE,
        "predicate": predicate,
    }


def _resource(name: str, sha256: str) -> dict[str, Any]:
    """A ResourceDescriptor."""
    return {"name": name, "digest": {"sha256": sha256}}
