"""Reads a pickle without running it: nothing it names is imported, called or built.

Tensors come out as references into the file, plain containers as themselves, everything else as placeholders.
Work and memory are bounded by the length of the pickle: mappings keep only text as keys, so no key is hashed
that the file composed, and shared parts stay shared.
"""

from __future__ import annotations

import pickletools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Protocol

from cbpt_runtime.models.pickle_values import (
    MAPPINGS,
    RECONSTRUCTORS,
    STORAGE_DTYPES,
    ForbiddenCallError,
    Global,
    Inert,
    OtherKey,
    PickleFormatError,
    StorageReference,
    is_inert_call,
    is_inert_class,
    known_result,
    qualified,
)

# A large training checkpoint with its optimizer has some hundred thousand.
MAX_OPCODES = 2_000_000
_MAX_NAME = 300
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_STORAGE = re.compile(r"torch\.(?:cuda\.|storage\.)?(\w+Storage)")


class Stream(Protocol):
    """What a pickle is read from."""

    def read(self, size: int, /) -> bytes: ...  # noqa: D102

    def readline(self) -> bytes: ...  # noqa: D102


def read_pickle(stream: Stream) -> PickleReader:
    """Read one pickle; `value` of the result is its content.

    Raises:
        ForbiddenCallError: It calls something that is not data.
        PickleFormatError: It is no pickle, or has too many operations.
    """
    reader = PickleReader()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks about escapes in old text
            reader.run(pickletools.genops(stream))  # type: ignore[arg-type]
    except (ForbiddenCallError, PickleFormatError):
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise PickleFormatError(str(error) or type(error).__name__) from error
    return reader


