"""The one place where a file nobody can vouch for is opened; nothing in it is ever executed.

safetensors holds no code. Everything torch writes goes through a reader of our own, which takes tensors and
makes inert placeholders of the rest; a pickle that calls anything but data is refused by that name.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cbpt_runtime.artifacts.names import name_bytes, utf8_path
from cbpt_runtime.errors import CheckpointError
from cbpt_runtime.models.pickle_values import ForbiddenCallError, Inert, PickleFormatError, TensorReference
from cbpt_runtime.models.state_dicts import (
    UNUSUAL,
    StateDict,
    find_state_dicts,
    kind_of_stranger,
    mapping_of,
)
from cbpt_runtime.models.torch_files import NotDenseError, TorchFile, open_archive, open_sequence

# Entries of OpenAI's original archives that are settings, not weights.
_SETTINGS = ("input_resolution", "context_length", "vocab_size")
# What parallel training, compilers and training frameworks put in front of every name.
_WRAPPER_PREFIXES = (
    "module.",
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "model.",
    "clip.",
    "clip_model.",
    "net.",
)
_MAX_WRAPPERS = 8
_NAMED_AT_MOST = 5
_LISTED_AT_MOST = 20  # of what a file holds beside its weights: enough for any trainer's
_NAME_LENGTH = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Named tensors and what is known about the file they came from.

    Attributes:
        tensors: On the CPU, in the dtype of the file.
        format: 'safetensors', 'torch', 'training-checkpoint', 'torch-module' (a whole model saved as an
            object) or 'torchscript'.
        notes: What was adapted or left out.
        is_openai: Whether the file has the marks of the weights OpenAI published.
    """

    tensors: dict[str, Tensor]
    format: str
    notes: tuple[str, ...] = ()
    is_openai: bool = False


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


def files_digest(paths: Sequence[Path]) -> str:
    """SHA-256 of a file; of several, of the lines `digest  name` that sha256sum writes for them."""
    if len(paths) == 1:
        return file_digest(paths[0])
    lines = "".join(f"{file_digest(path)}  {path.name}\n" for path in paths)
    return hashlib.sha256(name_bytes(lines)).hexdigest()


def read_weights(*paths: Path, name: str | None = None) -> Weights:
    """Read named tensors from a safetensors file or anything `torch.save` and `torch.jit.save` wrote.

    The content decides, not the suffix. Prefixes of training frameworks are removed; tensors keep their
    dtype.

    Args:
        paths: The file, or its shards.
        name: Which of several sets of weights to take, such as 'ema'; the likeliest by default.

    Raises:
        CheckpointError: Missing, empty, damaged, in no known format, without weights, or a file that wants to
            run code.
    """
    parts = [_read_file(path, name) for path in paths]
    tensors = {key: value for part in parts for key, value in part.tensors.items()}
    if len(tensors) != sum(len(part.tensors) for part in parts):
        raise _damaged(paths[0], "shards that hold weights of the same name")
    if not tensors:
        raise _no_weights(paths[0], "nothing")
    if any("lora_" in key for key in tensors):
        raise _no_weights(paths[0], "an adapter (LoRA), which only changes another model's weights")
    tensors, prefix = _strip_wrappers(tensors)
    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    if prefix:
        notes += (f"prefix {prefix} removed from every name",)
    return replace(parts[0], tensors=tensors, notes=notes)


def _read_file(path: Path, name: str | None) -> Weights:
    try:
        with path.open("rb") as stream:
            head = stream.read(16)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not _is_safetensors(head):
        return _read_torch(path, head, name)
    if name is not None:
        raise CheckpointError(
            expected=f"one set of weights in {path}, as safetensors files have",
            got=f"the wish for #{name:.60}",
            fix=f"Leave #{name:.60} out.",
        )
    return Weights(tensors=_read_safetensors(path), format="safetensors")


def first_few(names: Sequence[str], *, most: int = _NAMED_AT_MOST) -> str:
    """Return the first names, five by default, and how many more there are."""
    more = len(names) - most
    listed = ", ".join(name[:_NAME_LENGTH] for name in names[:most])
    return listed + (f" and {more} more" if more > 0 else "")


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 2**32


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        # Copied out of the file's memory mapping: the weights must not change when the file does.
        with utf8_path(path) as name:
            return {name: tensor.clone() for name, tensor in load_file(name).items()}
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            expected=f"a whole safetensors file in {path}",
            got=f"a damaged one ({error})",
            fix="Download or copy the file again and compare its SHA-256 with the publisher's.",
        ) from error


def _read_torch(path: Path, head: bytes, name: str | None) -> Weights:
    is_archive = head[:4] == b"PK\x03\x04"
    try:
        file = open_archive(path) if is_archive else open_sequence(path)
        found = find_state_dicts(file.content)
        chosen = _chosen(found, file, name)
        tensors = {key: _read(file, key, chosen) for key in chosen.tensors if key not in _SETTINGS}
    except ForbiddenCallError as error:
        raise _wants_code(path, error.name) from error
    except PickleFormatError as error:
        if not is_archive and head[:1] != b"\x80":
            raise _other_format(path, head) from error
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if not tensors:
        raise _no_weights(path, "nothing")
    return Weights(
        tensors=tensors,
        format=_format(file, chosen),
        notes=_selection_notes(file, found, chosen),
        is_openai=len(set(_SETTINGS) & {*chosen.tensors, *chosen.others}) > 1,
    )


