"""`cbpt-runtime export` and `verify`, and the programs of export/."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
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


def test_a_signed_repository_is_verified_and_no_other_is_used(
    copied_repository: Path,
    tiny_repository: Exported,
    signing_keys: Path,
    tiny_image_folder: Path,
    run: Callable,
) -> None:
    key, other = signing_keys / "ours.pub", signing_keys / "other.pub"
    verbs = {
        "verify": [copied_repository],
        "serve": [copied_repository],
        "bench": ["run", copied_repository, "--images", tiny_image_folder],
    }
    for verb, arguments in verbs.items():
        unsigned = run(verb, *arguments, "--trust", key)
        assert unsigned.code == 2
        assert f"expected a signature in {copied_repository / 'model.sig'}" in unsigned.err
    assert run("sign", copied_repository, "--key", signing_keys / "ours.pem").code == 0
    good = run("verify", copied_repository, "--trust", key, "--digest", tiny_repository.digest)
    assert good.code == 0, good.err
    assert tiny_repository.digest in good.out
    for verb, arguments in verbs.items():
        assert "Key mismatch" in run(verb, *arguments, "--trust", other).err
        assert "with the digest" in run(verb, *arguments, "--digest", "0" * 64).err
    (copied_repository / "shapes_preprocess" / "1" / "extra.py").write_text("")
    changed = run("verify", copied_repository, "--trust", key)
    assert changed.code == 2
    assert "got shapes_preprocess/1/extra.py is new" in changed.err


def test_code_changed_under_a_manifest_made_to_fit_is_neither_verified_nor_served(
    copied_repository: Path, resealed: Callable[[Path], None], signing_keys: Path, run: Callable
) -> None:
    assert run("sign", copied_repository, "--key", signing_keys / "ours.pem").code == 0
    code = copied_repository / "shapes_preprocess" / "1" / "runtime" / "preprocess.py"
    with code.open("a") as file:
        file.write("print('let in')\n")
    resealed(copied_repository)
    for verb in ("verify", "serve"):
        done = run(verb, copied_repository, "--trust", signing_keys / "ours.pub")
        assert done.code == 2
        assert "shapes_preprocess/1/runtime/preprocess.py was changed" in done.err
        assert "manifest.json was changed" in done.err


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
