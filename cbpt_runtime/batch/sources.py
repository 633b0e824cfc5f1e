"""What SOURCE names: folders, globs, tables of paths or of images, tar shards; here or in an object store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from cbpt_runtime.artifacts.names import is_file, is_folder, readable
from cbpt_runtime.batch.engine import io_config, load_daft
from cbpt_runtime.batch.references import Reference, is_remote, opened_table, reason, shard_members
from cbpt_runtime.errors import ImageDataError
from cbpt_runtime.models.image_files import IMAGE_SUFFIXES, is_ignored, left_out_notes, sort_files

Kind = Literal["files", "shards", "parquet", "csv", "jsonl"]
_KINDS: dict[str, Kind] = {
    ".tar": "shards",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
_COLUMNS = ("image", "path", "url", "file", "file_name", "filename", "bytes")
_WILD = frozenset("*?[")
_ACCESS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL for a store of your own",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "HF_TOKEN",
}


@dataclass(slots=True, kw_only=True)
class Source:
    """What is to be labelled.

    Attributes:
        name: A folder, a file, or a pattern with ``*``, ``?`` or ``[]``; here, or behind ``s3://``, ``gs://``
            or ``hf://``. A folder counts as all images below it.
        column: Of a table: that of the images, paths or bytes. The first of the usual names when None.
        key: Of a table: that of the names the rows get. The path, or file and number, when None.
        notes: What was left out; known when all is listed.
    """

    name: str
    column: str | None = None
    key: str | None = None
    notes: list[str] = field(default_factory=list)

    def references(self) -> Iterator[Reference]:
        """Return the images, in the order of their rows.

        Raises:
            ImageDataError: There are none, or a table has no such column.
        """
        count = 0
        for reference in self._listed():
            count += 1
            yield reference
        if not count:
            raise _nothing(self.name, "; ".join(("none", *self.notes)))

    def _listed(self) -> Iterator[Reference]:
        if not is_remote(self.name) and is_folder(Path(self.name)):
            yield from self._folder(Path(self.name))
            return
        files = self._files()
        kinds = {_KINDS.get(PurePosixPath(file).suffix.lower(), "files") for file in files}
        if len(kinds) > 1:
            raise _nothing(self.name, f"files of several kinds: {', '.join(sorted(kinds))}")
        readers: dict[Kind, Callable[[str], Iterator[Reference]]] = {
            "files": self._file,
            "shards": self._shard,
            "parquet": self._parquet,
            "csv": self._csv,
            "jsonl": self._jsonl,
        }
        for kind in kinds:
            for file in files:
                yield from readers[kind](file)

    def _folder(self, folder: Path) -> Iterator[Reference]:
        """As `classify` takes a folder."""
        found = sort_files(folder, recursive=True)
        self.notes += left_out_notes(found.left_out, folder)
        for path in found.images:
            yield Reference(key=readable(str(path)), place=str(path))

    def _files(self) -> list[str]:
        """Return the files of a pattern, of a folder in an object store, or the one file."""
        remote, wild = is_remote(self.name), bool(_WILD & set(self.name))
        if not remote and not wild:
            if not is_file(Path(self.name)):
                raise _nothing(self.name, "nothing there")
            return [self.name]
        suffix = PurePosixPath(self.name).suffix.lower()
        if remote and not wild and (suffix in _KINDS or suffix in IMAGE_SUFFIXES):
            return [self.name]
        pattern = self.name if wild else f"{self.name.rstrip('/')}/**"
        daft = load_daft()
        try:
            listed = daft.from_glob_path(pattern, io_config=_quickly()).select("path").to_arrow_iter()
            found = sorted(path for batch in listed for path in batch.column(0).to_pylist())
        except Exception as error:  # of Daft's Rust
            raise _unread(self.name, error) from error
        files = [path if remote else path.removeprefix("file://") for path in found]
        files = [path for path in files if not is_ignored(PurePosixPath(path).name)]
        return files if wild else self._images_among(files)

    def _images_among(self, files: list[str]) -> list[str]:
        """Of a folder in an object store, where names have to do."""
        images = [path for path in files if PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES]
        if len(images) < len(files):
            self.notes.append(f"left out {len(files) - len(images)} files that are not called like images")
        return images

    def _file(self, path: str) -> Iterator[Reference]:
        yield Reference(key=readable(path), place=path)

    def _shard(self, path: str) -> Iterator[Reference]:
        others = 0
        for member in shard_members(path, _quickly()):
            if isinstance(member, str):
                yield Reference(key=readable(path), place=path, kind="none", problem=member)
            elif PurePosixPath(member[0]).suffix.lower() not in IMAGE_SUFFIXES:
                others += 1
            else:
                name, position, size = member
                key = readable(f"{path}/{name}")
                yield Reference(key=key, place=path, kind="member", position=position, size=size)
        if others:
            self.notes.append(f"left out {others} files in {path} that are not called like images")

    def _parquet(self, path: str) -> Iterator[Reference]:
        import pyarrow as pa

        try:
            with opened_table(path, _quickly()) as file:
                schema, metadata = file.schema_arrow, file.metadata
                groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        except Exception as error:  # of pyarrow and Daft's Rust
            raise _unread(path, error) from error
        column = self._column(path, schema.names)
        kind = schema.field(column).type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            yield from self._paths(path, "parquet", column)
            return
        keys = iter(()) if self.key is None else self._values(path, "parquet", self.key)
        number = 0
        for group, rows in enumerate(groups):
            for row in range(rows):
                key = f"{path}#{number}" if self.key is None else str(next(keys))
                yield Reference(
                    key=readable(key), place=path, kind="cell", position=group, size=row, column=column
                )
                number += 1

    def _csv(self, path: str) -> Iterator[Reference]:
        yield from self._paths(path, "csv", None)

    def _jsonl(self, path: str) -> Iterator[Reference]:
        yield from self._paths(path, "jsonl", None)

    def _paths(self, table: str, kind: Kind, column: str | None) -> Iterator[Reference]:
        """Paths in a table; relative ones are relative to where it is."""
        column = column or self._column(table, self._frame(table, kind).column_names)
        keys = None if self.key is None else self._values(table, kind, self.key)
        for path in self._values(table, kind, column):
            key = path if keys is None else next(keys)
            if not isinstance(path, str) or not path:
                yield Reference(key=str(key), place=table, kind="none", problem="an empty cell")
            else:
                place = path if is_remote(path) else _beside(table, path)
                yield Reference(key=str(key), place=place)

    def _values(self, table: str, kind: Kind, column: str) -> Iterator[Any]:
        frame = self._frame(table, kind)
        self._check(table, column, frame.column_names)
        for batch in frame.select(column).to_arrow_iter():
            yield from batch.column(0).to_pylist()

    def _frame(self, table: str, kind: Kind) -> Any:
        daft = load_daft()
        readers = {"parquet": daft.read_parquet, "csv": daft.read_csv, "jsonl": daft.read_json}
        try:
            return readers[kind](table, io_config=_quickly())
        except Exception as error:  # of Daft's Rust
            raise _unread(table, error) from error

    def _column(self, table: str, names: list[str]) -> str:
        if self.column is not None:
            self._check(table, self.column, names)
            return self.column
        column = next((name for name in _COLUMNS if name in names), None)
        if column is None:
            raise ImageDataError(
                expected=f"a column of images in {table}, called {', '.join(_COLUMNS)} or as --column says",
                got=", ".join(names),
                fix="Name the column that has paths, or the bytes of files, with --column.",
            )
        return column

    def _check(self, table: str, column: str, names: list[str]) -> None:
        if column not in names:
            raise ImageDataError(
                expected=f"a column {column} in {table}", got=", ".join(names), fix="Name one of these."
            )


def _quickly() -> Any:
    """How stores are reached to list what is there: one that does not answer is given up in half a minute."""
    return io_config(s3_tries=5)


def _beside(table: str, path: str) -> str:
    if is_remote(table):
        return f"{table.rpartition('/')[0]}/{path}"
    return str(Path(table).parent / path)


def _nothing(name: str, got: str) -> ImageDataError:
    return ImageDataError(
        expected=f"images, tables or tar shards of one kind at {name}",
        got=got,
        fix="Check the path, or give a pattern such as 'photos/**/*.jpg' or 's3://bucket/*.tar'.",
    )


def _unread(name: str, error: Exception) -> ImageDataError:
    access = _ACCESS.get(name.partition("://")[0]) if is_remote(name) else None
    if access is None:
        return _nothing(name, reason(error))
    return ImageDataError(
        expected=f"an answer about {name}",
        got=reason(error),
        fix=f"Check the name, the network, and the environment: {access}.",
    )