def _chosen(found: list[StateDict], file: TorchFile, name: str | None) -> StateDict:
    if name is not None:
        for state in found:
            if state.name == name:
                return state
        raise CheckpointError(
            expected=f"weights called {name:.60} in {file.path}",
            got=first_few([state.name for state in found if state.name]) or "only weights without a name",
            fix="Choose one of them, or leave the #name out.",
        )
    if not found:
        raise _no_weights(file.path, kind_of_stranger(file.content, file.skipped) or _described(file.content))
    plain = [state for state in found if state.name and not state.is_averaged]
    if found[0] in plain and found[0].rank == UNUSUAL and len(plain) > 1:
        raise CheckpointError(
            expected=f"one set of weights in {file.path}",
            got=f"several: {first_few([state.name for state in found])}",
            fix=f"Name one behind the path: {file.path.name}#{found[0].name}",
        )
    return found[0]


def _read(file: TorchFile, key: str, state: StateDict) -> Tensor:
    try:
        return file.read(state.tensors[key])
    except NotDenseError as error:
        kind = f" ({error!s:.80})" if str(error) else ""
        raise _damaged(file.path, f"{key:.80} is not a dense tensor of real numbers{kind}") from error


def _format(file: TorchFile, chosen: StateDict) -> str:
    if file.is_program:
        return "torchscript"
    if chosen.is_module:
        return "torch-module"
    return "training-checkpoint" if chosen.name else "torch"


def _selection_notes(file: TorchFile, found: list[StateDict], chosen: StateDict) -> tuple[str, ...]:
    notes = []
    if file.is_program:
        notes.append("a TorchScript program: only its weights were read, its code was not looked at")
    elif chosen.is_module:
        notes.append("a model saved as an object: only its weights were read")
    if chosen.name:
        notes.append(f"weights read from {chosen.name}")
    if chosen.name and not chosen.is_module:
        used = chosen.name.partition(".")[0]
        entries = mapping_of(file.content) or {}
        beside = [key for key in entries if isinstance(key, str) and key != used]
        if beside:
            notes.append(f"not used, beside them: {first_few(beside, most=_LISTED_AT_MOST)}")
    averages = [state.name for state in found if state.is_averaged and state is not chosen]
    if averages:
        notes.append(f"averaged weights are there too: name them as {file.path.name}#{averages[0]}")
    others = [name for name in chosen.others if name not in _SETTINGS]
    if others:
        notes.append(f"left out, because they are no tensors: {first_few(others)}")
    skipped = first_few(file.skipped, most=_LISTED_AT_MOST)
    if skipped and not (file.is_program or chosen.is_module):
        notes.append(f"left out, and nothing of them run: objects of {skipped}")
    return tuple(notes)


def _strip_wrappers(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Remove wrappers that all names share; the second value is what was removed."""
    removed = ""
    for _ in range(_MAX_WRAPPERS):
        shared = [prefix for prefix in _WRAPPER_PREFIXES if all(name.startswith(prefix) for name in tensors)]
        if not tensors or not shared:
            break
        tensors = {name.removeprefix(shared[0]): value for name, value in tensors.items()}
        removed += shared[0]
    return tensors, removed


def _described(content: object) -> str:
    if isinstance(content, dict | list) and not content:
        return "nothing"
    if isinstance(content, dict):
        names = first_few([key for key in content if isinstance(key, str)])
        return f"no tensors, but {names}" if names else "no tensors under any name"
    if isinstance(content, Inert):
        return content.name
    return "Tensor" if isinstance(content, TensorReference) else type(content).__name__


def _no_weights(path: Path, got: str) -> CheckpointError:
    return CheckpointError(
        expected=f"a state dict (names to tensors) in {path}",
        got=got,
        fix="Save model.state_dict() of the whole model, best as safetensors.",
    )


def _wants_code(path: Path, wanted: str) -> CheckpointError:
    return CheckpointError(
        expected=f"nothing but tensors in {path}",
        got=f"a pickle that wants to run code ({wanted:.80})",
        fix="It was refused and nothing in it was run. Ask the publisher for safetensors.",
    )


def _other_format(path: Path, head: bytes) -> CheckpointError:
    return CheckpointError(
        expected=f"weights as safetensors or a torch state dict in {path}",
        got="an empty file" if not head else "another format, or a damaged file",
        fix="Check that the download is complete and is the weights file itself.",
    )


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        expected=f"a whole torch state dict in {path}",
        got=f"a damaged one ({reason:.300})",
        fix="Download or copy the file again and compare its SHA-256 with the publisher's.",
    )


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    reason = (error.strerror or type(error).__name__).lower()
    return CheckpointError(
        expected=f"a readable weights file {path}", got=reason, fix="Check the path and its mode."
    )
