"""Graphs that `export` would not have written are refused by name before a runtime sees them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from cbpt_runtime.bench.systems import open_system
from cbpt_runtime.errors import ConfigError, RepositoryError
from cbpt_runtime.export.foreign_graph import foreign_parts
from cbpt_runtime.export.manifest import read_repository
from cbpt_runtime.export.onnx import OPERATORS
from cbpt_runtime.export.precision import find_layers, make_quantiser, to_fp16
from cbpt_runtime.export.verify import verify_repository
from cbpt_runtime.export.weights import to_bytes
from cbpt_runtime.export.written import require_own_files
from cbpt_runtime.serving.config import ServeConfig
from cbpt_runtime.serving.triton.startup import make_plan

GRAPH = "shapes_classifier/1/model.onnx"

Forge = Callable[[onnx.ModelProto], object]
Reseal = Callable[[Path], None]


def use_a_library(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "com.evil"
    model.graph.node[0].op_type = "Run"
    model.opset_import.add(domain="com.evil", version=1)


def define_an_operator(model: onnx.ModelProto) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    sets = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("", "Relu", ["x"], ["y"], [node], sets))


def loop(model: onnx.ModelProto, location: str | None = None) -> None:
    """Run a graph inside a node for ever, with weights at a location."""
    body = helper.make_graph([], "body", [], [], [] if location is None else [weights_at(location)])
    model.graph.node.append(helper.make_node("Loop", ["", ""], [], body=body))


def hide_a_graph(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "MatMul")
    node.attribute.append(helper.make_attribute("body", helper.make_graph([], "body", [], [])))


def answer_by_pixels(model: onnx.ModelProto) -> None:
    """Multiply the probabilities by what one sees in the pixels."""
    node = next(node for node in model.graph.node if "probabilities" in node.output)
    node.output[0] = "before"
    model.graph.node.extend(
        [
            helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMax", ["pixels"], ["brightest"]),
            helper.make_node("Mul", ["before", "brightest"], ["probabilities"]),
        ]
    )


def embed_four_classes(model: onnx.ModelProto) -> None:
    head = next(tensor for tensor in model.graph.initializer if tensor.name == "class_embeddings")
    head.CopyFrom(
        helper.make_tensor(head.name, TensorProto.FLOAT, [head.dims[0], 4], bytes(16 * head.dims[0]), True)
    )


def rename_the_head(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace("class_embeddings", "others")
    for node in model.graph.node:
        node.input[:] = [name.replace("class_embeddings", "others") for name in node.input]


def weights_at(location: str, name: str = "stolen") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    if location:
        tensor.external_data.add(key="location", value=location)
    return tensor


FORGERIES: dict[str, tuple[Forge, str]] = {
    "library": (use_a_library, r"operator com\.evil\.Run"),
    "operator sets": (use_a_library, r"operator sets ai\.onnx 18, com\.evil 1"),
    "a set alone": (
        lambda model: model.opset_import.add(domain="com.microsoft", version=1),
        "com.microsoft 1",
    ),
    "newer set": (lambda model: setattr(model.opset_import[0], "version", 21), r"operator sets ai\.onnx 21"),
    "newer format": (lambda model: setattr(model, "ir_version", 11), "IR version 11"),
    "function": (define_an_operator, "operators of its own: Relu"),
    "loop": (loop, "operator Loop"),
    "random": (
        lambda model: setattr(model.graph.node[0], "op_type", "RandomNormal"),
        "operator RandomNormal",
    ),
    "hidden graph": (hide_a_graph, "a graph or the like inside MatMul"),
    "training": (lambda model: model.training_info.add(), "training steps"),
    "sparse": (lambda model: model.graph.sparse_initializer.add(), "sparse weights"),
    "output": (lambda model: setattr(model.graph.output[0], "name", "scores"), r"outputs scores float"),
    "one output less": (lambda model: model.graph.output.pop(), "outputs logits float.* instead of logits"),
    "input": (lambda model: model.graph.input.add(name="more"), r"inputs images uint8.*, more undefined\[\]"),
    "element type": (
        lambda model: setattr(model.graph.output[3].type.tensor_type, "elem_type", TensorProto.INT32),
        r"alarm_target int32\['batch'\] instead of",
    ),
    "size": (
        lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 64),
        r"images uint8\['batch', 64, 32, 3\] instead of images uint8\['batch', 32, 32, 3\]",
    ),
    "classes of an output": (
        lambda model: setattr(model.graph.output[0].type.tensor_type.shape.dim[1], "dim_value", 4),
        r"logits float\['batch', 4\]",
    ),
    "classes embedded": (embed_four_classes, r"class_embeddings float\[\d+, 4\] instead of .*'dim', 3"),
    "another head": (rename_the_head, "no weights class_embeddings"),
    "pixels": (answer_by_pixels, "answers that do not come out of features alone"),
}


def forged(repository: Path, forge: Forge, reseal: Reseal) -> Path:
    """The repository with its graph changed and its manifest made to fit."""
    model = onnx.load(repository / GRAPH)
    forge(model)
    (repository / GRAPH).write_bytes(to_bytes(model))
    reseal(repository)
    return repository


@pytest.mark.parametrize(("forge", "named"), FORGERIES.values(), ids=FORGERIES)
def test_a_foreign_graph_is_refused_by_name(
    copied_repository: Path, resealed: Reseal, forge: Forge, named: str
) -> None:
    repository = read_repository(forged(copied_repository, forge, resealed))
    with pytest.raises(
        RepositoryError, match=rf"something else in {GRAPH} \(.*{named}.*--allow-foreign-code"
    ):
        require_own_files(repository)
    (let_in,) = require_own_files(repository, allow_foreign_code=True)
    assert let_in.startswith(f"{GRAPH} (")


def test_verify_and_serve_refuse_before_a_runtime_sees_the_graph(
    run: Callable, copied_repository: Path, resealed: Reseal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the graph reached a runtime")

    forged(copied_repository, loop, resealed)
    monkeypatch.setattr("cbpt_runtime.export.verify.open_session", never)
    monkeypatch.setattr("cbpt_runtime.export.verify.check_portable", never)
    for verb in ("verify", "serve"):
        done = run(verb, copied_repository)
        assert done.code == 2
        assert "operator Loop" in " ".join(done.err.split())


@pytest.mark.parametrize(("forge", "named"), FORGERIES.values(), ids=FORGERIES)
def test_bench_refuses_a_foreign_graph_before_a_runtime_sees_it(
    copied_repository: Path, resealed: Reseal, forge: Forge, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the graph reached a runtime")

    monkeypatch.setattr("cbpt_runtime.export.session.open_session", never)
    forged(copied_repository, forge, resealed)
    for source in (copied_repository, copied_repository / GRAPH):
        with pytest.raises(ConfigError, match=named):
            open_system(str(source))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cbpt.class_names", "[" * 100_000),
        ("cbpt.class_names", "7"),
        ("cbpt.preprocess", "[]"),
        ("cbpt.preprocess", "{"),
        ("cbpt.preprocess", None),
    ],
)
def test_bench_says_what_is_wrong_with_what_a_graph_says_of_itself(
    copied_repository: Path, key: str, value: str | None
) -> None:
    model = onnx.load(copied_repository / GRAPH)
    entry = next(entry for entry in model.metadata_props if entry.key == key)
    if value is None:
        model.metadata_props.remove(entry)
    else:
        entry.value = value
    (copied_repository / GRAPH).write_bytes(to_bytes(model))
    with pytest.raises(ConfigError, match=r"preprocessing"):
        open_system(str(copied_repository / GRAPH))


def test_serve_names_what_it_lets_in(copied_repository: Path, resealed: Reseal, tmp_path: Path) -> None:
    forged(copied_repository, loop, resealed)
    missing = tmp_path / "missing"
    with pytest.raises(ConfigError):  # the graph was let in; there is no server
        make_plan(copied_repository, ServeConfig(tritonserver=missing, allow_foreign_code=True))


@pytest.mark.parametrize(
    "location",
    ["/etc/passwd", "../../../../../etc/passwd", "weights.bin", "*/_ORT_MEM_ADDR_/*", "", "./../1/../x"],
)
@pytest.mark.parametrize("where", ["weights", "attribute", "inner graph"])
def test_weights_in_files_outside_the_manifest_are_always_refused(
    copied_repository: Path, resealed: Reseal, location: str, where: str
) -> None:
    def forge(model: onnx.ModelProto) -> None:
        if where == "weights":
            model.graph.initializer.append(weights_at(location))
        elif where == "attribute":
            model.graph.node.append(helper.make_node("Constant", [], ["stolen"], value=weights_at(location)))
        else:
            loop(model, location)

    repository = read_repository(forged(copied_repository, forge, resealed))
    for allowed in (False, True):
        with pytest.raises(
            RepositoryError, match=r"got weights in .*reads other files of the machine"
        ) as caught:
            require_own_files(repository, allow_foreign_code=allowed)
        assert (location or "''") in caught.value.got


def test_weights_in_a_file_of_the_manifest_are_foreign(copied_repository: Path, resealed: Reseal) -> None:
    file = copied_repository / "shapes_classifier" / "1" / "weights.bin"
    file.write_bytes(bytes(16))
    forged(
        copied_repository, lambda model: model.graph.initializer.append(weights_at("weights.bin")), resealed
    )
    repository = read_repository(copied_repository)
    with pytest.raises(RepositoryError, match=r"model\.onnx \(weights in weights\.bin\), .*weights\.bin"):
        require_own_files(repository)
    assert len(require_own_files(repository, allow_foreign_code=True)) == 2


def test_a_link_is_no_file_for_weights(copied_repository: Path, resealed: Reseal) -> None:
    forged(
        copied_repository, lambda model: model.graph.initializer.append(weights_at("weights.bin")), resealed
    )
    manifest = json.loads((copied_repository / "manifest.json").read_text())
    manifest["files"]["shapes_classifier/1/weights.bin"] = manifest["files"]["parity.json"]
    (copied_repository / "manifest.json").write_text(json.dumps(manifest))
    link = copied_repository / "shapes_classifier" / "1" / "weights.bin"
    link.symlink_to(copied_repository / "parity.json")
    with pytest.raises(RepositoryError, match=r"weights\.bin is not a plain file"):
        verify_repository(copied_repository, allow_foreign_code=True)


@pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 100, b"\x3a\x05\x12\x03\x0a\x01\xff"])
def test_what_is_no_graph_is_refused(copied_repository: Path, resealed: Reseal, content: bytes) -> None:
    (copied_repository / GRAPH).write_bytes(content)
    resealed(copied_repository)
    with pytest.raises(RepositoryError):
        require_own_files(read_repository(copied_repository))


def test_the_operators_are_of_the_standard_and_hold_no_graph() -> None:
    for name in OPERATORS:
        attributes = onnx.defs.get_schema(name, 20).attributes.values()
        assert not any("GRAPH" in attribute.type.name for attribute in attributes), name


@pytest.mark.parametrize("precision", ["fp32", "fp16", "fp16 for cuda", "int8"])
def test_what_export_writes_has_no_foreign_parts(tiny_export, precision: str) -> None:
    model = tiny_export.model
    if precision.startswith("fp16"):
        model = to_fp16(model, "cuda" if precision.endswith("cuda") else "cpu")
    elif precision == "int8":
        model = make_quantiser(model, tiny_export.images.pixels[:4])(find_layers(model))
    assert foreign_parts(model, image_size=(32, 32), classes=3) == []
