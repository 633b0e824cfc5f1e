"""What `export` would not have written into the ONNX graph of a repository that a stranger made.

A graph is data, but a runtime does what it says: it may name operators of libraries, run graphs inside
graphs, or read its weights out of any file. Nothing here runs it or follows a path in it. Needs neither torch
nor onnxruntime.

Without the bundle nothing can be said about the weights. What can be: all answers come out of the features,
and the embedded heads have the size of the class list. `verify --bundle` says the rest.
"""

from __future__ import annotations

import stat
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import onnx
from google.protobuf.message import DecodeError, Message
from onnx import TensorProto

from cbpt_runtime.artifacts import ListedFile, hash_files, read_regular_file
from cbpt_runtime.errors import ConfigError, RepositoryError
from cbpt_runtime.export.manifest import WEIGHTS, Repository
from cbpt_runtime.export.onnx import (
    FEATURES,
    INPUT,
    foreign_operators,
    format_problems,
    read_metadata,
)
from cbpt_runtime.export.weights import WEIGHTS_SHA256, is_outside, layout_problems
from cbpt_runtime.runtime.prediction import OUTPUTS

MAX_GRAPH_BYTES = 2**31  # what protobuf can hold
_HEADS = ("class_embeddings", "reference_embeddings")
_MOST_NAMED = 5
_REMAKE = "Export the bundle again with `cbpt-runtime export`."


def foreign_graph_parts(repository: Repository, *, image_size: tuple[int, int], classes: int) -> list[str]:
    """Return what in the graph of a repository the installed version would not have written.

    Args:
        repository: Its files were hashed.
        image_size: Height and width of its pixels.
        classes: How many it tells apart.

    Raises:
        RepositoryError: It is no graph, or a runtime would read files that the manifest does not list.
    """
    try:
        model = onnx.load_model_from_string(read_regular_file(repository.graph, max_bytes=MAX_GRAPH_BYTES))
        locations = external_locations(model)
        weights = repository.weights
        parts = foreign_parts(model, image_size=image_size, classes=classes, weights=weights)
    except (OSError, DecodeError, ValueError, RecursionError) as error:
        raise RepositoryError(
            expected=f"an ONNX graph in {repository.graph}", got=f"{error}" or "nothing", fix=_REMAKE
        ) from error
    folder = repository.graph.parent.relative_to(repository.path).as_posix()
    outside = [each for each in locations if not _is_listed(each, folder, repository.manifest.files)]
    if outside:
        raise RepositoryError(
            expected=f"all weights of {repository.graph} in files of the repository's manifest",
            got=f"weights in {_some(outside)}",
            fix="Do not serve this repository: it reads other files of the machine. Export the bundle again.",
        )
    return parts


def foreign_parts(
    model: onnx.ModelProto,
    *,
    image_size: tuple[int, int],
    classes: int,
    weights: ListedFile | None = None,
) -> list[str]:
    """As `foreign_graph_parts`, of a graph that is loaded, and of what the manifest says of `WEIGHTS`."""
    images = [(INPUT, int(TensorProto.UINT8), ["batch", *image_size, 3])]
    return [
        *_foreign_format(model),
        *_foreign_operators(model.graph.node),
        *_foreign_weights(model, weights),
        *_foreign_values("inputs", model.graph.input, images),
        *_foreign_values("outputs", model.graph.output, _outputs(classes)),
        *_foreign_heads(model.graph, classes),
    ]


def require_own_graph(
    model: onnx.ModelProto, path: Path, *, image_size: tuple[int, int], classes: int
) -> None:
    """Refuse a graph without a repository that does more than `export`'s, or reads any file of the machine.

    Args:
        model: As it was read from its file.
        path: Of that file.
        image_size: Height and width of its pixels, as it says.
        classes: How many it tells apart, as it says.

    Raises:
        ConfigError: Weights lie elsewhere than in plain files of the graph's own folder, or the installed
            version would not have written all of it.
    """
    locations = external_locations(model)
    bad = [each for each in locations if not _is_plain_file_of(path.parent, each)]
    if bad:
        raise ConfigError(
            expected=f"all weights of {path} in it or in plain files beside it",
            got=f"weights in {_some(bad)}",
            fix="Do not use this graph if you do not know it: it reads other files. Export the bundle again.",
        )
    weights = hash_files(path.parent, [WEIGHTS])[WEIGHTS] if WEIGHTS in locations else None
    if parts := foreign_parts(model, image_size=image_size, classes=classes, weights=weights):
        raise ConfigError(
            expected=f"a graph in {path} that this version of `cbpt-runtime export` would have written",
            got="; ".join(parts),
            fix="Do not use this graph if you do not know it. Export the bundle again.",
        )


def external_locations(model: onnx.ModelProto) -> list[str]:
    """Files that hold weights of a graph, as it says; ``''`` where it does not say which."""
    found = set()
    for tensor in _tensors(model):
        if is_outside(tensor):
            named = [entry.value for entry in tensor.external_data if entry.key == "location"]
            found.update(named or [""])
    return sorted(found)


def _is_plain_file_of(folder: Path, location: str) -> bool:
    parts = PurePosixPath(location).parts
    file = folder / location
    try:
        return len(parts) == 1 and parts[0] != ".." and stat.S_ISREG(file.lstat().st_mode)
    except (OSError, ValueError):
        return False


