from __future__ import annotations

import json
from pathlib import Path

import pytest

from cbpt_runtime.bundle import ENCODER, Bundle, BundleContent, write_bundle
from cbpt_runtime.errors import BundleError, ConfigError
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


def test_the_prompts_of_a_class_list_are_looked_at_through_the_text_tower(
    tiny_checkpoint_folder: Path, tiny_class_file: Path
) -> None:
    found = inspect_path(tiny_checkpoint_folder, classes=tiny_class_file, templates=["the {}", "my {}"])
    assert found["format"] == "open_clip-folder"
    assert [word["word"] for word in found["prompts"]["words"]] == ["my", "the"]
    json.dumps(found)


def test_classes_are_for_checkpoints_and_templates_for_classes(
    tiny_bundle: Bundle, tiny_class_file: Path
) -> None:
    with pytest.raises(ConfigError, match="one for the bundle"):
        inspect_path(tiny_bundle.path, classes=tiny_class_file)
    with pytest.raises(ConfigError, match="templates alone"):
        inspect_path(tiny_bundle.path, templates=["a {}"])
