"""`cbpt-runtime export` and `verify`, and the programs of export/."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from cbpt_runtime.__main__ import main
from cbpt_runtime.bundle import Bundle
from cbpt_runtime.export import repository
from cbpt_runtime.export.repository import Exported

PROGRAMS = Path(__file__).parents[2] / "export"


def test_export_prints_parity_and_a_digest(
    tiny_bundle: Bundle, tiny_export, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setattr(repository, "export_onnx", lambda *_: tiny_export.model)
    with pytest.raises(SystemExit) as ended:
        main(
            ["export", str(tiny_bundle.path), "--output", str(tmp_path / "out"), "--max-batch", "4", "--json"]
        )
    assert ended.value.code == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["parity"]["passed"] is True
    assert found["digest"]
    assert "drawn pictures" in printed.err


def test_verify_prints_what_it_checked(tiny_repository: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(tiny_repository.path)])
    assert ended.value.code == 0
    assert "intact" in capsys.readouterr().out


def test_a_damaged_repository_exits_2_and_names_the_file(
    copied_repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied_repository / "shapes" / "labels.txt").write_text("cat\n")
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(copied_repository)])
    assert ended.value.code == 2
    assert "shapes/labels.txt was changed" in capsys.readouterr().err


def test_two_exports_of_one_graph_do_not_differ(
    tiny_repository: Exported,
    tiny_image_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = str(tiny_repository.path)
    monkeypatch.setattr(sys, "argv", ["compare", path, path, "--images", str(tiny_image_folder)])
    runpy.run_path(str(PROGRAMS / "compare_precisions.py"), run_name="__main__")
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["labels_equal"]) == (36, 1.0)


def test_engines_are_not_built_without_tensorrt(
    tiny_repository: Exported,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import onnxruntime

    if "TensorrtExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has it")
    arguments = ["build", str(tiny_repository.path), "--cache", str(tmp_path / "cache")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PROGRAMS / "build_tensorrt_engines.py"), run_name="__main__")
    assert ended.value.code == 2
    assert "no TensorrtExecutionProvider" in capsys.readouterr().err