class PickleReader:
    """The stack machine of a pickle.

    Attributes:
        value: The content, after `run`.
        skipped: Names of the classes and functions that became placeholders, in order, once each.
        storages: Every storage the content refers to, by key.
    """

    def __init__(self) -> None:
        self.value: object = None
        self.skipped: dict[str, None] = {}
        self.storages: dict[str, StorageReference] = {}
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}
        self._copied = 0

    def run(self, operations: Iterator[tuple[pickletools.OpcodeInfo, object, int | None]]) -> None:
        """Carries the operations out, up to STOP."""
        for count, (operation, argument, _) in enumerate(operations):
            if count >= MAX_OPCODES:
                raise PickleFormatError(f"more than {MAX_OPCODES:,} operations")
            name = operation.name
            handler = _HANDLERS.get(name)
            if handler is not None:
                handler(self, argument)
            elif _LITERALS.fullmatch(name):
                self._stack.append(argument)
            elif name == "STOP":
                self.value = self._kept(self._pop())
            else:
                raise PickleFormatError(f"the operation {name}, which torch.save never writes")

    def _pop(self) -> object:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise PickleFormatError("a value is missing")
        return self._stack.pop()

    def _discard(self) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._pop()

    def _top(self) -> object:
        value = self._pop()
        self._stack.append(value)
        return value

    def _pop_mark(self) -> list[object]:
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _pop_many(self, count: int) -> tuple[object, ...]:
        return tuple(self._pop() for _ in range(count))[::-1]

    def _memoize(self, index: int) -> None:
        self._memo[index] = self._top()

    def _set_items(self, pairs: list[object]) -> None:
        target = self._top()
        entries = target.entries if isinstance(target, Inert) else target
        if not isinstance(entries, dict) or len(pairs) % 2:
            raise PickleFormatError("entries for something that is no mapping")
        entries.update(self._entries(pairs))

    def _extend(self, values: list[object]) -> None:
        target = self._top()
        if isinstance(target, list):
            target.extend(map(self._kept, values))
        elif not isinstance(target, Inert):
            raise PickleFormatError("elements for something that is no list")

    def _name_two(self) -> None:
        module, name = self._pop_many(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleFormatError("a name that is not text")
        self._stack.append(_global(module, name))

    def _instantiate(self, made: object, *arguments: object) -> None:
        """Make an object without its constructor, as pickle does it for most classes."""
        if not isinstance(made, Global):
            raise _not_callable(made)
        if not is_inert_class(made.name):
            raise ForbiddenCallError(made.name)
        self._stack.append({} if made.name in MAPPINGS else self._placeholder(made.name, arguments))

    def _placeholder(self, name: str, arguments: tuple[object, ...]) -> Inert:
        self.skipped[name] = None
        return Inert(name, arguments)

    def _call(self, function: object, arguments: object) -> object:
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise _not_callable(function)
        name = function.name
        if name in MAPPINGS:
            return self._mapping(arguments)
        if (result := known_result(name, arguments)) is not None:
            return result
        if name in RECONSTRUCTORS and arguments:
            return self._reconstructed(name, arguments)
        if name == "builtins.getattr" and len(arguments) == 2:  # how early Python 3.11 stores enumerations
            return _attribute(*arguments)
        if name in ("operator.getitem", "_operator.getitem") and isinstance(arguments[0], Global):
            name, arguments = arguments[0].name, ()  # list[int] and the like
        if not is_inert_call(name, arguments):
            raise ForbiddenCallError(name)
        return self._placeholder(name, arguments)

    def _mapping(self, arguments: tuple[object, ...]) -> dict[object, object]:
        pairs = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], list) else []
        self._copied += len(pairs)
        if self._copied > MAX_OPCODES:  # one list, made into a mapping over and over
            raise PickleFormatError(f"more than {MAX_OPCODES:,} entries copied")
        flat = [part for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2 for part in pair]
        return self._entries(flat)

    def _reconstructed(self, function: str, arguments: tuple[object, ...]) -> object:
        base = arguments[1] if len(arguments) > 1 and function.endswith("_reconstructor") else None
        if isinstance(base, Global) and base.name not in MAPPINGS and not is_inert_call(base.name, ()):
            raise ForbiddenCallError(base.name)  # its constructor would be called
        self._instantiate(arguments[0], *arguments[1:])
        return self._pop()

    def _build(self, state: object) -> None:
        target = self._top()
        if isinstance(target, Global):
            raise ForbiddenCallError(target.name)  # changes a class or function of the running program
        if isinstance(target, Inert):
            target.state = state

    def _persistent(self, identity: object) -> None:
        if isinstance(identity, tuple) and len(identity) in (5, 6) and identity[0] == "storage":
            self._stack.append(self._storage(identity))
        elif isinstance(identity, tuple) and len(identity) >= 2 and identity[0] == "module":
            self._stack.append(identity[1])  # a class, with its source code, which is not looked at
        else:
            raise PickleFormatError("a reference to something outside the file")

    def _storage(self, identity: tuple[object, ...]) -> StorageReference:
        kind, key = identity[1], identity[2]
        match = _STORAGE.fullmatch(kind.name) if isinstance(kind, Global) else None
        if match is None or not isinstance(key, str):
            raise PickleFormatError("a storage of no known type")
        dtype = STORAGE_DTYPES.get(match[1])
        self.storages.setdefault(key, StorageReference(key, dtype))
        view = identity[5] if len(identity) == 6 else None
        if not isinstance(view, tuple):
            return StorageReference(key, dtype)
        _, start, count = view
        if not isinstance(start, int) or not isinstance(count, int) or start < 0 or count < 0:
            raise PickleFormatError("a view of a storage that is none")
        return StorageReference(key, dtype, start, count)

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _entries(self, pairs: list[object]) -> dict[object, object]:
        keys = (key if type(key) is str else OtherKey(key) for key in pairs[::2])
        return dict(zip(keys, map(self._kept, pairs[1::2]), strict=True))

    def _kept(self, value: object) -> object:
        """Return a value of the content; what is only named, as enumerations may be, is a placeholder."""
        return self._placeholder(value.name, ()) if isinstance(value, Global) else value


def _attribute(holder: object, attribute: object) -> Global:
    is_named = isinstance(attribute, str) and bool(_IDENTIFIER.fullmatch(attribute))
    if not isinstance(holder, Global) or not is_named:
        raise ForbiddenCallError("builtins.getattr")
    return _global(holder.name, str(attribute))


def _global(module: str, name: str) -> Global:
    if len(module) + len(name) > _MAX_NAME:
        raise PickleFormatError(f"a name of more than {_MAX_NAME} characters")
    return Global(qualified(module, name))


