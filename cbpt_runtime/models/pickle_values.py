"""What a pickle that is read and not run is made of, and what its names mean: none is imported or called.

A pickle names classes and functions, and says which to call with what. Three kinds of calls are told apart:
those that make tensors and plain containers, which the reader does itself; those that ordinary programs leave
in training checkpoints (numbers, dates, paths, settings), which become inert placeholders; and all others,
which are code somebody wants run.
"""

from __future__ import annotations

import _compat_pickle
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

STORAGE_DTYPES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
# Numbers of dense real tensors that `_rebuild_tensor_v3` names directly.
DTYPES: dict[str, torch.dtype] = {
    f"torch.{name}": getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
        "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    )
}  # fmt: skip
MAPPINGS = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict")
SETS = ("builtins.set", "builtins.frozenset")
# How Python before protocol 2 rebuilds objects: the class is the first argument.
RECONSTRUCTORS = ("copyreg._reconstructor", "copyreg.__newobj__", "copyreg.__newobj_ex__")
# Functions whose result is a tensor of another kind than dense real numbers in one storage.
OTHER_TENSORS = re.compile(
    r"torch\._utils\._rebuild_(sparse_tensor|sparse_csr_tensor|nested_tensor|qtensor|meta_tensor_no_storage"
    r"|wrapper_subclass|device_tensor_from_numpy|xla_tensor)"
)
_NUMPY = re.compile(
    r"numpy(\._?core)?\.("
    r"multiarray\.(scalar|_reconstruct)|numeric\._frombuffer|dtype|ndarray"
    r"|dtypes\.\w+DType|random\._pickle\.__(randomstate|generator|bit_generator)_ctor"
    r"|random\.(mtrand\.RandomState|_pcg64\.PCG64|_mt19937\.MT19937)|(bool_?|(u?int|float|complex)\d+))"
)
_INERT = re.compile(
    r"collections\.(deque|ChainMap|UserDict)|argparse\.Namespace|types\.(SimpleNamespace|MappingProxyType)"
    r"|datetime\.(date|datetime|time|timedelta|timezone)|zoneinfo\.ZoneInfo\._unpickle|decimal\.Decimal"
    r"|fractions\.Fraction|uuid\.(UUID|SafeUUID)|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path"
    r"|functools\.partial|random\.Random|itertools\.count|logging\.getLogger|_codecs\.encode"
    r"|ipaddress\.IPv[46]\w+|array\._array_reconstructor|enum\.[A-Z]\w+|typing\.[A-Z]\w+"
    r"|builtins\.(list|tuple|slice|range|complex|bytes|bytearray|int|float|bool|str|object)"
    r"|torch\.(device|Generator|torch_version\.TorchVersion)|torch\.serialization\._get_layout"
    r"|torch\.jit\._pickle\.(build_(int|tensor|bool|double)list|restore_type_tag)"
    r"|torch\.distributed\.(tensor(\._api)?|_tensor(\.api)?)\.DTensor"
)
# Packages of settings objects; of these only classes, by their capital letter.
_SETTINGS_CLASS = re.compile(
    r"(omegaconf|ml_collections|easydict|addict|yacs|munch|box|pytorch_lightning|lightning|lightning_fabric"
    r"|lightning_utilities|transformers)\.(\w+\.)*[A-Z]\w*"
)
_CLASS = re.compile(r"(\w+\.)*[A-Z]\w*")
_ENUM_VALUE = re.compile(r"[\w.+-]{1,64}")


def qualified(module: str, name: str) -> str:
    """Return the dotted name; what Python 3 renamed is under its present name, as unpicklers look it up."""
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"


def is_inert_call(name: str, arguments: Sequence[object]) -> bool:
    """Whether calling this is how ordinary programs store data, as opposed to code somebody wants run."""
    if _NUMPY.fullmatch(name) or _INERT.fullmatch(name) or _SETTINGS_CLASS.fullmatch(name):
        return True
    return _is_enum_member(name, arguments)


def is_inert_class(name: str) -> bool:
    """Whether an instance made without its constructor is data: of Python's own classes only some are."""
    is_own = name.partition(".")[0] not in sys.stdlib_module_names
    return is_own or name in MAPPINGS or name in SETS or is_inert_call(name, ())


def _is_enum_member(name: str, arguments: Sequence[object]) -> bool:
    """Tell a member of an enumeration: it is stored as its class called with one plain value."""
    root = name.partition(".")[0]
    if root in sys.stdlib_module_names or root in ("torch", "torchvision", "numpy") or len(arguments) != 1:
        return False
    value = arguments[0]
    is_plain = isinstance(value, int) or (isinstance(value, str) and bool(_ENUM_VALUE.fullmatch(value)))
    return is_plain and bool(_CLASS.fullmatch(name))


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


def known_result(name: str, arguments: tuple[object, ...]) -> object | None:
    """Return what the reader makes itself beside mappings: tensors, sizes and sets, which become lists."""
    if name in SETS:
        return arguments[0] if arguments and isinstance(arguments[0], list) else []
    if name == "torch.Size":
        return arguments[0] if arguments else ()
    if name.startswith(("torch._utils._rebuild", "torch._tensor._rebuild", "torch.tensor._rebuild")):
        return _tensor(name.rpartition(".")[2], name, arguments)
    return None


def _tensor(function: str, name: str, arguments: tuple[object, ...]) -> object | None:
    if function in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3") and len(arguments) >= 4:
        storage, offset, size, stride = arguments[:4]
        if not isinstance(storage, StorageReference):
            raise PickleFormatError("a tensor without a storage")
        dtype = storage.dtype
        if function == "_rebuild_tensor_v3":
            named = arguments[6] if len(arguments) > 6 else None
            dtype = DTYPES.get(named.name) if isinstance(named, Global) else None
        return TensorReference(storage, dtype, offset, size, stride)
    if function in (
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
        "_rebuild_device_tensor_from_cpu_tensor",
    ):
        return arguments[0] if arguments and isinstance(arguments[0], TensorReference) else None
    if function in ("_rebuild_from_type", "_rebuild_from_type_v2") and len(arguments) >= 3:
        inner, kind, given = arguments[:3]
        if not isinstance(inner, Global) or not isinstance(given, tuple):
            return None
        if OTHER_TENSORS.fullmatch(inner.name):
            return TensorReference(None, kind=getattr(kind, "name", function))
        inner_function = inner.name.rpartition(".")[2]
        is_plain = inner.name.startswith("torch._utils.") and "_from_type" not in inner_function
        return _tensor(inner_function, inner.name, given) if is_plain else None
    return TensorReference(None, kind=function) if OTHER_TENSORS.fullmatch(name) else None
