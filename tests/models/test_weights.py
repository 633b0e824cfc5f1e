from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models.weights import file_digest, read_weights

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1.0, 2.0])}


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def test_safetensors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"  # the content decides, not the suffix
    save_file(TENSORS, path)
    weights = read_weights(path)
    assert weights.format == "safetensors"
    assert same(dict(sorted(weights.tensors.items())), dict(sorted(TENSORS.items())))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("container", [dict, OrderedDict])
def test_torch_state_dicts_are_read_in_both_file_formats(
    tmp_path: Path, zipped: bool, container: type[dict[str, Tensor]]
) -> None:
    path = tmp_path / "weights.safetensors"  # the content decides, not the suffix
    torch.save(container(TENSORS), path, _use_new_zipfile_serialization=zipped)
    weights = read_weights(path)
    assert weights.format == "torch"
    assert same(weights.tensors, TENSORS)
    assert weights.notes == ()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_training_checkpoints_lose_the_wrappers_of_their_names(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "epoch_3.pt"
    wrapped = {prefix + name: value for name, value in TENSORS.items()}
    torch.save(
        {"epoch": 3, "name": "run", "state_dict": wrapped, "optimizer": {"state": {}, "lr": 0.1}}, path
    )
    weights = read_weights(path)
    assert weights.format == "training-checkpoint"
    assert same(weights.tensors, TENSORS)


def test_a_prefix_that_only_some_names_have_stays(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, path)
    assert list(read_weights(path).tensors) == ["module.a", "b"]


def test_parameters_half_precision_and_integers_are_kept_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    saved = {
        "parameter": nn.Parameter(torch.ones(2)),
        "half": torch.ones(2, dtype=torch.float16),
        "brain": torch.ones(2, dtype=torch.bfloat16),
        "counter": torch.tensor(3),
        "slice": torch.ones(4, 4)[1:3],
    }
    torch.save(saved, path)
    tensors = read_weights(path).tensors
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "parameter": torch.float32,
        "half": torch.float16,
        "brain": torch.bfloat16,
        "counter": torch.int64,
        "slice": torch.float32,
    }


def test_openais_settings_among_the_weights_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    extra = {"input_resolution": torch.tensor(224), "context_length": torch.tensor(77), "vocab_size": 49408}
    torch.save({**TENSORS, **extra}, path)
    assert same(read_weights(path).tensors, TENSORS)


# Files that want to run code ----------------------------------------------------------------------


def zipped(payload: object, path: Path) -> None:
    torch.save({"a": payload}, path)


def legacy(payload: object, path: Path) -> None:
    torch.save({"a": payload}, path, _use_new_zipfile_serialization=False)


def zipped_protocol_4(payload: object, path: Path) -> None:
    torch.save({"a": payload}, path, pickle_protocol=4)


def raw(protocol: int) -> Callable[[object, Path], None]:
    def write(payload: object, path: Path) -> None:
        path.write_bytes(pickle.dumps({"a": payload}, protocol=protocol))

    return write


WRITERS = {
    "zipped": zipped,
    "legacy": legacy,
    "zipped, protocol 4": zipped_protocol_4,
    **{f"raw, protocol {protocol}": raw(protocol) for protocol in range(6)},
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not_run(tmp_path: Path, writer: str) -> None:
    path, marker = tmp_path / "weights.pt", tmp_path / "it-ran"
    WRITERS[writer](Payload(marker), path)
    with pytest.raises(
        CheckpointError, match=r"a pickle that wants to run code \(posix\.system\).*nothing.*run"
    ):
        read_weights(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))  # the payload does work where pickles are trusted
    assert marker.exists()


def test_metadata_beside_the_weights_is_left_out_and_named(tmp_path: Path) -> None:
    path = tmp_path / "epoch_3.pt"
    optimizer = {"state": {}, "param_groups": [{"lr": np.float64(0.1)}]}
    wrapped = {f"module.{name}": value for name, value in TENSORS.items()}
    content = {"epoch": 3, "state_dict": wrapped, "optimizer": optimizer, "args": argparse.Namespace(lr=1)}
    torch.save(content, path)
    weights = read_weights(path)
    assert same(weights.tensors, TENSORS)
    taken, beside, left_out, prefix = weights.notes
    assert taken == "weights read from state_dict"
    assert beside == "not used, beside them: epoch, optimizer, args"
    assert left_out.startswith("left out, and nothing of them run: objects of numpy.")
    assert left_out.endswith("multiarray.scalar, argparse.Namespace")
    assert prefix == "prefix module. removed from every name"


