"""Which of the things in a training checkpoint are the weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeGuard

from cbpt_runtime.models.pickle_values import Inert, OtherKey, PickleFormatError, TensorReference

# Where programs put the weights, the usual first.
_USUAL_NAMES = (
    "state_dict", "model_state_dict", "model", "module", "weights", "net", "network", "params", "clip",
    "student",
)  # fmt: skip
UNUSUAL = len(_USUAL_NAMES)
_AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?|shadow)([._]|$)")
_NOT_WEIGHTS = re.compile(r"optim|sched|scaler|^amp$|^rng|random|^loss|callback|queue|loop|hook")
_OPTIMIZER_KEYS = {"param_groups", "state"}
_DISTRIBUTED = ("ShardedTensor", "DTensor")
_MAX_NAME = 500
_MAX_ATTRIBUTES = 1_000_000
# Fewer tensors than one in so many of the largest set are not a model beside it.
_HANDFUL = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StateDict:
    """Named tensors out of a checkpoint.

    Attributes:
        name: Under which key they lay; empty for the content itself.
        tensors: References by name, not yet read.
        others: Names of entries beside the tensors that are none.
        is_module: Whether they were collected out of a whole model that was saved as an object.
    """

    name: str
    tensors: dict[str, TensorReference]
    others: tuple[str, ...] = ()
    is_module: bool = False

    @property
    def is_averaged(self) -> bool:
        """Whether the name says that these are averages over training steps."""
        return bool(_AVERAGED.search(self.name.lower()))

    @property
    def rank(self) -> int:
        """How usual the name is; 0 is the most usual, `UNUSUAL` says that nobody calls weights so."""
        ranks = [_USUAL_NAMES.index(part) for part in self.name.split(".") if part in _USUAL_NAMES]
        return min(ranks, default=UNUSUAL)


def find_state_dicts(content: object) -> list[StateDict]:
    """Everything that may be weights, the likeliest first.

    Plain weights come before averages, whole sets before a handful of numbers, usual names before others.

    Raises:
        PickleFormatError: A saved model of more parts than any has.
    """
    found = [state for state in _candidates(content, "", {}, depth=2) if state.tensors]
    largest = max((len(state.tensors) for state in found), default=0)

    def likelihood(state: StateDict) -> tuple[bool, bool, int, int]:
        is_handful = _HANDFUL * len(state.tensors) < largest
        return is_handful, state.is_averaged, -1 if not state.name else state.rank, -len(state.tensors)

    return sorted(found, key=likelihood)


def mapping_of(value: object) -> Mapping[object, object] | None:
    """Return the entries of a mapping, also of one of an unknown class."""
    if isinstance(value, Inert):
        return value.entries or None
    return value if isinstance(value, dict) else None


def kind_of_stranger(content: object, skipped: tuple[str, ...]) -> str | None:
    """Return what a file without plain weights is, where that can be said."""
    entries = mapping_of(content)
    if entries is None:
        return None
    names = {key for key in entries if _is_name(key)}
    kinds = " ".join(
        (*skipped, *(value.kind for value in entries.values() if isinstance(value, TensorReference)))
    )
    if any(kind in kinds for kind in _DISTRIBUTED):
        return "one process's part of a distributed checkpoint"
    if names >= _OPTIMIZER_KEYS or (names and all("optim" in name.lower() for name in names)):
        return "the state of an optimizer, without weights"
    return None


def _candidates(value: object, name: str, seen: dict[int, StateDict], *, depth: int) -> Iterator[StateDict]:
    if id(value) in seen:  # a file may share one mapping a million times: it is looked at once
        yield replace(seen[id(value)], name=name)
        return
    entries = mapping_of(value)
    if entries is not None:
        tensors = {key: entry for key, entry in entries.items() if _is_named_tensor(key, entry)}
        others = tuple(_text(key) for key in entries if key not in tensors)
        state = StateDict(name=name, tensors=tensors, others=others)  # type: ignore[arg-type]
    elif isinstance(value, Inert):
        state = StateDict(name=name, tensors=_module_tensors(value), is_module=True)
    else:
        return
    seen[id(value)] = state
    yield state
    for key, entry in (entries or {}).items():
        if depth and _is_name(key) and not _NOT_WEIGHTS.search(key.lower()):
            yield from _candidates(entry, f"{name}.{key}".lstrip("."), seen, depth=depth - 1)


def _is_named_tensor(key: object, entry: object) -> bool:
    return _is_name(key) and isinstance(entry, TensorReference)


def _is_name(key: object) -> TypeGuard[str]:
    return isinstance(key, str) and len(key) <= _MAX_NAME


def _text(key: object) -> str:
    value = key.value if isinstance(key, OtherKey) else key
    if isinstance(value, str):
        return value
    is_small = isinstance(value, int) and abs(value) < 2**63
    return str(value) if is_small else f"a {type(value).__name__}"


def _module_tensors(root: Inert) -> dict[str, TensorReference]:
    """Return the weights of a model that was saved as an object, by the names its state dict would have.

    Eager modules keep parameters, buffers and parts in three mappings; those of TorchScript keep all as
    attributes.
    """
    tensors: dict[str, TensorReference] = {}
    waiting: list[tuple[str, object]] = [("", root)]
    seen = 0
    while waiting:
        prefix, part = waiting.pop()
        state = part.state if isinstance(part, Inert) else None
        if isinstance(state, tuple) and state:
            state = state[0]  # a class with slots stores two states
        if not isinstance(state, dict):
            continue
        attributes = {
            **_section(state, "_parameters"),
            **_section(state, "_buffers"),
            **_section(state, "_modules"),
        }
        kept_out = state.get("_non_persistent_buffers_set")
        hidden_names = kept_out if isinstance(kept_out, list) else []
        seen += len(attributes) + len(state) + len(hidden_names)
        if seen > _MAX_ATTRIBUTES:  # parts may be shared, and a few can stand for any number
            raise PickleFormatError(f"a model of more than {_MAX_ATTRIBUTES:,} parts")
        hidden = {name for name in hidden_names if isinstance(name, str)}
        parts = []
        for name, value in (attributes if "_modules" in state else state).items():
            if not _is_name(name) or len(prefix) > _MAX_NAME:
                continue
            if isinstance(value, TensorReference) and name not in hidden:
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, Inert):
                parts.append((f"{prefix}{name}.", value))
        waiting.extend(reversed(parts))
    return tensors


def _section(state: Mapping[object, object], name: str) -> Mapping[object, object]:
    return mapping_of(state.get(name)) or {}
