"""Verification: an intact repository passes, every kind of tampering is named."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.errors import ExportError, RepositoryError
from cbpt_runtime.export.cpus import kind_of_processor
from cbpt_runtime.export.manifest import read_repository
from cbpt_runtime.export.onnx import read_metadata, write_metadata
from cbpt_runtime.export.repository import Exported
from cbpt_runtime.export.verify import verify_repository
from cbpt_runtime.export.weights import to_bytes


def test_an_intact_repository_verifies(tiny_repository: Exported, tiny_bundle: Bundle) -> None:
    found = verify_repository(tiny_repository.path, tiny_bundle)
    assert found.digest == tiny_repository.digest
    assert found.provider == "CPUExecutionProvider"
    assert found.golden_images == 4
    assert found.golden_difference <= 1e-6
    assert found.parity is not None
    assert found.parity["passed"]
    assert found.graph_note is None  # it is what the bundle gives when it is exported again


def test_another_graph_than_the_bundle_gives_is_refused(
    copied_repository: Path, resealed: Callable[[Path], None], tiny_bundle: Bundle
) -> None:
    """One weight that the parity gate does not see, and a manifest that fits."""
    nudge_a_weight(copied_repository)
    resealed(copied_repository)
    with pytest.raises(RepositoryError, match="gives when it is exported; got another graph"):
        verify_repository(copied_repository, tiny_bundle)


def test_a_graph_of_other_packages_is_not_compared_and_it_is_said(
    copied_repository: Path, resealed: Callable[[Path], None], tiny_bundle: Bundle
) -> None:
    nudge_a_weight(copied_repository, versions='{"torch": "2.6.0"}')
    resealed(copied_repository)
    note = verify_repository(copied_repository, tiny_bundle).graph_note
    assert note is not None
    assert note.endswith('made with other package versions, {"torch": "2.6.0"}')


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_lower_precisions_are_gated_again_with_the_bundle(
    precision: str, bundle_with_images: Bundle, tiny_export, tmp_path: Path, monkeypatch, capsys
) -> None:
    from cbpt_runtime.__main__ import main
    from cbpt_runtime.export import images, repository
    from cbpt_runtime.export.onnx import describe, write_metadata

    model = onnx.ModelProto()
    model.CopyFrom(tiny_export.model)
    write_metadata(model, describe(bundle_with_images, precision="fp32"))
    monkeypatch.setattr(repository, "export_onnx", lambda *_: model)
    output = str(tmp_path / "out")
    command = ["export", str(bundle_with_images.path), "--output", output, "--precision", precision]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--max-batch", "4", "--json"])
    assert ended.value.code == 0
    written = {path.stem for path in (tmp_path / "out").glob("clip_classifier/configs/*")}
    assert written == {"cpu", "python"} | ({"cuda", "tensorrt"} if precision == "fp16" else set())
    made_on = kind_of_processor() if precision == "int8" else None
    assert read_repository(output).manifest.processor == made_on  # the others answer alike everywhere
    exported = json.loads(capsys.readouterr().out)["parity"]["precision"]
    with pytest.raises(SystemExit) as ended:
        main(["verify", output, "--bundle", str(bundle_with_images.path), "--json"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)["parity"]
    assert (found["images"], found["provider"]) == ("bundle", "CPUExecutionProvider")
    assert found["precision"]["accuracy"] == exported["accuracy"]
    monkeypatch.setattr(images, "MAX_CA_DROP", -1.0)
    with pytest.raises(ExportError, match=f"{precision} within"):
        verify_repository(output, bundle_with_images)


def test_a_changed_a_missing_and_a_new_file_are_all_named(copied_repository: Path) -> None:
    (copied_repository / "shapes" / "config.pbtxt").write_text("name: 'other'")
    (copied_repository / "shapes_preprocess" / "1" / "model.py").unlink()
    (copied_repository / "shapes_classifier" / "1" / "libevil.so").touch()
    with pytest.raises(RepositoryError) as caught:
        verify_repository(copied_repository)
    assert "shapes/config.pbtxt was changed" in caught.value.got
    assert "shapes_preprocess/1/model.py is missing" in caught.value.got
    assert "shapes_classifier/1/libevil.so is not in the manifest" in caught.value.got


def test_what_systems_leave_everywhere_is_ignored_and_noted(run: Callable, copied_repository: Path) -> None:
    (copied_repository / "lost+found").mkdir()
    (copied_repository / ".DS_Store").write_text("x")
    (copied_repository / "__MACOSX" / "shapes").mkdir(parents=True)
    (copied_repository / "__MACOSX" / "shapes" / "._labels.txt").write_text("x")
    (copied_repository / "shapes_classifier" / "1" / "._model.onnx").write_text("x")
    left = (".DS_Store", "__MACOSX", "lost+found", "shapes_classifier/1/._model.onnx")
    assert verify_repository(copied_repository).ignored == left
    done = run("verify", copied_repository)
    assert done.code == 0
    assert f"note: ignored, as systems leave them everywhere: {', '.join(left)}" in done.err


def test_other_foreign_files_are_refused_with_advice(copied_repository: Path) -> None:
    (copied_repository / "notes.txt").touch()
    with pytest.raises(RepositoryError, match=r"got notes\.txt is not in the manifest\. Move them elsewhere"):
        verify_repository(copied_repository)


def test_a_link_is_not_a_file(copied_repository: Path) -> None:
    labels = copied_repository / "shapes" / "labels.txt"
    labels.rename(copied_repository.parent / "labels.txt")
    labels.symlink_to(copied_repository.parent / "labels.txt")
    with pytest.raises(RepositoryError, match="not a plain file"):
        verify_repository(copied_repository)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"kind": "cbpt-runtime model repository", "schema_version": 1}']
)
def test_what_is_no_repository_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(RepositoryError):
        read_repository(tmp_path)
    with pytest.raises(RepositoryError, match="No such file"):
        read_repository(tmp_path / "nowhere")


def test_a_manifest_cannot_point_outside(copied_repository: Path) -> None:
    path = copied_repository / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../secret"] = {"sha256": "0" * 64}
    path.write_text(json.dumps(manifest))
    with pytest.raises(RepositoryError, match="leaves the repository"):
        read_repository(copied_repository)


def test_a_resealed_graph_fails_its_digest(copied_repository: Path, resealed: Callable[[Path], None]) -> None:
    swap_classes(copied_repository)
    resealed(copied_repository)
    with pytest.raises(RepositoryError, match="another graph"):
        verify_repository(copied_repository)


def test_swapped_classes_fail_the_golden_answers(
    copied_repository: Path, resealed: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    swap_classes(copied_repository)
    resealed(copied_repository)
    monkeypatch.setattr("cbpt_runtime.export.verify.check_graph", lambda _: None)
    with pytest.raises(ExportError, match="golden answers"):
        verify_repository(copied_repository)


def test_a_configuration_triton_cannot_read_is_named(
    copied_repository: Path, resealed: Callable[[Path], None]
) -> None:
    (copied_repository / "shapes_classifier" / "configs" / "cpu.pbtxt").write_text("max_batch: 3")
    resealed(copied_repository)
    with pytest.raises(RepositoryError, match=r"cpu\.pbtxt"):
        verify_repository(copied_repository)


def test_another_bundle_is_noticed(tiny_repository: Exported, tiny_bundle: Bundle) -> None:
    with pytest.raises(RepositoryError, match="that of another bundle"):
        verify_repository(tiny_repository.path, replace(tiny_bundle, digest="0" * 64))


def nudge_a_weight(repository: Path, versions: str | None = None) -> None:
    """Change a weight by almost nothing; also what the graph says about the packages it was made with."""
    path = repository / "shapes_classifier" / "1" / "model.onnx"
    model = onnx.load(path)
    head = next(tensor for tensor in model.graph.initializer if tensor.name == "class_embeddings")
    head.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(head) * np.float32(1 + 1e-6), head.name))
    if versions is not None:
        write_metadata(model, read_metadata(model) | {"cbpt.versions": versions})
    path.write_bytes(to_bytes(model))
    manifest = json.loads((repository / "manifest.json").read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for file in [repository / "manifest.json", *repository.rglob("*.pbtxt")]:
        file.write_text(file.read_text().replace(manifest["graph_sha256"], digest))


def swap_classes(repository: Path) -> None:
    path = repository / "shapes_classifier" / "1" / "model.onnx"
    model = onnx.load(path)
    head = next(tensor for tensor in model.graph.initializer if tensor.name == "class_embeddings")
    values = numpy_helper.to_array(head).copy()
    head.CopyFrom(numpy_helper.from_array(values[:, [1, 0, 2]], head.name))
    onnx.save(model, path)


def test_verifying_without_a_bundle_needs_no_torch(tiny_repository: Exported) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['open_clip'] = None\n"
        "from cbpt_runtime.export.verify import verify_repository\n"
        "print(verify_repository(sys.argv[1]).golden_images)"
    )
    command = [sys.executable, "-c", code, str(tiny_repository.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "4\n", done.stderr
