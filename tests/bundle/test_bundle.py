from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from cbpt_runtime.bundle import (
    ENCODER,
    HEAD,
    MANIFEST,
    REPORT,
    TRIGGERS,
    BundleContent,
    read_bundle,
    write_bundle,
)
from cbpt_runtime.errors import BundleError, OutputError

MakeContent = Callable[..., BundleContent]


def test_a_bundle_reads_back_as_written(tmp_path: Path, make_content: MakeContent) -> None:
    content = make_content(logit_bias=-10.0, contexts=np.ones((3, 4, 8), np.float32))
    written = write_bundle(tmp_path / "bundle", content=content, report=lambda bundle: f"<p>{bundle.verdict}")
    read = read_bundle(tmp_path / "bundle")
    np.testing.assert_array_equal(read.class_embeddings, content.class_embeddings)
    np.testing.assert_array_equal(read.reference_embeddings, content.reference_embeddings)
    np.testing.assert_array_equal(read.triggers()["blend.2.pattern"], content.triggers["blend.2.pattern"])
    assert read.manifest == written.manifest
    assert (read.logit_scale, read.logit_bias) == (100.0, -10.0)
    assert read.class_names == ("cat", "fire truck", "banana")
    assert read.suspect_indices == (2,)
    assert read.preprocess.image_size == (32, 32)
    assert read.read_file(REPORT) == b"<p>backdoored"
    assert set(read.manifest["files"]) == {HEAD, ENCODER, TRIGGERS, REPORT}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=5, unique=True),
    trigger=npst.arrays(np.float32, (1, 4, 4), elements=st.floats(0, 1, width=32)),
    scale=st.floats(0.5, 200, width=32),
    data=st.data(),
)
def test_any_names_heads_and_triggers_survive_the_round_trip(
    tmp_path: Path,
    make_content: MakeContent,
    names: list[str],
    trigger: np.ndarray,
    scale: float,
    data: st.DataObject,
) -> None:
    elements = st.floats(-1, 1, width=32)
    head = data.draw(npst.arrays(np.float32, (len(names), 8), elements=elements))
    content = make_content(tuple(names), class_embeddings=head, triggers={"t": trigger}, logit_scale=scale)
    write_bundle(tmp_path / "bundle", content=content, force=True)
    read = read_bundle(tmp_path / "bundle")
    np.testing.assert_array_equal(read.class_embeddings, head)
    np.testing.assert_array_equal(read.triggers()["t"], trigger)
    assert read.class_names == tuple(names)
    assert read.logit_scale == scale


def test_the_same_content_gives_the_same_bytes(tmp_path: Path, make_content: MakeContent) -> None:
    for name in ("one", "two"):
        write_bundle(tmp_path / name, content=make_content(contexts=np.zeros((3, 4, 8), np.float32)))
    for file in (HEAD, ENCODER, TRIGGERS, MANIFEST):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_numbers_json_cannot_hold_become_null(tmp_path: Path, make_content: MakeContent) -> None:
    metrics = {"heldout_ca_before": float("nan"), "count": np.int64(3), "heldout_ca_after": np.float32(0.5)}
    bundle = write_bundle(tmp_path / "bundle", content=make_content(metrics=metrics))
    assert bundle.metrics == {"heldout_ca_before": None, "count": 3, "heldout_ca_after": 0.5}


@pytest.mark.parametrize("name", [HEAD, ENCODER, TRIGGERS, REPORT])
def test_a_changed_byte_is_found_and_the_file_named(
    tmp_path: Path, make_content: MakeContent, name: str
) -> None:
    write_bundle(tmp_path / "bundle", content=make_content(), report=lambda _: "a report")
    file = tmp_path / "bundle" / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=f"{name}.*changed or damaged"):
        read_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("name", [HEAD, ENCODER, TRIGGERS, MANIFEST])
