"""The one place where a file nobody can vouch for is opened; nothing in it is ever executed.

safetensors holds no code. Pickles go through torch's weights-only unpickler, which knows tensors and plain
containers and refuses everything else. TorchScript archives are programs and are refused before they are
opened.
"""

from __future__ import annotations

import hashlib
import pickletools
import re
import struct
import warnings
import zipfile
from io import BytesIO
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cbpt_runtime.errors import CheckpointError

# Entries of OpenAI's original archives that are settings, not weights.
_SETTINGS = ("input_resolution", "context_length", "vocab_size")
# What DistributedDataParallel and torch.compile put in front of every name.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
# torch.save before 1.6 wrote a magic number, a protocol version and system facts before the content.
_LEGACY_PICKLES = 4
# What the pickle of an ordinary state dict names.
_HARMLESS_GLOBALS = (
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.Size",
    "torch.device",
)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as lower-case hexadecimal.

    Raises:
        CheckpointError: The file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def read_state_dict(path: Path) -> tuple[dict[str, Tensor], str]:
    """Reads named tensors from a safetensors file, a state dict or a training checkpoint.

    The content decides, not the suffix. Prefixes of parallel training are removed; tensors keep their dtype.

    Returns:
        The tensors on the CPU, and the format: 'safetensors', 'torch' or 'training-checkpoint'.

    Raises:
        CheckpointError: Missing, empty, damaged, in no known format, or a file that wants to run code.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(16)
    except OSError as error:
        raise _unreadable(path, error) from error
    if _is_safetensors(head):
        tensors, kind = _read_safetensors(path), "safetensors"
    elif head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        content = _read_pickle(path, is_archive=head[:2] == b"PK")
        tensors, kind = _named_tensors(content, path)
    else:
        if (wanted := _wanted_global(path, is_archive=False)) is not None:
            raise _wants_code(path, wanted)
        raise CheckpointError(
            expected=f"weights as safetensors or a torch state dict in {path}",
            got="an empty file" if not head else "another format, or a damaged file",
            fix="Check that the download is complete and is the weights file itself.",
        )
    _check_dense(tensors, path)
    return _strip_wrappers(tensors), kind


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 2**32


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        # Copied out of the file's memory mapping: the weights must not change when the file does.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            expected=f"a whole safetensors file in {path}",
            got=f"a damaged one ({error})",
            fix="Download or copy the file again and compare its SHA-256 with the publisher's.",
        ) from error


def _read_pickle(path: Path, *, is_archive: bool) -> object:
    if is_archive:
        _check_archive(path)
    try:
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks about pickle protocols
            # A stream, because for a path torch lets the suffix choose the format.
            return torch.load(stream, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a crafted pickle can make the unpickler raise anything
        wanted = _wanted_global(path, is_archive=is_archive)
        if wanted is not None:
            raise _wants_code(path, wanted) from error
        raise _damaged(path, f"{type(error).__name__}: {_last_line(error)}") from error


def _wanted_global(path: Path, *, is_archive: bool) -> str | None:
    """The first name beyond plain tensors that a pickle would import; the pickle is read, not run."""
    try:
        if is_archive:
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                return _scan_globals(BytesIO(archive.read(name)))
        with path.open("rb") as stream:
            found = None
            for _ in range(_LEGACY_PICKLES):
                found = found or _scan_globals(stream)
            return found
    except (OSError, ValueError, KeyError, StopIteration, zipfile.BadZipFile):
        return None


def _scan_globals(stream: IO[bytes]) -> str | None:
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            name = str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
            name = ".".join(strings[-2:])
        else:
            if isinstance(argument, str):
                strings.append(argument)
            continue
        if name not in _HARMLESS_GLOBALS and not re.fullmatch(r"torch\.\w+(Storage|\d+)", name):
            return name
    return None


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _damaged(path, str(error)) from error
    names = [entry.filename for entry in entries]
    if any(name.endswith("constants.pkl") or "/code/" in name for name in names):
        raise CheckpointError(
            expected=f"weights in {path}",
            got="a TorchScript archive, which is a program",
            fix="It was refused and nothing in it was run. Ask the publisher for safetensors.",
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise _damaged(path, "compressed entries, which torch.save never writes")


def _named_tensors(content: object, path: Path) -> tuple[dict[str, Tensor], str]:
    kind = "torch"
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content, kind = content["state_dict"], "training-checkpoint"
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            expected=f"a state dict (names to tensors) in {path}",
            got="nothing" if content == {} else type(content).__name__,
            fix="Save model.state_dict(), best as safetensors.",
        )
    tensors = {name: value for name, value in content.items() if name not in _SETTINGS}
    strangers = [str(name) for name, value in tensors.items() if not _is_named_tensor(name, value)]
    if strangers:
        raise CheckpointError(
            expected=f"a state dict (names to tensors) in {path}",
            got=f"other values under {', '.join(strangers[:5])}",
            fix="Save model.state_dict() alone, or under the key 'state_dict'.",
        )
    return tensors, kind


def _is_named_tensor(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _check_dense(tensors: dict[str, Tensor], path: Path) -> None:
    """Refuses tensors that claim more elements than the file stored: reading them would exhaust memory."""
    for name, tensor in tensors.items():
        dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_complex()
        if not dense or tensor.is_meta or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise _damaged(path, f"{name} is not a dense tensor of real numbers")


def _strip_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for _ in range(len(_WRAPPER_PREFIXES)):
        for prefix in _WRAPPER_PREFIXES:
            if all(name.startswith(prefix) for name in tensors):
                tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _last_line(error: BaseException) -> str:
    lines = [
        line for line in str(error).splitlines() if line.strip() and not line.startswith("Check the doc")
    ]
    return (lines or ["no details"])[-1].strip()[:200]


def _wants_code(path: Path, wanted: str) -> CheckpointError:
    return CheckpointError(
        expected=f"nothing but tensors in {path}",
        got=f"a pickle that wants to run code ({wanted:.80})",
        fix="It was refused and nothing in it was run. Ask the publisher for safetensors.",
    )


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        expected=f"a whole torch state dict in {path}",
        got=f"a damaged one ({reason})",
        fix="Download or copy the file again and compare its SHA-256 with the publisher's.",
    )


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    reason = (error.strerror or type(error).__name__).lower()
    return CheckpointError(
        expected=f"a readable weights file {path}", got=reason, fix="Check the path and its mode."
    )
