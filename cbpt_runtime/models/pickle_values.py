"""What a pickle that is read and not run is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


class ForbiddenCallError(Exception):
    """The pickle calls something that is not data; `name` says what."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(name)


class PickleFormatError(ValueError):
    """The bytes are no pickle, or one beyond the limits."""


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A class or function the pickle names."""

    name: str


@dataclass(slots=True, eq=False)
class Inert:
    """What would have been an object: its class, how it was made, its state and its entries."""

    name: str
    arguments: tuple[object, ...] = ()
    state: object = None
    entries: dict[object, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class OtherKey:
    """A key of a mapping that is not text; told apart by identity."""

    value: object


@dataclass(frozen=True, slots=True, eq=False)
class StorageReference:
    """Numbers stored elsewhere in the file: `count` of them from element `start` of the storage `key`."""

    key: str
    dtype: torch.dtype | None
    start: int = 0
    count: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TensorReference:
    """A tensor, not yet read; without a storage one of another `kind` than dense numbers."""

    storage: StorageReference | None
    dtype: torch.dtype | None = None
    offset: object = 0
    size: object = ()
    stride: object = ()
    kind: str = ""