def _not_callable(value: object) -> Exception:
    if isinstance(value, Global | Inert):
        return ForbiddenCallError(value.name)
    return PickleFormatError(f"a call of a {type(value).__name__}")


def _dictionary(reader: PickleReader, _: object) -> None:
    values = reader._pop_mark()
    reader._stack.append({})
    reader._set_items(values)


def _instance(reader: PickleReader, argument: object) -> None:
    """INST: the class in the argument, called with what lies above the mark."""
    module, _, name = str(argument).partition(" ")
    arguments = tuple(reader._pop_mark())
    reader._stack.append(reader._call(_global(module, name), arguments))


def _object(reader: PickleReader, _: object) -> None:
    """OBJ: the same with the class on the stack."""
    made, *arguments = reader._pop_mark()
    reader._stack.append(reader._call(made, tuple(arguments)))


def _named(reader: PickleReader, argument: object) -> None:
    module, _, name = str(argument).partition(" ")
    reader._stack.append(_global(module, name))


def _reduce(reader: PickleReader, _: object) -> None:
    function, arguments = reader._pop_many(2)
    reader._stack.append(reader._call(function, arguments))


_Handler = Callable[[PickleReader, object], None]


def _tuple_of(count: int) -> _Handler:
    return lambda reader, _: reader._stack.append(reader._pop_many(count))


def _memo(act: Callable[[PickleReader, int], None]) -> _Handler:
    def handle(reader: PickleReader, argument: object) -> None:
        if not isinstance(argument, int) or not 0 <= argument < 2**32:
            raise PickleFormatError("a place that is no number of a place")
        act(reader, argument)

    return handle


_LITERALS = re.compile(
    r"INT|BININT[12]?|LONG[14]?|FLOAT|BINFLOAT|(SHORT_)?BIN(STRING|BYTES|UNICODE)|BIN(BYTES|UNICODE)8"
    r"|BYTEARRAY8|STRING|UNICODE"
)
_GET, _PUT = _memo(PickleReader._get), _memo(PickleReader._memoize)
_HANDLERS: dict[str, _Handler] = {
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _GET),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _PUT),
    **dict.fromkeys(("PROTO", "FRAME"), lambda *_: None),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), lambda reader, _: reader._stack.append([])),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda reader, _: reader._extend(reader._pop_mark())),
    **dict.fromkeys(("LIST", "FROZENSET"), lambda reader, _: reader._stack.append(reader._pop_mark())),
    "MEMOIZE": lambda reader, _: reader._memoize(len(reader._memo)),
    "NONE": lambda reader, _: reader._stack.append(None),
    "NEWTRUE": lambda reader, _: reader._stack.append(True),
    "NEWFALSE": lambda reader, _: reader._stack.append(False),
    "MARK": lambda reader, _: reader._marks.append(len(reader._stack)),
    "POP_MARK": lambda reader, _: reader._pop_mark().clear(),
    "POP": lambda reader, _: reader._discard(),
    "DUP": lambda reader, _: reader._stack.append(reader._top()),
    "APPEND": lambda reader, _: reader._extend([reader._pop()]),
    "EMPTY_TUPLE": _tuple_of(0),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "TUPLE": lambda reader, _: reader._stack.append(tuple(reader._pop_mark())),
    "EMPTY_DICT": lambda reader, _: reader._stack.append({}),
    "DICT": _dictionary,
    "SETITEM": lambda reader, _: reader._set_items(list(reader._pop_many(2))),
    "SETITEMS": lambda reader, _: reader._set_items(reader._pop_mark()),
    "GLOBAL": _named,
    "STACK_GLOBAL": lambda reader, _: reader._name_two(),
    "INST": _instance,
    "OBJ": _object,
    "REDUCE": _reduce,
    "BUILD": lambda reader, _: reader._build(reader._pop()),
    "NEWOBJ": lambda reader, _: reader._instantiate(*reader._pop_many(2)),
    "NEWOBJ_EX": lambda reader, _: reader._instantiate(*reader._pop_many(3)),
    "BINPERSID": lambda reader, _: reader._persistent(reader._pop()),
}
