"""Files torch wrote, opened without torch's unpickler: what they hold, and their tensors on request.

Three forms: the archive (a zip, since torch 1.6), the same with a program beside the weights (TorchScript,
whose code is never looked at), and the older sequence of pickles with the numbers behind them.
"""

from __future__ import annotations

import errno
import math
import struct
import zipfile
from io import BytesIO
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from cbpt_runtime.models.pickle_reader import PickleReader, read_pickle
from cbpt_runtime.models.pickle_values import PickleFormatError, TensorReference

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_COUNT = struct.Struct("<q")
_MAX_DIMENSIONS = 16
# What a damaged archive can make the zip reader raise.
_ARCHIVE_FAILURES = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    EOFError,
    struct.error,
    ValueError,
    LookupError,
)


class NotDenseError(Exception):
    """A tensor that is not made of as many real numbers as the file stores for it."""


class TorchFile:
    """The content of a file torch wrote, with references in the place of tensors.

    Attributes:
        path: Where it is.
        content: What was saved.
        skipped: Names of classes and functions in whose place there are placeholders.
        is_program: Whether it is a TorchScript archive.
    """

    def __init__(
        self, path: Path, pickle: PickleReader, extents: dict[str, tuple[int, int]], *, is_program: bool
    ) -> None:
        self.path = path
        self.content = pickle.value
        self.skipped = tuple(pickle.skipped)
        self.is_program = is_program
        self._extents = extents
        self._budget = self._left = path.stat().st_size
        self._storages: dict[str, Tensor] = {}
        self._held = 0

    def read(self, reference: TensorReference) -> Tensor:
        """Return the tensor, on the CPU, in memory of its own.

        All tensors together may be no larger than the file.

        Raises:
            NotDenseError: It is sparse, quantised or complex, or claims more numbers than are stored for it.
            PickleFormatError: It lies outside the file, or the limit is reached.
            OSError: The file cannot be read.
        """
        storage, dtype = reference.storage, reference.dtype
        if storage is None or dtype is None:
            raise NotDenseError(reference.kind)
        numbers = _typed(self._bytes(storage.key), dtype)
        if storage.count is not None:
            if storage.start + storage.count > len(numbers):
                raise PickleFormatError("a view beyond its storage")
            numbers = numbers[storage.start : storage.start + storage.count]
        offset, size, stride = _geometry(reference)
        if math.prod(size) > len(numbers):
            raise NotDenseError
        last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
        if math.prod(size) and last >= len(numbers):
            raise PickleFormatError("a tensor beyond its storage")
        self._left -= math.prod(size) * numbers.element_size()
        if self._left < 0:
            raise PickleFormatError(f"tensors of more than the {self._budget:,} bytes of the file")
        return numbers.as_strided(size, stride, numbers.storage_offset() + offset if math.prod(size) else 0)

    def _bytes(self, key: str) -> Tensor:
        if key not in self._storages:
            start, size_bytes = self._extents.get(key, (0, -1))
            if size_bytes < 0 or start + size_bytes > self._budget:
                raise PickleFormatError(f"the numbers of storage {key:.40} are missing")
            self._held += size_bytes
            if self._held > self._budget:
                raise PickleFormatError("storages that lie over each other")
            numbers = torch.empty(size_bytes, dtype=torch.uint8)
            with self.path.open("rb") as stream:
                stream.seek(start)
                if size_bytes and stream.readinto(numbers.numpy().data) != size_bytes:
                    raise PickleFormatError("the file ends too early")
            self._storages[key] = numbers
        return self._storages[key]


def open_archive(path: Path) -> TorchFile:
    """Open a zip archive of `torch.save` or `torch.jit.save`.

    Raises:
        ForbiddenCallError: Its pickle wants to run code.
        PickleFormatError: It is damaged, compressed or no such archive.
        OSError: It cannot be read.
    """
    try:
        with path.open("rb") as stream:
            with zipfile.ZipFile(stream) as archive:
                root, names = _layout(archive.infolist())
            extents = {name: _extent(stream, entry) for name, entry in names.items()}
            pickle = read_pickle(BytesIO(_content(stream, extents[f"{root}data.pkl"])))
            if _content(stream, extents.get(f"{root}byteorder", (0, 0))) not in (b"little", b""):
                raise PickleFormatError("numbers in big-endian order")
    except PickleFormatError:
        raise
    except _ARCHIVE_FAILURES as error:
        raise PickleFormatError(str(error) or type(error).__name__) from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # an offset before the beginning of the file
            raise PickleFormatError("entries outside the file") from error
        raise
    prefix = f"{root}data/"
    storages = {
        name.removeprefix(prefix): extent for name, extent in extents.items() if name.startswith(prefix)
    }
    is_program = f"{root}constants.pkl" in names or any(name.startswith(f"{root}code/") for name in names)
    return TorchFile(path, pickle, storages, is_program=is_program)


