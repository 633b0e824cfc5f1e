from __future__ import annotations

import json
from pathlib import Path

import pytest

from cbpt_runtime.bundle import ENCODER, Bundle, BundleContent, write_bundle
from cbpt_runtime.errors import BundleError
from cbpt_runtime.inspection import inspect_path


def test_a_bundle_is_described_and_its_hashes_verified(tiny_bundle: Bundle) -> None:
    found = inspect_path(tiny_bundle.path)
    assert (found["kind"], found["verdict"], found["suspects"]) == ("bundle", "backdoored", ["Blue Stripes"])
    assert found["digest"] == tiny_bundle.digest
    assert ENCODER in found["verified"]
    assert found["anomalies"] == []
    json.dumps(found)


def test_a_damaged_bundle_is_an_error_that_names_the_file(tmp_path: Path, make_content) -> None:
    write_bundle(tmp_path / "bundle", content=make_content())
    with (tmp_path / "bundle" / ENCODER).open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match=ENCODER):
        inspect_path(tmp_path / "bundle")


def test_a_file_the_manifest_does_not_know_is_odd(tmp_path: Path, make_content) -> None:
    content: BundleContent = make_content()
    write_bundle(tmp_path / "bundle", content=content)
    (tmp_path / "bundle" / "payload.py").write_text("")
    assert inspect_path(tmp_path / "bundle")["anomalies"] == ["a file the manifest does not know: payload.py"]


def test_anything_else_is_inspected_as_a_checkpoint(tiny_checkpoint_folder: Path) -> None:
    assert inspect_path(tiny_checkpoint_folder)["format"] == "open_clip-folder"
