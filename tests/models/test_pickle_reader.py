from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import functools
import io
import os
import pickle
import subprocess
import time
import types
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbpt_runtime.models import pickle_reader
from cbpt_runtime.models.pickle_reader import read_pickle
from cbpt_runtime.models.pickle_values import ForbiddenCallError, Inert, PickleFormatError


class Phase(enum.Enum):
    TRAIN = "train"


class NamedPhase(enum.Enum):
    TRAIN = "train"

    def __reduce_ex__(self, protocol: object) -> tuple[object, tuple[type[NamedPhase], str]]:
        """By name, as Python 3.11.0 to 3.11.3 do for every enumeration."""
        return getattr, (NamedPhase, self.name)


class Settings:
    def __init__(self) -> None:
        self.lr = 0.1


class Dictionary(dict[str, int]):
    pass


Point = collections.namedtuple("Point", "x y")


class Call:
    """Is stored as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts


def read(data: bytes) -> pickle_reader.PickleReader:
    return read_pickle(io.BytesIO(data))


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(value=PLAIN, protocol=st.integers(3, 5))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_plain_values_are_what_python_reads(value: object, protocol: int) -> None:
    assert read(pickle.dumps(value, protocol=protocol)).value == value


@pytest.mark.parametrize("protocol", range(6))
def test_mappings_sets_and_shared_parts_are_read_in_every_protocol(protocol: int) -> None:
    shared = ["x"]
    content = {
        "ordered": collections.OrderedDict(a=1, b=shared),
        "default": collections.defaultdict(list, c=2),
        "set": {3},
        "again": shared,
    }
    value: Any = read(pickle.dumps(content, protocol=protocol)).value
    assert value == {"ordered": {"a": 1, "b": ["x"]}, "default": {"c": 2}, "set": [3], "again": ["x"]}
    assert value["again"] is value["ordered"]["b"]


INERT = {
    "numpy number": (np.float64(0.5), "multiarray.scalar"),
    "numpy array": (np.arange(3), "numpy"),
    "numpy type": (np.dtype("int64"), "numpy.dtype"),
    "random state": (np.random.RandomState(0), "randomstate_ctor"),
    "generator": (np.random.default_rng(0), "generator_ctor"),
    "namespace": (argparse.Namespace(lr=1), "argparse.Namespace"),
    "simple namespace": (types.SimpleNamespace(lr=1), "types.SimpleNamespace"),
    "date": (datetime.datetime(2026, 1, 1), "datetime.datetime"),
    "time zone": (datetime.UTC, "datetime.timezone"),
    "path": (Path("x"), "PosixPath"),
    "decimal": (decimal.Decimal(1), "decimal.Decimal"),
    "deque": (collections.deque([1]), "collections.deque"),
    "partial": (functools.partial(int, base=2), "functools.partial"),
    "enumeration": (Phase.TRAIN, "Phase"),
    "enumeration by name": (NamedPhase.TRAIN, "NamedPhase.TRAIN"),
    "object": (Settings(), "Settings"),
    "own dictionary": (Dictionary(a=1), "Dictionary"),
    "named tuple": (Point(1, 2), "Point"),
    "complex": (1j, "builtins.complex"),
    "range": (range(3), "builtins.range"),
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", INERT)
def test_objects_that_hold_data_become_placeholders_with_their_names(kind: str, protocol: int) -> None:
    value, name = INERT[kind]
    reader = read(pickle.dumps({"before": 1, "it": value, "after": [2]}, protocol=protocol))
    content: Any = reader.value
    assert (content["before"], content["after"]) == (1, [2])
    assert isinstance(content["it"], Inert)
    assert any(name in skipped for skipped in reader.skipped)


def test_classes_that_are_not_there_are_no_obstacle() -> None:
    data = b"\x80\x02ctraining_of_somebody.config\nRunConfig\n)\x81}X\x02\x00\x00\x00lrK\x01sb."
    assert list(read(data).skipped) == ["training_of_somebody.config.RunConfig"]


CODE = {
    "os.system": (Call(os.system, "true"), "posix.system"),
    "eval": (Call(eval, "1"), "builtins.eval"),
    "exec": (Call(exec, "1"), "builtins.exec"),
    "import": (Call(__import__, "os"), "builtins.__import__"),
    "open": (Call(open, "/dev/null"), "open"),
    "attribute of a module": (Call(getattr, Call(__import__, "os"), "system"), "builtins.__import__"),
    "attribute of a value": (Call(getattr, "text", "upper"), "builtins.getattr"),
    "process": (Call(subprocess.Popen, "true"), "subprocess.Popen"),
    "reduce": (Call(functools.reduce, max, [1]), "functools.reduce"),
    "a partial that is called": (Call(functools.partial(os.system, "true")), "functools.partial"),
    "nested pickle": (Call(pickle.loads, b"N."), "pickle.loads"),
    "numpy loader": (Call(np.load, "x.npy"), "numpy.load"),
    "named tuple maker": (Call(collections.namedtuple, "A", "b"), "collections.namedtuple"),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", CODE)
def test_calls_of_anything_else_are_refused_by_name(kind: str, protocol: int) -> None:
    value, name = CODE[kind]
    with pytest.raises(ForbiddenCallError) as caught:
        read(pickle.dumps({"a": value}, protocol=protocol))
    assert caught.value.name.endswith(name)


CRAFTED = {
    "instance operation": (b"(S'true'\nios\nsystem\n.", "os.system"),
    "object operation": (b"(cos\nsystem\nS'true'\no.", "os.system"),
    "python 2 name": (b"c__builtin__\neval\n(S'1'\ntR.", "builtins.eval"),
    "python 2 module": (b"ccommands\nPopen\n(S'true'\ntR.", "subprocess.Popen"),
    "object of a process": (b"\x80\x02csubprocess\nPopen\n)\x81.", "subprocess.Popen"),
    "base whose constructor runs": (
        b"ccopy_reg\n_reconstructor\n(cx\nY\ncsubprocess\nPopen\nS'true'\ntR.",
        "subprocess.Popen",
    ),
    "change of a class": (b"cx\nY\n}S'a'\nI1\nsb.", "x.Y"),
    "tensor by another function": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\ncx\nY\n(S'true'\nt}tR.",
        "torch._tensor._rebuild_from_type_v2",
    ),
    "torch loader": (b"ctorch.hub\nload\n(S'a'\nS'b'\ntR.", "torch.hub.load"),
    "file of a storage": (b"ctorch.storage\n_load_from_bytes\n(S'a'\ntR.", "torch.storage._load_from_bytes"),
    "method of a class": (b"c__builtin__\ngetattr\n(cx\nY\nS'run'\ntR(tR.", "x.Y.run"),
    "enumeration with a command": (b"cx\nY\n(S'rm -rf x'\ntR.", "x.Y"),
    "settings loader": (b"comegaconf\nload\n(S'x'\ntR.", "omegaconf.load"),
    "type guesser": (b"ctyping\nget_type_hints\n(S'x'\ntR.", "typing.get_type_hints"),
}


@pytest.mark.parametrize("kind", CRAFTED)
def test_crafted_calls_are_refused_by_name(kind: str) -> None:
    data, name = CRAFTED[kind]
    with pytest.raises(ForbiddenCallError) as caught:
        read(data)
    assert caught.value.name == name


def nested_key(depth: int) -> bytes:
    """A mapping with a tuple of tuples as its key: hashing it takes 2^depth steps."""
    return b"\x80\x02}(" + b")" + b"2\x86" * depth + b"K\x01u."


def collisions(count: int) -> bytes:
    """Numbers that Python gives the same hash."""
    numbers = (pickle.encode_long(index * (2**61 - 1)) for index in range(1, count))
    items = b"".join(b"\x8a" + bytes([len(number)]) + number + b"N" for number in numbers)
    return b"\x80\x02}(" + items + b"u."


def mappings_of_one_list(count: int) -> bytes:
    pairs = b"](" + b"X\x01\x00\x00\x00aN\x86" * count + b"eq\x00"
    call = b"ccollections\nOrderedDict\nh\x00\x85R0"
    return b"\x80\x02" + pairs + call * count + b"N."


@pytest.mark.parametrize("data", [nested_key(300), collisions(50_000), nested_key(100_000)])
def test_keys_made_to_be_slow_are_never_hashed(data: bytes) -> None:
    start = time.monotonic()
    value: Any = read(data).value
    assert len(value) >= 1
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"N0" * 1_000_001 + b"N.", "more than 2,000,000 operations"),
        (mappings_of_one_list(3000), "more than 2,000,000 entries copied"),
        (b"L" + b"9" * 100_000 + b"L\n.", "digits"),
        (b"\x80\x02B\xff\xff\xff\x7f.", "expected 2147483647 bytes"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"P1\n.", "PERSID"),
        (b"\x80\x02K\x01Q.", "a reference to something outside the file"),
        (b"0.", "a value is missing"),
        (b"t.", "pop from empty list"),
        (b"h\x07.", "7"),
        (b"Np2305843009213693951\n.", "no number of a place"),
        (b"I1\nI2\na.", "no list"),
        (b"I1\n)R.", "a call of a int"),
        (b"c" + b"x" * 400 + b"\ny\n.", "a name of more than 300 characters"),
        (
            b"c__builtin__\ngetattr\np0\n0cx\nY\n" + b"p1\n0g0\ng1\nS'abcd'\n\x86R" * 100 + b".",
            "300 characters",
        ),
        (b"](I1\nu.", "no mapping"),
        (b"\x80\x04K\x01K\x02\x93.", "a name that is not text"),
        (b"N", "exhausted before seeing STOP"),
        (b"", "exhausted before seeing STOP"),
    ],
)
def test_what_is_no_pickle_or_too_much_of_one_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(PickleFormatError, match=message):
        read(data)


@given(data=st.binary(max_size=60))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_bytes_give_a_value_or_one_of_two_errors(data: bytes) -> None:
    with suppress(ForbiddenCallError, PickleFormatError):
        read(data + b".")
