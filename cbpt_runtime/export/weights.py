"""Weights in a file of their own, beside a graph that is too large for one file. Needs no torch.

A protobuf message ends at 2 GiB. What is larger becomes two files: `model.onnx`, and `model.onnx.data` with
the large weights one after the other, in the order of the graph, each on a page of its own. The graph says in
its metadata which SHA-256 the second file has, so that a digest of the graph stands for both.

In memory a graph always holds its weights, or says of each where in the file it lies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, Protocol

import onnx
from onnx import TensorProto

from cbpt_runtime.artifacts import writing
from cbpt_runtime.export.manifest import WEIGHTS

GRAPH: Final = "model.onnx"
WEIGHTS_SHA256: Final = "cbpt.weights_sha256"
MAX_WEIGHT_BYTES: Final = 2**31 - 2**24
"""Of one weight: in memory it is part of a message, too."""

_MAX_FILE_BYTES = 2**31 - 2**24  # some room for the graph itself; tests set a tiny one
_SMALLEST_BYTES = 1024  # runtimes read smaller ones to tell the shapes of others
_PAGE_BYTES = 4096


class _Sink(Protocol):
    """Where bytes go: a file, or a hash through `_Hash`."""

    def write(self, data: bytes, /) -> object: ...


class _Hash:
    def __init__(self) -> None:
        self.digest = sha256()

    def write(self, data: bytes, /) -> None:
        self.digest.update(data)


def is_outside(tensor: TensorProto) -> bool:
    """Whether the numbers of a tensor lie in another file, as it says."""
    return tensor.data_location == TensorProto.EXTERNAL or bool(tensor.external_data)


def needs_two_files(model: onnx.ModelProto) -> bool:
    """Whether a graph with its weights in memory is too large for one file."""
    return fills_two_files(sum(len(tensor.raw_data) for tensor in model.graph.initializer))


def fills_two_files(size_bytes: int) -> bool:
    """Whether weights of this size need a file of their own."""
    return size_bytes > _MAX_FILE_BYTES


def seal_weights(model: onnx.ModelProto) -> None:
    """Write into the metadata of a graph which SHA-256 the file of its weights will have, if it needs one."""
    kept = [entry for entry in model.metadata_props if entry.key != WEIGHTS_SHA256]
    del model.metadata_props[:]
    if needs_two_files(model):
        hashed = _Hash()
        _write_weights(_large(model), hashed)
        kept.append(onnx.StringStringEntryProto(key=WEIGHTS_SHA256, value=hashed.digest.hexdigest()))
    model.metadata_props.extend(sorted(kept, key=lambda entry: str(entry.key)))


def to_bytes(model: onnx.ModelProto) -> bytes:
    """Content of the file of a graph; equal models give equal bytes, and other weights other bytes."""
    if needs_two_files(model):
        model = _with_weights_outside(model)
    return bytes(model.SerializeToString(deterministic=True))


def size_bytes(model: onnx.ModelProto) -> int:
    """Size of the files of a graph."""
    if not needs_two_files(model):
        return len(to_bytes(model))
    sizes = [len(tensor.raw_data) for tensor in _large(model)]
    return len(to_bytes(model)) + sum(map(_next_page, sizes[:-1])) + sizes[-1]


def write_graph(model: onnx.ModelProto, folder: Path) -> list[str]:
    """Write a graph into a folder.

    Returns:
        Names of its files; the graph is the first.
    """
    (folder / GRAPH).write_bytes(to_bytes(model))
    if not needs_two_files(model):
        return [GRAPH]
    with (folder / WEIGHTS).open("wb") as stream:
        _write_weights(_large(model), stream)
    return [GRAPH, WEIGHTS]


@contextmanager
def written(model: onnx.ModelProto) -> Iterator[bytes | str]:
    """Give a graph as runtimes take it: its bytes, or the path of files that go when the block ends.

    Raises:
        OutputError: There is no room for the files.
    """
    if not needs_two_files(model):
        yield to_bytes(model)
        return
    with TemporaryDirectory(prefix="cbpt-graph-") as name:
        with writing(Path(name)):
            write_graph(model, Path(name))
        yield str(Path(name, GRAPH))


def read_weights(model: onnx.ModelProto, file: Path) -> None:
    """Put weights that lie in a file back into their graph, which `layout_problems` found good.

    Raises:
        OSError: The file cannot be read.
        ValueError: It ends too early.
    """
    outside = [tensor for tensor in model.graph.initializer if is_outside(tensor)]
    if not outside:
        return
    with file.open("rb") as stream:
        for tensor in outside:
            place = {entry.key: entry.value for entry in tensor.external_data}
            stream.seek(int(place["offset"]))
            content = stream.read(int(place["length"]))
            if len(content) != int(place["length"]):
                raise ValueError(f"weights of {tensor.name} that end too early")
            tensor.raw_data = content
            tensor.ClearField("data_location")
            del tensor.external_data[:]


def infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy with the shapes of the tensors in it, as `onnx.shape_inference`, whatever the size."""
    if not needs_two_files(model):
        return onnx.shape_inference.infer_shapes(model)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    copy.graph.value_info.extend(onnx.shape_inference.infer_shapes(without_weights(model)).graph.value_info)
    return copy


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a graph so that checkers can take it: its large weights become inputs of the same shape."""
    copy = _copy_without_weights(model)
    for tensor in model.graph.initializer:
        if is_outside(tensor) or len(tensor.raw_data) >= _SMALLEST_BYTES:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            copy.graph.input.append(value)
        else:
            copy.graph.initializer.add().CopyFrom(tensor)
    return copy


def layout_problems(model: onnx.ModelProto, size_bytes: int | None) -> list[str]:
    """Return what of the weights outside a graph `write_graph` would have put elsewhere.

    Args:
        model: A graph as it was read from its file; all tensors outside it are among its initializers.
        size_bytes: Of the file with its weights; None where there is none.
    """
    outside = [tensor for tensor in model.graph.initializer if is_outside(tensor)]
    if not outside:
        return [] if size_bytes is None else [f"no weights in {WEIGHTS}"]
    problems, end = [], 0
    for tensor in outside:
        length = _stated_bytes(tensor)
        offset = _next_page(end)
        end = offset + length
        if (
            length < _SMALLEST_BYTES
            or length > MAX_WEIGHT_BYTES
            or tensor.raw_data
            or _entries(tensor) != (_place(offset, length))
        ):
            problems.append(f"weights {tensor.name:.80} in another place than export writes them")
            break  # all behind it move along
    if not problems and end != size_bytes:
        problems.append(f"{size_bytes or 0} bytes of weights instead of {end}")
    return problems


def _large(model: onnx.ModelProto) -> list[TensorProto]:
    return [tensor for tensor in model.graph.initializer if len(tensor.raw_data) >= _SMALLEST_BYTES]


def _write_weights(tensors: Sequence[TensorProto], sink: _Sink) -> None:
    end = 0
    for tensor in tensors:
        offset = _next_page(end)
        sink.write(bytes(offset - end))
        sink.write(tensor.raw_data)
        end = offset + len(tensor.raw_data)


def _with_weights_outside(model: onnx.ModelProto) -> onnx.ModelProto:
    copy, end = _copy_without_weights(model), 0
    for tensor in model.graph.initializer:
        length = len(tensor.raw_data)
        if length < _SMALLEST_BYTES:
            copy.graph.initializer.add().CopyFrom(tensor)
            continue
        offset = _next_page(end)
        end = offset + length
        moved = copy.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        moved.data_location = TensorProto.EXTERNAL
        for key, value in _place(offset, length):
            moved.external_data.add(key=key, value=value)
    return copy


def _copy_without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of everything but the initializers, which are never copied on the way."""
    copy = onnx.ModelProto()
    for source, target, left_out in (
        (model, copy, "graph"),
        (model.graph, copy.graph, "initializer"),
    ):
        for field, value in source.ListFields():
            if field.name == left_out:
                continue
            if isinstance(value, str | bytes | int | float):
                setattr(target, field.name, value)
            else:
                getattr(target, field.name).MergeFrom(value)
    return copy


def _stated_bytes(tensor: TensorProto) -> int:
    try:
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    except (KeyError, TypeError, ValueError):
        return -1
    return int(math.prod(tensor.dims) * kind.itemsize)


def _place(offset: int, length: int) -> list[tuple[str, str]]:
    return [("location", WEIGHTS), ("offset", str(offset)), ("length", str(length))]


def _entries(tensor: TensorProto) -> list[tuple[str, str]]:
    return [(str(entry.key), str(entry.value)) for entry in tensor.external_data]


def _next_page(end: int) -> int:
    return (end + _PAGE_BYTES - 1) // _PAGE_BYTES * _PAGE_BYTES