def _is_listed(location: str, folder: str, files: Collection[str]) -> bool:
    """Whether a location is a file of the manifest: hashed, regular, no link, inside the repository."""
    path = PurePosixPath(location)
    return not path.is_absolute() and ".." not in path.parts and f"{folder}/{path.as_posix()}" in files


def _foreign_weights(model: onnx.ModelProto, file: ListedFile | None) -> Iterator[str]:
    """Weights outside the graph that are not where, or not what, `export` would have written."""
    elsewhere = [name for name in external_locations(model) if name != WEIGHTS]
    yield from (f"weights in {name}" for name in elsewhere[:_MOST_NAMED])
    outside = sum(is_outside(tensor) for tensor in _tensors(model))
    if outside != sum(is_outside(tensor) for tensor in model.graph.initializer):
        yield "parts of nodes in other files"
    elif not elsewhere:
        yield from layout_problems(model, None if file is None else file.size_bytes)
    stated = read_metadata(model).get(WEIGHTS_SHA256)
    if stated != (None if file is None else file.sha256):
        yield f"other weights in {WEIGHTS} than it says"


def _tensors(message: Message) -> Iterator[TensorProto]:
    """All tensors of a message, in weights, attributes, graphs inside graphs, functions and anywhere else."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in [value] if isinstance(value, Message) else value:
            if isinstance(part, TensorProto):
                yield part
            else:
                yield from _tensors(part)


def _foreign_format(model: onnx.ModelProto) -> Iterator[str]:
    yield from format_problems(model)
    if model.functions:
        yield f"operators of its own: {_some([function.name for function in model.functions])}"
    if model.training_info:
        yield "training steps"
    if model.graph.sparse_initializer:
        yield "sparse weights"


def _foreign_operators(nodes: Sequence[onnx.NodeProto]) -> Iterator[str]:
    foreign = foreign_operators(nodes)
    if foreign:
        yield f"operator {_some(foreign)}"
    kinds = {"g", "graphs", "ref_attr_name", "sparse_tensor", "sparse_tensors", "tp", "type_protos"}
    odd = {
        str(node.op_type)
        for node in nodes
        for attribute in node.attribute
        if kinds & {field.name for field, _ in attribute.ListFields()}
    }
    if hidden := sorted(odd.difference(foreign)):
        yield f"a graph or the like inside {_some(hidden)}"


def _outputs(classes: int) -> list[tuple[str, int, list[Any]]]:
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT64)
    shapes: tuple[list[Any], ...] = (["batch", classes], ["batch", classes], ["batch"], ["batch"])
    return list(zip(OUTPUTS, kinds, shapes, strict=True))


def _foreign_values(
    what: str, values: Sequence[onnx.ValueInfoProto], expected: list[tuple[str, int, list[Any]]]
) -> Iterator[str]:
    got = [_declared(value) for value in values]
    if got != expected:
        named, wanted = (_some([_text(value) for value in each]) for each in (got, expected))
        yield f"{what} {named} instead of {wanted}"


def _declared(value: onnx.ValueInfoProto) -> tuple[str, int, list[Any]]:
    """Name, element type and sizes; a type of 0 for what is no tensor."""
    if value.type.WhichOneof("value") != "tensor_type":
        return str(value.name), TensorProto.UNDEFINED, []
    tensor = value.type.tensor_type
    sizes = [
        size.dim_param or (size.dim_value if size.HasField("dim_value") else "?") for size in tensor.shape.dim
    ]
    return str(value.name), int(tensor.elem_type), sizes


def _text(value: tuple[str, int, list[Any]]) -> str:
    name, kind, sizes = value
    known = kind in TensorProto.DataType.values()
    return f"{name} {TensorProto.DataType.Name(kind).lower() if known else kind}{sizes}"


def _foreign_heads(graph: onnx.GraphProto, classes: int) -> Iterator[str]:
    """Whether all answers come out of the features, through the embeddings of as many classes."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    reached = _reached_from_answers(graph)
    if INPUT in reached or FEATURES not in reached:
        yield f"answers that do not come out of {FEATURES} alone"
    for name in _HEADS:
        tensor = weights.get(name)
        if tensor is None:
            if name in reached or name == _HEADS[0]:
                yield f"no weights {name}"
        elif len(tensor.dims) != 2 or tensor.dims[1] != classes or tensor.data_type != TensorProto.FLOAT:
            got = _text((name, tensor.data_type, list(tensor.dims)))
            yield f"{got} instead of {name} float['dim', {classes}]"
    if _HEADS[0] in weights and _HEADS[0] not in reached:
        yield f"answers without {_HEADS[0]}"


def _reached_from_answers(graph: onnx.GraphProto) -> set[str]:
    """Tensors the answers are computed from, not looking behind the features; sizes do not count."""
    makers = {name: node for node in graph.node for name in node.output}
    waiting, reached = list(OUTPUTS), set[str]()
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        node = None if name == FEATURES else makers.get(name)
        if node is not None and node.op_type != "Shape":
            waiting.extend(node.input)
    return reached


def _some(names: Sequence[str]) -> str:
    """Return the first few names, each cut to a length that can be read."""
    few = ", ".join(f"{name:.80}" or "''" for name in names[:_MOST_NAMED])
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"{few}{more}" or "none"