def test_a_model_saved_as_an_object_gives_its_weights_alone(tmp_path: Path) -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 3)
            self.norm = nn.BatchNorm1d(3)
            self.register_buffer("computed", torch.ones(1), persistent=False)

    module, path = Buffered(), tmp_path / "weights.pt"
    Buffered.__qualname__ = "Buffered"  # as if it stood in a module of its own
    globals()["Buffered"] = Buffered
    torch.save({"epoch": 3, "model": module}, path)
    weights = read_weights(path)
    assert weights.format == "torch-module"
    assert same(dict(sorted(weights.tensors.items())), dict(sorted(module.state_dict().items())))
    assert weights.notes == (
        "a model saved as an object: only its weights were read",
        "weights read from model",
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_archives_give_their_weights_and_no_code_is_run(tmp_path: Path) -> None:
    path, module = tmp_path / "weights.pt", nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    torch.jit.save(torch.jit.trace(module, torch.ones(1, 2)), path)  # type: ignore[no-untyped-call]
    weights = read_weights(path)
    assert weights.format == "torchscript"
    assert same(weights.tensors, dict(module.state_dict()))
    assert weights.notes == ("a TorchScript program: only its weights were read, its code was not looked at",)


# Damaged and crafted files ------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.pt; got no such file"):
        read_weights(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="got no such file"):
        file_digest(tmp_path / "absent.pt")


def test_a_file_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match="got permission denied"):
        read_weights(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "another format"),
        (b"<html>not found</html>", "another format"),
        (b"\x80\x04garbage", "a damaged one"),
        (b"\x80\x02}q\x00.", "a state dict|a damaged one"),
        (b"PK\x03\x04" + b"\0" * 100, "a damaged one"),
        ((50).to_bytes(8, "little") + b'{"a": 1}', "a damaged one"),
        ((2**31).to_bytes(8, "little") + b'{"a": 1}', "a damaged one"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "weights"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_weights(path)


@pytest.mark.parametrize("kind", ["safetensors", "zipped", "legacy"])
@given(place=st.floats(0, 1), content=st.binary(max_size=40), truncate=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_damage_gives_a_checkpoint_error_or_tensors(
    tmp_path_factory: pytest.TempPathFactory, kind: str, place: float, content: bytes, truncate: bool
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "weights"
    if kind == "safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=kind == "zipped")
    data = bytearray(path.read_bytes())
    index = int(place * len(data))
    data[index : len(data) if truncate else index + len(content)] = content
    path.write_bytes(bytes(data))
    with suppress(CheckpointError):
        tensors = read_weights(path).tensors
        assert all(isinstance(tensor, Tensor) for tensor in tensors.values())


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(1).expand(10**12)}, path)
    assert path.stat().st_size < 10_000
    with pytest.raises(CheckpointError, match="a is not a dense tensor"):
        read_weights(path)


@pytest.mark.parametrize(
    "tensor", [torch.eye(2).to_sparse(), torch.zeros(2, dtype=torch.complex64), torch.empty(2, device="meta")]
)
def test_tensors_that_are_no_dense_real_numbers_are_refused(tmp_path: Path, tensor: Tensor) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"a": tensor}, path)
    with pytest.raises(CheckpointError, match="a is not a dense tensor"):
        read_weights(path)


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    path, packed = tmp_path / "weights.pt", tmp_path / "packed.pt"
    torch.save({"a": torch.zeros(1_000_000)}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert packed.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match=r"compressed entries, which torch\.save never writes"):
        read_weights(packed)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ({}, "got nothing"),
        ([torch.ones(1)], "got list"),
        (torch.ones(1), "got Tensor"),
        ({"state_dict": {}}, "no tensors, but state_dict"),
    ],
)
def test_torch_files_without_named_tensors_are_refused(tmp_path: Path, content: object, got: str) -> None:
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=got):
        read_weights(path)


def test_other_values_among_the_tensors_are_left_out_and_listed(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    content: dict[object, object] = {"a": torch.ones(1), "epoch": 3, 7: torch.ones(1)}
    torch.save(content, path)
    weights = read_weights(path)
    assert same(weights.tensors, {"a": torch.ones(1)})
    assert weights.notes == ("left out, because they are no tensors: epoch, 7",)


def test_tensors_that_share_their_numbers_grow_no_larger_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    shared = torch.zeros(100_000)
    torch.save({f"layer.{index}": shared[:] for index in range(1000)}, path)
    assert path.stat().st_size < 2_000_000
    with pytest.raises(CheckpointError, match=r"tensors of more than the [\d,]+ bytes of the file"):
        read_weights(path)


def test_the_digest_is_the_files_sha256(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    assert file_digest(path) == hashlib.sha256(b"abc").hexdigest()
