"""`sign`, and `--trust` and `--digest` of every verb that reads a bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cbpt_runtime.bundle import Bundle


@pytest.fixture
def signed(tiny_bundle: Bundle, signing_keys: Path, tmp_path: Path, run: Callable) -> Path:
    path = Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
    assert run("sign", path, "--key", signing_keys / "ours.pem").code == 0
    return path


def test_sign_prints_the_digest_and_where_the_signature_is(
    signed: Path, tiny_bundle: Bundle, signing_keys: Path, run: Callable
) -> None:
    parsed = json.loads(run("sign", signed, "--key", signing_keys / "ours.pem", "--force", "--json").out)
    assert parsed == {
        "bundle": str(signed),
        "digest": tiny_bundle.digest,
        "signature": str(signed / "model.sig"),
    }
    refused = run("sign", signed, "--key", signing_keys / "ours.pem")
    assert refused.code == 2
    assert "--force" in refused.err


def verbs(bundle: Path, images: Path, output: Path) -> dict[str, list[object]]:
    """The arguments of every verb that reads a bundle."""
    return {
        "inspect": [bundle],
        "classify": [bundle, min(images.rglob("*.png"))],
        "evaluate": [bundle, "--images", images],
        "export": [bundle, "--output", output],
        "bench": ["run", bundle, "--images", images],
    }


@pytest.mark.parametrize("verb", ["inspect", "classify", "evaluate"])
def test_a_verb_uses_the_trusted_bundle_and_prints_its_digest(
    verb: str, signed: Path, tiny_bundle: Bundle, tiny_image_folder: Path, signing_keys: Path, run: Callable
) -> None:
    arguments = verbs(signed, tiny_image_folder, signed)[verb]
    digest = tiny_bundle.digest
    done = run(verb, *arguments, "--trust", signing_keys / "ours.pub", "--digest", f"sha256:{digest}")
    assert done.code == 0, done.err
    assert digest in done.out + done.err
    assert json.loads(run(verb, *arguments, "--json").out)["digest"] == digest


@pytest.mark.parametrize("verb", ["inspect", "classify", "evaluate", "export", "bench"])
def test_a_verb_refuses_any_other_bundle(
    verb: str, signed: Path, tiny_image_folder: Path, signing_keys: Path, tmp_path: Path, run: Callable
) -> None:
    arguments = verbs(signed, tiny_image_folder, tmp_path / "output")[verb]
    wrong_key = run(verb, *arguments, "--trust", signing_keys / "other.pub")
    assert (wrong_key.code, wrong_key.out) == (2, "")
    assert "Key mismatch" in wrong_key.err
    wrong_digest = run(verb, *arguments, "--digest", "0" * 64)
    assert wrong_digest.code == 2
    assert f"with the digest {'0' * 64}" in wrong_digest.err
    (signed / "model.sig").unlink()
    unsigned = run(verb, *arguments, "--trust", signing_keys / "ours.pub")
    assert unsigned.code == 2
    assert f"expected a signature in {signed / 'model.sig'}" in unsigned.err
    assert "cbpt-runtime sign" in unsigned.err
    assert not (tmp_path / "output").exists()


def test_inspect_says_how_it_stands_with_the_signature(
    signed: Path, tiny_bundle: Bundle, signing_keys: Path, run: Callable
) -> None:
    def said(*arguments: object) -> str:
        found = json.loads(run("inspect", *arguments, "--json").out)
        assert found["anomalies"] == []
        return found["signature"]

    assert said(tiny_bundle.path) == "none"
    assert said(signed).startswith("there, not checked")
    assert said(signed, "--trust", signing_keys / "ours.pub").startswith("good")


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "CHECKPOINT"],
        ["evaluate", "CHECKPOINT", "--images", "IMAGES"],
        ["classify", "photo.png", "--url", "grpc://127.0.0.1:1"],
        ["bench", "run", "grpc://127.0.0.1:1", "--images", "IMAGES"],
    ],
)
def test_what_can_show_nothing_is_refused(
    words: list[str], tiny_checkpoint_folder: Path, tiny_image_folder: Path, run: Callable
) -> None:
    places = {"CHECKPOINT": tiny_checkpoint_folder, "IMAGES": tiny_image_folder}
    done = run(*[places.get(word, word) for word in words], "--digest", "0" * 64)
    assert done.code == 2
    assert "which is neither" in done.err