def test_a_missing_file_is_named(tmp_path: Path, make_content: MakeContent, name: str) -> None:
    write_bundle(tmp_path / "bundle", content=make_content())
    (tmp_path / "bundle" / name).unlink()
    with pytest.raises(BundleError, match=name):
        read_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=99), "schema_version 1"),
        (lambda m: m.pop("suspects"), "no 'suspects'"),
        (lambda m: m["files"].pop(HEAD), "head.safetensors is not listed"),
        (lambda m: m["files"].update({"../secret": {"sha256": ""}}), "unsafe file name"),
        (lambda m: m.update(files=[]), "'files' is not an object"),
        (lambda m: m["suspects"][0].update(index=3), "suspect 3 is not a class"),
        (lambda m: m["suspects"].append("banana"), r"'suspects\[1\]' is not an object"),
        (lambda m: m["classes"]["names"].pop(), "two finite float32 heads of 2 rows|suspect 2"),
        (lambda m: m.update(classes={"names": 3}), "'classes.names' is not a list"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    tmp_path: Path, make_content: MakeContent, change: Callable[[dict], object], message: str
) -> None:
    write_bundle(tmp_path / "bundle", content=make_content())
    file = tmp_path / "bundle" / MANIFEST
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=message):
        read_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"])
def test_a_manifest_that_is_not_json_is_refused(tmp_path: Path, make_content: MakeContent, text: str) -> None:
    write_bundle(tmp_path / "bundle", content=make_content())
    (tmp_path / "bundle" / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        read_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_embeddings": np.full((3, 8), np.nan, np.float32)}, "class_embeddings holds NaN"),
        ({"class_embeddings": np.ones((2, 8), np.float32)}, "heads differ in shape"),
        ({"class_embeddings": np.ones((3, 9), np.float32)}, "heads differ in shape"),
        ({"logit_scale": float("inf")}, "logit_scale holds NaN or infinity"),
    ],
)
def test_a_damaged_head_is_never_written(
    tmp_path: Path, make_content: MakeContent, changes: dict, message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        write_bundle(tmp_path / "bundle", content=make_content(**changes))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_without_force(tmp_path: Path, make_content: MakeContent) -> None:
    write_bundle(tmp_path / "bundle", content=make_content())
    with pytest.raises(OutputError, match="--force"):
        write_bundle(tmp_path / "bundle", content=make_content(verdict="clean"))
    assert read_bundle(tmp_path / "bundle").verdict == "backdoored"


def test_force_replaces_a_bundle_and_leaves_nothing_beside_it(
    tmp_path: Path, make_content: MakeContent
) -> None:
    write_bundle(tmp_path / "bundle", content=make_content())
    write_bundle(tmp_path / "bundle", content=make_content(verdict="clean", suspects=()), force=True)
    assert read_bundle(tmp_path / "bundle").verdict == "clean"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_force_never_replaces_what_is_not_a_bundle(tmp_path: Path, make_content: MakeContent) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("four years")
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(home)
    file.write_text("x")
    for path in (home, link, file):
        with pytest.raises(OutputError, match="something else"):
            write_bundle(path, content=make_content(), force=True)
    assert (home / "thesis.txt").read_text() == "four years"


@pytest.mark.parametrize(
    ("code", "fix"),
    [(errno.ENOSPC, "Free some space"), (errno.EACCES, "may write to"), (errno.EIO, "another")],
)
def test_a_failing_disk_leaves_nothing_behind(
    tmp_path: Path, make_content: MakeContent, monkeypatch: pytest.MonkeyPatch, code: int, fix: str
) -> None:
    write_bytes = Path.write_bytes

    def fail(path: Path, data: bytes) -> int:
        if path.name == ENCODER:
            write_bytes(path, data[:10])
            raise OSError(code, os.strerror(code))
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OutputError, match=fix):
        write_bundle(tmp_path / "bundle", content=make_content())
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_replacing_keeps_the_old_bundle(
    tmp_path: Path, make_content: MakeContent, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundle(tmp_path / "bundle", content=make_content())
    rename = Path.rename

    def interrupt(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(tmp_path / "bundle", content=make_content(verdict="clean"), force=True)
    assert read_bundle(tmp_path / "bundle").verdict == "backdoored"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