def open_sequence(path: Path) -> TorchFile:
    """Open a file as torch wrote it before 1.6: pickles one after the other, then the numbers.

    Raises:
        ForbiddenCallError: One of its pickles wants to run code.
        PickleFormatError: It is damaged or no such file.
        OSError: It cannot be read.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as stream:
        bounded = _Bounded(stream, size_bytes)
        if read_pickle(bounded).value != _MAGIC_NUMBER or read_pickle(bounded).value != _PROTOCOL:
            raise PickleFormatError("a pickle that torch.save did not write")
        read_pickle(bounded)  # sizes of C types on the machine that wrote it
        pickle = read_pickle(bounded)
        keys = read_pickle(bounded).value
        if not isinstance(keys, list):
            raise PickleFormatError("no list of storages")
        extents = {}
        for key in keys:
            reference = pickle.storages.get(key) if isinstance(key, str) else None
            if reference is None or reference.dtype is None:
                raise PickleFormatError("a storage of no known type")
            (count,) = _COUNT.unpack(bounded.read(_COUNT.size).ljust(_COUNT.size, b"\xff"))
            extents[key] = (stream.tell(), count * reference.dtype.itemsize)
            if not 0 <= count <= size_bytes:
                raise PickleFormatError("the file ends too early")
            stream.seek(count * reference.dtype.itemsize, 1)
    return TorchFile(path, pickle, extents, is_program=False)


class _Bounded:
    """A stream whose reads never ask for more than is left, whatever length a pickle claims."""

    def __init__(self, stream: IO[bytes], size_bytes: int) -> None:
        self._stream = stream
        self._size_bytes = size_bytes

    def read(self, size: int, /) -> bytes:
        return self._stream.read(max(0, min(size, self._size_bytes - self._stream.tell())))

    def readline(self) -> bytes:
        return self._stream.readline()


def _layout(entries: list[zipfile.ZipInfo]) -> tuple[str, dict[str, zipfile.ZipInfo]]:
    """Return the folder inside the archive, and its entries by name."""
    names = {entry.filename: entry for entry in entries}
    roots = [
        name.removesuffix("data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl")
    ]
    if len(roots) != 1 or len(names) != len(entries):
        raise PickleFormatError("no data.pkl, or several entries of one name")
    read = [
        entry for name, entry in names.items() if name.startswith((f"{roots[0]}data", f"{roots[0]}byteorder"))
    ]
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in read):
        raise PickleFormatError("compressed entries, which torch.save never writes")
    return roots[0], names


def _extent(stream: IO[bytes], entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Where in the file an entry's content is: place and length in bytes."""
    stream.seek(entry.header_offset)
    magic, name_length, extra_length = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
    if magic != b"PK\x03\x04":
        raise PickleFormatError(f"no entry where {entry.filename:.80} should be")
    return entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length, entry.file_size


def _content(stream: IO[bytes], extent: tuple[int, int]) -> bytes:
    """Return an entry's bytes; no checksum is compared, because torch can be told to write none."""
    start, size_bytes = extent
    left = stream.seek(0, 2) - start
    stream.seek(start)
    return stream.read(max(0, min(size_bytes, left)))


def _typed(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    whole = len(numbers) // dtype.itemsize * dtype.itemsize
    return numbers[:whole].view(dtype)


def _geometry(reference: TensorReference) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    (offset,), size, stride = _counts((reference.offset,)), _counts(reference.size), _counts(reference.stride)
    if len(size) != len(stride) or len(size) > _MAX_DIMENSIONS:
        raise PickleFormatError("a tensor whose shape is no shape")
    return offset, size, stride


def _counts(values: object) -> tuple[int, ...]:
    given = values if isinstance(values, tuple | list) else (None,)
    counts = tuple(value for value in given if type(value) is int and 0 <= value < 2**62)
    if len(counts) != len(given):
        raise PickleFormatError("a tensor whose shape is no shape")
    return counts
