"""Graphs that are too large for one file: the same in two, forced here by a tiny limit."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from cbpt_runtime.bench.systems import open_system
from cbpt_runtime.bundle import Bundle, BundleContent, write_bundle
from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.errors import ConfigError, ExportError, RepositoryError
from cbpt_runtime.export import weights
from cbpt_runtime.export.graph import check_exportable, export_onnx
from cbpt_runtime.export.manifest import WEIGHTS, read_repository
from cbpt_runtime.export.onnx import check_portable, read_metadata
from cbpt_runtime.export.precision import to_fp16
from cbpt_runtime.export.profiles import Profile
from cbpt_runtime.export.repository import export_bundle
from cbpt_runtime.export.session import open_session, run_session
from cbpt_runtime.export.verify import verify_repository
from cbpt_runtime.export.written import require_own_files
from cbpt_runtime.models.architecture import build_model
from cbpt_runtime.models.config import check_model_config
from cbpt_runtime.runtime.preprocess import Preprocess
from cbpt_runtime.serving.triton.placement import Placement, lay_out

FOLDER = "shapes_classifier/1"
FAST = ("--scenario", "single-stream", "--duration-s", 0.05, "--warmup-s", 0)

Reseal = Callable[[Path], None]


@pytest.fixture(autouse=True)
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_MAX_FILE_BYTES", 10_000)


@pytest.fixture(scope="module")
def exported(tiny_bundle: Bundle, tiny_image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in two files. Read only: use `copied` to change it."""
    output = tmp_path_factory.mktemp("two-files") / "repository"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "_MAX_FILE_BYTES", 10_000)
        export_bundle(
            tiny_bundle, output, name="shapes", profile=Profile(max_batch=8), calibration=tiny_image_folder
        )
    return output


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "repository"))


def test_the_weights_are_hashed_listed_and_named_by_graph_and_papers(exported: Path) -> None:
    file = exported / FOLDER / WEIGHTS
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["files"][f"{FOLDER}/{WEIGHTS}"] == {
        "sha256": digest,
        "size_bytes": file.stat().st_size,
    }
    model = onnx.load(exported / FOLDER / "model.onnx", load_external_data=False)
    assert read_metadata(model)["cbpt.weights_sha256"] == digest
    assert (exported / FOLDER / "model.onnx").stat().st_size < file.stat().st_size
    papers = (exported / "verdict.intoto.json").read_text()
    assert digest in papers
    assert digest in (exported / "mlbom.cdx.json").read_text()


