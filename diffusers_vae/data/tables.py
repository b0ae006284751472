"""Images in table columns: tables of Hugging Face's `datasets`, prepared on the disk, or streamed Parquet files."""

from __future__ import annotations

import io
import os
import posixpath
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ..untrusted import Reader, open_beside_others
from .store import WHOLE, Store, find_row

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import Array, Buffer

ENDING = 32
"""Bytes of an image that distinguish it from others of its size: they include a PNG's checksums."""
GROUP = np.dtype(
    [("file", np.int64), ("number", np.int64), ("first", np.int64), ("rows", np.int64), ("bytes", np.int64)]
)
"""Row group: index of its file, its index in the file, and the index of its first row in the file."""


class RowStore(Store):
    """Images in a column of one or more tables, `parts` by name, in sequence; `root` is the name of the set for people.
    A value is the bytes of an image file, or has them as `bytes` with a `path`, or is a file at `path`. This must be in
    one of `folders`, because the author of the rows could name any file.
    """

    def __init__(self, root: str, parts: Mapping[str, Dataset], column: str, folders: Sequence[str] = ()):
        self.root, self.column, self.names, self.folders = root, column, list(parts), folders
        self.tables = [part.select_columns(column).with_format("arrow") for part in parts.values()]
        self.ends = np.cumsum([len(table) for table in self.tables])

    def name(self, row: int) -> str:
        _, path = self._value(row)
        return f"{self.root}, {self.key(row)}" + (f" ({Path(path).name})" if path else "")

    def key(self, row: int) -> str:
        part, index = find_row(self.ends, row)
        return f"{self.names[part]}, row {index}"

    def identity(self, row: int) -> bytes:
        content, path = self._value(row)
        ending = b"" if content is None else content[-ENDING:].to_pybytes()
        return f"{self.key(row)}\0{Path(path or '').name}\0{self.size(row)}\0".encode() + ending

    @cached_property
    def total(self) -> int:
        stored = sum(table.data.nbytes for table in self.tables)
        if stored > WHOLE:
            return stored
        return sum(map(self.size, range(int(self.ends[-1]))))  # including files that rows name

    def size(self, row: int) -> int:
        content, path = self._value(row)
        if content is not None:
            return content.size
        file = self._file(path)
        return file.stat().st_size if file and file.is_file() else 0

    def opener(self, row: int, whole: bool) -> Callable[[], BinaryIO]:
        if not whole:
            return lambda: self._open(row)

        def opened() -> BinaryIO:
            with self._open(row) as file:
                return io.BytesIO(file.read())  # Pillow reads faster from memory

        return opened

    def _value(self, row: int) -> tuple[Buffer | None, str | None]:
        """Return the bytes, as an Arrow buffer that is not read yet, and the path; one or both are None."""
        part, index = find_row(self.ends, row)
        (value,) = self.tables[part][index][self.column]
        path = None
        if value.is_valid and value.type.num_fields:
            path = value["path"].as_py() if value.type.get_field_index("path") >= 0 else None
            value = value["bytes"]
        return (value.as_buffer() if value.is_valid else None), path

    def _open(self, row: int) -> BinaryIO:
        from pyarrow import BufferReader

        content, path = self._value(row)
        if content is not None:
            return Reader(BufferReader(content))  # a header reads no more than it needs
        if path is None:
            raise FileNotFoundError("there is none in the row")
        if (file := self._file(path)) is None:
            raise ValueError(f"the row names a file outside of the folder of the set, {path}, which is not read")
        return open_beside_others(file)

    def _file(self, path: str | None) -> Path | None:
        """Return the file that a row names, if it is in one of the folders."""
        for folder in self.folders if path else ():
            file = os.path.normpath(os.path.join(folder, path or ""))
            if Path(file).is_relative_to(folder):
                return Path(file)
        return None


@dataclass
class _Kept:
    """Row groups that this process has in memory, and their lock: neither survives a fork."""

    process: int
    groups: dict[int, tuple[Array, int, int]] = field(default_factory=dict)
    """Values, number of rows not yet requested, and the count of `rows` at the last request."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    rows: int = 0
    """Number of requested rows."""


class ParquetStore(Store):
    """Images in a column of Parquet files, in the order of `groups`. A row group is read when one of its rows is
    requested, and released after all were, or after `patience` rows of others were read without it.
    """

    def __init__(self, root: str, files: Sequence[str], groups: np.ndarray, column: str, patience: int):
        self.root, self.files, self.groups, self.column, self.patience = root, files, groups, column, patience
        paths = [PurePosixPath(file.replace("\\", "/")) for file in files]
        above = posixpath.commonpath([path.parent for path in paths])
        self.names = [str(path.relative_to(above)) for path in paths]  # independent of the files' location
        self.ends = groups["rows"].cumsum()
        self._kept: _Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    def let_go(self) -> None:
        """Release all row groups."""
        self._kept = None

    def name(self, row: int) -> str:
        return f"{self.root}, {self.key(row)}"

    def key(self, row: int) -> str:
        number, index = find_row(self.ends, row)
        group = self.groups[number]
        return f"{self.names[group['file']]}, row {group['first'] + index}"

    def identity(self, row: int) -> bytes:
        number, _ = find_row(self.ends, row)
        return f"{self.key(row)}\0{self.groups['bytes'][number]}\0".encode()

    def size(self, row: int) -> int:
        return len(self.content(row))

    def content(self, row: int) -> bytes:
        value = self._value(row)
        if not value.is_valid:
            raise ValueError(f"cannot read the image {self.name(row)}: there is none in the row")
        return value.as_buffer().to_pybytes()

    def opener(self, row: int, whole: bool) -> Callable[[], BinaryIO]:
        content = self.content(row)  # read first, so that a storage error is not reported as an image error
        return lambda: io.BytesIO(content)

    def _value(self, row: int) -> Any:
        kept = self._kept
        if kept is None or kept.process != os.getpid():
            kept = self._kept = _Kept(os.getpid())
        number, index = find_row(self.ends, row)
        with kept.lock:
            kept.rows += 1
            if number not in kept.groups:
                for old in [old for old, (*_, asked) in kept.groups.items() if kept.rows - asked > self.patience]:
                    del kept.groups[old]
                kept.groups[number] = self._read_group(number), int(self.groups["rows"][number]), 0
            values, left, _ = kept.groups.pop(number)
            if left > 1:
                kept.groups[number] = values, left - 1, kept.rows
        return values[index]

    def _read_group(self, number: int) -> Array:
        """Read the images' bytes of a row group."""
        import fsspec
        from pyarrow import types
        from pyarrow.parquet import ParquetFile

        group = self.groups[number]
        path = self.files[group["file"]]
        with naming(f"row group {group['number']} of {path}"):
            with fsspec.open(path, "rb") as file, ParquetFile(file) as parquet:
                table = parquet.read_row_group(int(group["number"]), columns=[self.column], use_threads=False)
            if len(table) != group["rows"]:
                raise ValueError(
                    f"it is damaged: it has {len(table):,} rows, not {group['rows']:,} as the footer states"
                )
            values = table.column(0).combine_chunks()
        return values.field("bytes") if types.is_struct(values.type) else values


@contextmanager
def naming(what: str) -> Generator[None]:
    """Convert errors while reading a file into a ValueError or an OSError that begins with `what`."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # pyarrow raises nearly any error for damaged files
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"cannot read {what}: {' '.join(str(error).split()).rstrip('.')}") from error
