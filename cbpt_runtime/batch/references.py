"""Where one image is, and how its bytes are got there."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbpt_runtime.artifacts.names import readable
from cbpt_runtime.errors import ImageDataError

if TYPE_CHECKING:
    import pyarrow as pa

_CONNECTIONS = 16
_GROUPS = 4  # of rows of tables, kept by a worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """An image that is still where it is.

    Attributes:
        key: The name its row gets.
        place: Path or URL of the file it is, or is in.
        kind: 'file'; 'member' of a tar shard; 'cell' of a Parquet file; or 'none', with a problem.
        position: Byte a member begins at; or row group of a cell.
        size: Bytes of a member; or row of a cell in its group.
        column: Of a cell.
        problem: Why there is no image, where that is known already.
    """

    key: str
    place: str
    kind: str = "file"
    position: int | None = None
    size: int | None = None
    column: str | None = None
    problem: str | None = None


REFERENCE = ("key", "place", "kind", "position", "size", "column", "problem")
"""What a plan keeps of an image, as columns."""


def references_of(columns: Sequence[Sequence[Any]]) -> list[Reference]:
    """Read references from the columns of a plan, in the order of `REFERENCE`."""
    return [
        Reference(
            key=key,
            place=os.fsdecode(place),
            kind=kind,
            position=position,
            size=size,
            column=column,
            problem=problem,
        )
        for key, place, kind, position, size, column, problem in zip(*columns, strict=True)
    ]


def is_remote(place: str) -> bool:
    """Whether something is a URL and not a path."""
    return "://" in place


def contents(
    references: list[Reference], io_config: Any, *, as_bytes: bool = False
) -> list[bytes | Path | str]:
    """Bytes of images, or the path where a decoder reads it itself, or in words why there are none.

    Args:
        references: Where they are.
        io_config: How object stores are reached.
        as_bytes: Read all of them, for who sends them on.
    """

    def content(reference: Reference) -> bytes | Path | str:
        try:
            found = _content(reference, io_config)
            return found.read_bytes() if as_bytes and isinstance(found, Path) else found
        except Exception as error:  # of Daft's Rust, pyarrow, the system: whatever it is, it is this image's
            return reason(error)

    if not any(is_remote(reference.place) for reference in references):
        return [content(reference) for reference in references]
    with ThreadPoolExecutor(_CONNECTIONS) as pool:  # they wait, most of the time
        return list(pool.map(content, references))


def reason(error: Exception) -> str:
    """Return an exception on one line: its beginning, and its end, where the engine says the cause."""
    if isinstance(error, ImageDataError):
        return error.got
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:148]} … {text[-148:]}"


def _content(reference: Reference, io_config: Any) -> bytes | Path | str:
    match reference.kind:
        case "none":
            return reference.problem or "nothing there"
        case "cell":
            return _cell(reference, io_config)
        case "member":
            return _read(reference.place, io_config, reference.position, reference.size)
        case _ if is_remote(reference.place):
            return _read(reference.place, io_config)
        case _:
            return Path(reference.place)


def _read(place: str, io_config: Any, position: int | None = None, size: int | None = None) -> bytes:
    import daft

    if not is_remote(place):  # a name need not be text
        with open(place, "rb") as file:  # noqa: PTH123
            file.seek(position or 0)
            return file.read(-1 if size is None else size)
    with daft.File(place, io_config=io_config, position=position, size=size).open() as file:
        return bytes(file.read())


def _cell(reference: Reference, io_config: Any) -> bytes | str:
    group = _row_group(reference.place, reference.position or 0, reference.column or "", io_config)
    value = group[reference.size or 0].as_py()
    if isinstance(value, dict):  # as the datasets library stores images
        value = value.get("bytes")
    return value if isinstance(value, bytes) else "an empty cell"


@lru_cache(maxsize=_GROUPS)
def _row_group(place: str, number: int, column: str, io_config: Any) -> pa.ChunkedArray:
    with opened_table(place, io_config) as file:
        return file.read_row_group(number, columns=[column]).column(column)


@contextmanager
def opened_table(place: str, io_config: Any) -> Iterator[Any]:
    """Open a Parquet file, here or in an object store."""
    import pyarrow.parquet as pq

    with _opened(place, io_config) as file, pq.ParquetFile(file) as table:
        yield table


def shard_members(place: str, io_config: Any) -> Iterator[tuple[str, int, int] | str]:
    """Name, first byte and size of each file in a tar shard; why it ends early, in words, where it does."""
    try:
        with (
            _opened(place, io_config) as file,
            tarfile.open(fileobj=file, mode="r:") as archive,
        ):
            end = 0
            for member in archive:
                end = member.offset_data + member.size
                if member.isreg() and not member.issparse():
                    yield member.name, member.offset_data, member.size
            length = file.seek(0, os.SEEK_END)
            if length < end:
                yield f"a shard that ends at byte {length:,} of {end:,}"
    except (tarfile.TarError, OSError, ValueError) as error:
        yield f"no whole tar file: {readable(reason(error))}"


def _opened(place: str, io_config: Any) -> io.BufferedReader:
    """Open a file, here or in an object store, for a ``with`` block; its bytes come as they are asked for."""
    import daft

    if is_remote(place):
        return io.BufferedReader(_Stream(daft.File(place, io_config=io_config).open()))
    return open(place, "rb")  # noqa: PTH123


class _Stream(io.RawIOBase):
    """A file of Daft's as Python's own are, whose `closed` is no method."""

    def __init__(self, file: Any) -> None:
        self._file = file.__enter__()  # outside of a block it does not read

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.__exit__(None, None, None)
        super().close()
