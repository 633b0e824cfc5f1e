"""The tensors, sizes and sets that a pickle which is read and not run makes by calls."""

from __future__ import annotations

from cbpt_runtime.models.pickle_names import DTYPES, OTHER_TENSORS, SETS
from cbpt_runtime.models.pickle_values import Global, PickleFormatError, StorageReference, TensorReference


def known_result(name: str, arguments: tuple[object, ...]) -> object | None:
    """What the reader makes itself beside mappings: tensors, sizes and sets, which become lists."""
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
