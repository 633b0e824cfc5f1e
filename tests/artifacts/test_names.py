"""Names of files that are bytes, and terminals that are not UTF-8."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cbpt_runtime.__main__ import main
from cbpt_runtime.artifacts.names import PLAINER, json_text, name_bytes, readable, shell_line, utf8_path
from cbpt_runtime.bundle import Bundle

LATIN_1 = os.fsdecode(b"caf\xe9")


def test_bytes_that_are_no_text_can_be_read_by_people() -> None:
    assert readable(LATIN_1) == r"caf\xe9"
    assert readable("\ud800") == r"\ud800"
    assert readable("café → 😀") == "café → 😀"
    assert name_bytes(LATIN_1) == b"caf\xe9"


def test_json_with_such_names_is_valid_utf_8() -> None:
    text = json_text({LATIN_1: [LATIN_1, "é"]})
    assert json.loads(text.encode()) == {r"caf\xe9": [r"caf\xe9", "é"]}
    assert json_text("é", ascii_only=True) == r'"\u00e9"'
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text(float("nan"))


def test_a_command_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    words = ["a b", "it's", f"back\\slash '{LATIN_1}"]
    printed = subprocess.run(
        ["bash", "-c", "printf '%s\\n' " + shell_line(*words)], capture_output=True, check=True
    ).stdout
    assert printed == b"\n".join(map(os.fsencode, words)) + b"\n"
    assert shlex.split(shell_line("verify", "a b")) == ["verify", "a b"]


def test_libraries_get_a_name_they_can_open(tmp_path: Path) -> None:
    save_file({"a": np.ones(2)}, tmp_path / "plain.safetensors")
    odd = tmp_path / f"{LATIN_1}.safetensors"
    (tmp_path / "plain.safetensors").rename(odd)
    with utf8_path(odd) as name:
        assert load_file(name)["a"].tolist() == [1, 1]
    assert not Path(name).exists()
    with utf8_path(tmp_path) as same:
        assert same == str(tmp_path)


@pytest.fixture
def latin_1_folder(
    tmp_path: Path, tiny_checkpoint_folder: Path, tiny_image_folder: Path, tiny_bundle: Bundle
) -> Path:
    """A folder with a checkpoint, images and a bundle, everything of it with a name that is no text."""
    root = tmp_path / LATIN_1
    shutil.copytree(tiny_checkpoint_folder, root / f"suspect {LATIN_1}")
    shutil.copytree(tiny_image_folder, root / f"images {LATIN_1}")
    shutil.copytree(tiny_bundle.path, root / f"bundle {LATIN_1}")
    for path in (root / f"images {LATIN_1}").glob("*/00.png"):
        path.rename(path.with_name(f"{LATIN_1}.png"))
    return root


def test_every_verb_takes_names_that_are_bytes(
    run: Callable, latin_1_folder: Path, tiny_class_file: Path, tmp_path: Path
) -> None:
    suspect, images, bundle = (
        latin_1_folder / f"{kind} {LATIN_1}" for kind in ("suspect", "images", "bundle")
    )
    picture = next(images.glob(f"*/{LATIN_1}.png"))
    quick = tmp_path / f"{LATIN_1}.json"
    quick.write_text(
        '{"search_steps": 1, "search_concepts": 8, "inversion_steps": 1, "tuning_steps": 1,'
        ' "background_words": false}'
    )
    purify = ("purify", "--checkpoint", suspect, "--classes", tiny_class_file, "--images", images)
    few = ("--template", "a {}", "--shots", 2, "--config", quick)
    bench = ("--scenario", "single-stream", "--duration-s", 0.1, "--warmup-s", 0)
    outputs = ("purified", "report", "applied", "bench")
    made = {name: latin_1_folder / f"{name} {LATIN_1}" for name in outputs}
    for words in (
        ("inspect", suspect),
        ("inspect", bundle),
        (*purify, "--output", made["purified"], *few),
        ("classify", bundle, picture),
        ("evaluate", bundle, "--images", images, "--report", made["report"]),
        ("evaluate", bundle, suspect, "--images", images, "--format", "csv"),
        ("attack", "apply", "badnet", "--images", images, "--output", made["applied"]),
        ("bench", "run", bundle, "--images", images, *bench, "--output", made["bench"]),
    ):
        done = run(*words)
        assert done.code == 0, (words, done.err)
        done.out.encode()
    assert {path.name for path in made["applied"].glob("*/*")} >= {f"{LATIN_1}.png"}
    parsed = json.loads(run("classify", bundle, picture, "--json").out)
    assert parsed["images"][0]["image"].endswith(r"caf\xe9.png")
    manifest = json.loads((made["purified"] / "manifest.json").read_text("utf-8"))
    assert manifest["model"]["source"].endswith(r"suspect caf\xe9")
    assert r"caf\xe9" in made["report"].read_text("utf-8")


def test_an_exported_repository_has_any_name(
    run: Callable, tiny_bundle: Bundle, tiny_image_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / f"two words {LATIN_1}"
    done = run("export", tiny_bundle.path, "--output", output, "--calibration", tiny_image_folder)
    assert done.code == 0
    line = next(line for line in done.out.splitlines() if line.startswith("next"))
    assert line.endswith(r"two words caf\xe9'")
    assert run("verify", output, "--json").code == 0


def test_a_terminal_that_is_not_utf_8_gets_plainer_text(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Bundle, tiny_image_folder: Path
) -> None:
    words = ("evaluate", str(tiny_bundle.path), "--images", str(tiny_image_folder))
    for more in ((), ("--json",)):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
        with pytest.raises(SystemExit, match="0"):
            main([*words, *more])
        sys.stdout.flush()
        assert b"Blue Stripes" in written.getvalue()


def test_letters_a_stream_cannot_hold_become_plainer() -> None:
    assert "9 → 4 × “ü”".encode("ascii", PLAINER) == rb"9 -> 4 x \u201c\xfc\u201d"
    assert LATIN_1.encode("utf-8", PLAINER) == rb"caf\xe9"


def test_what_is_written_may_be_read_by_whom_the_umask_lets(
    tmp_path: Path, tiny_checkpoint_folder: Path
) -> None:
    from cbpt_runtime.models.trainable import load_trainable, save_open_clip_folder

    umask = os.umask(0o022)
    try:
        save_open_clip_folder(load_trainable(tiny_checkpoint_folder), tmp_path / "victim")
    finally:
        os.umask(umask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "victim").iterdir()}
    assert modes == {0o644}