def test_what_is_written_is_what_was_in_memory(tiny_export, tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(tiny_export.model)
    names = weights.write_graph(model, tmp_path)
    assert names == ["model.onnx", WEIGHTS]
    assert sum((tmp_path / name).stat().st_size for name in names) == weights.size_bytes(model)
    read = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert weights.layout_problems(read, (tmp_path / WEIGHTS).stat().st_size) == []
    assert weights.to_bytes(read) == weights.to_bytes(model)
    check_portable(read)
    weights.read_weights(read, tmp_path / WEIGHTS)
    others = onnx.load(tmp_path / "model.onnx")  # as the onnx package reads it
    for again in (read, others):
        for before, after in zip(model.graph.initializer, again.graph.initializer, strict=True):
            np.testing.assert_array_equal(numpy_helper.to_array(before), numpy_helper.to_array(after))


def test_the_answers_are_those_of_one_file(exported: Path, tiny_export) -> None:
    pixels = tiny_export.images.pixels[:4]
    one = run_session(open_session(tiny_export.model.SerializeToString()), pixels, batch_size=4)
    for graph in (str(exported / FOLDER / "model.onnx"), tiny_export.model):
        two = run_session(open_session(graph), pixels, batch_size=4)
        for name, answer in one.items():
            np.testing.assert_array_equal(two[name], answer)


def test_a_graph_opens_in_a_folder_whose_name_is_no_utf_8(exported: Path, tmp_path: Path) -> None:
    odd = tmp_path / "caf\udce9"
    shutil.copytree(exported / FOLDER, odd)
    open_session(str(odd / "model.onnx"))


def test_verify_accepts_it_also_with_its_bundle(run: Callable, exported: Path, tiny_bundle: Bundle) -> None:
    found = verify_repository(exported, tiny_bundle)
    assert found.graph_note is None  # it was compared with a new export
    assert found.parity is not None
    assert found.foreign == ()
    assert run("verify", exported).code == 0


def test_bench_accepts_repository_and_graph(run: Callable, exported: Path, tiny_image_folder: Path) -> None:
    for source in (exported, exported / FOLDER / "model.onnx"):
        done = run("bench", "run", source, "--images", tiny_image_folder, *FAST, "--classes", 5, "--json")
        assert done.code == 0, done.err


def test_a_server_finds_the_weights_beside_the_graph(exported: Path, tmp_path: Path) -> None:
    placement = Placement(
        config_name=None, backend="python", provider="cpu", instances=1, threads=1, decoders=1, configs={}
    )
    view = lay_out(read_repository(exported), placement, tmp_path)
    assert (view / FOLDER / WEIGHTS).samefile(exported / FOLDER / WEIGHTS)
    open_session(str(view / FOLDER / "model.onnx"))
    assert require_own_files(read_repository(exported)) == []


def test_half_precision_may_need_two_files_or_one(tiny_export, monkeypatch: pytest.MonkeyPatch) -> None:
    model = to_fp16(tiny_export.model)
    weights.seal_weights(model)
    assert "cbpt.weights_sha256" in read_metadata(model)
    monkeypatch.setattr(weights, "_MAX_FILE_BYTES", 10**9)
    assert weights.to_bytes(to_fp16(tiny_export.model)) != weights.to_bytes(model)
    weights.seal_weights(model)
    assert "cbpt.weights_sha256" not in read_metadata(model)
    assert weights.to_bytes(to_fp16(tiny_export.model)) == weights.to_bytes(model)


def test_int8_is_refused_before_the_work(tiny_bundle: Bundle) -> None:
    classifier = BundleClassifier.from_bundle(tiny_bundle)
    check_exportable(classifier.image_encoder.module, precision="fp16")
    with pytest.raises(ExportError, match=r"fit one ONNX file.*--precision fp32 or fp16"):
        export_onnx(classifier, "int8")


# What strangers may do with it -------------------------------------------------------------------------


def first_outside(model: onnx.ModelProto) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if weights.is_outside(tensor))


def put_at(location: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        first_outside(model).external_data[0].value = location
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    return change


def set_entry(key: str, value: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        next(each for each in first_outside(model).external_data if each.key == key).value = value
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    return change


def change_weights(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[:4] = b"\0\0\0\1"
    (folder / WEIGHTS).write_bytes(content)


def cut_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])


def in_a_node(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    node = onnx.helper.make_node("Constant", [], ["stolen"], value=first_outside(model))
    model.graph.node.append(node)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def link_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parents[2] / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parents[2] / "elsewhere")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (put_at("/etc/passwd"), "weights in /etc/passwd"),
        (put_at("../../../../etc/passwd"), r"weights in \.\./\.\./\.\./\.\./etc/passwd"),
        (put_at("missing.bin"), r"weights in missing\.bin"),
        (put_at("./" + WEIGHTS), r"weights in \./model\.onnx\.data"),
        (set_entry("offset", "4096"), "in another place than export writes them"),
        (set_entry("offset", "-4096"), "in another place than export writes them"),
        (set_entry("length", "9" * 30), "in another place than export writes them"),
        (set_entry("length", "ten"), "in another place than export writes them"),
        (change_weights, "other weights in model.onnx.data than it says"),
        (cut_weights, r"\d+ bytes of weights instead of \d+"),
        (in_a_node, "parts of nodes in other files"),
    ],
)
def test_weights_elsewhere_or_others_are_refused(
    run: Callable, copied: Path, resealed: Reseal, change: Callable[[Path], None], named: str
) -> None:
    change(copied / FOLDER)
    resealed(copied)
    with pytest.raises(RepositoryError, match=named):
        require_own_files(read_repository(copied))
    for verb in ("verify", "serve"):
        assert run(verb, copied).code == 2


def test_weights_that_nobody_resealed_were_changed(copied: Path) -> None:
    change_weights(copied / FOLDER)
    with pytest.raises(RepositoryError, match=r"model\.onnx\.data was changed"):
        read_repository(copied)


def test_a_link_is_no_file_of_weights(copied: Path) -> None:
    link_weights(copied / FOLDER)
    with pytest.raises(RepositoryError, match=r"model\.onnx\.data is not a plain file"):
        read_repository(copied)


def test_weights_without_need_are_foreign(
    copied: Path, resealed: Reseal, tiny_export, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_MAX_FILE_BYTES", 10**9)
    model = onnx.ModelProto()
    model.CopyFrom(tiny_export.model)
    weights.seal_weights(model)
    (copied / FOLDER / "model.onnx").write_bytes(weights.to_bytes(model))
    resealed(copied)
    with pytest.raises(RepositoryError, match=r"no weights in model\.onnx\.data"):
        require_own_files(read_repository(copied))


@pytest.mark.parametrize(
    "change",
    [
        put_at("/etc/passwd"),
        put_at("../../../../etc/passwd"),
        put_at(""),
        put_at(".."),
        put_at("missing.bin"),
        change_weights,
        link_weights,
    ],
)
def test_bench_refuses_a_graph_that_reads_other_files(
    run: Callable, copied: Path, tiny_image_folder: Path, change: Callable[[Path], None]
) -> None:
    change(copied / FOLDER)
    done = run("bench", "run", copied / FOLDER / "model.onnx", "--images", tiny_image_folder, *FAST)
    assert done.code == 2
    assert "error: expected" in done.err
    with pytest.raises(ConfigError):
        open_system(str(copied / FOLDER / "model.onnx"))


# Its real size ------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_a_network_of_more_than_2_gib_is_exported_and_verified(
    tiny_configs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Takes 12 GiB of memory and 8 of disk."""
    monkeypatch.undo()
    width, layers = 2048, 12  # 12 · 12 · 2048² numbers
    config = copy.deepcopy(tiny_configs["vit"])
    config["vision_cfg"] |= {"width": width, "layers": layers, "head_width": 64, "patch_size": 32}
    bundle = zero_bundle(config, tmp_path)
    output = tmp_path / "repository"
    export_bundle(bundle, output, name="shapes", profile=Profile(max_batch=1))
    assert (output / FOLDER / WEIGHTS).stat().st_size > 2**31
    assert verify_repository(output).foreign == ()
    assert verify_repository(output, bundle).graph_note is None


def zero_bundle(config: dict[str, Any], folder: Path) -> Bundle:
    """A bundle whose image tower is made of zeros, but for norms and what comes before and behind it."""
    checked = check_model_config(config)
    with torch.device("meta"):
        shapes = build_model(checked).visual.state_dict()
    generator = np.random.default_rng(0)
    encoder = {name: np.zeros(tuple(shape.shape), np.float32) for name, shape in shapes.items()}
    for name in ("conv1.weight", "proj", "ln_pre.weight", "ln_post.weight", "positional_embedding"):
        encoder[name] = generator.standard_normal(encoder[name].shape, dtype=np.float32)
    heads = generator.standard_normal((2, 3, checked["embed_dim"]), dtype=np.float32)
    heads /= np.linalg.norm(heads, axis=2, keepdims=True)
    names = ("red", "green", "blue")
    content = BundleContent(
        verdict="clean",
        model={
            "config": checked,
            "preprocess": Preprocess(image_size=(32, 32)).to_dict(),
            "source": "zeros",
            "sha256": "0" * 64,
        },
        class_names=names,
        templates=(("a photo of a {}.",),) * len(names),
        method={"name": "cbpt", "config": {}, "seed": 0, "parameterization": "prompt"},
        suspects=(),
        class_embeddings=heads[0],
        reference_embeddings=heads[1],
        logit_scale=100.0,
        encoder=encoder,
    )
    return write_bundle(folder / "bundle", content=content)
