"""Images from Parquet files that need not fit on a disk, here or on the Hub, a row group at a time."""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from tqdm import tqdm

from .check import looked_at
from .config import DataConfig
from .order import Batches, streamed
from .rows import find_columns, find_parts, rows_builder, unused_splits
from .sets import Layout, Records, StoredImages
from .store import SAMPLE, Store, file_digests

if TYPE_CHECKING:
    from pyarrow import Array
    from pyarrow.parquet import FileMetaData

GROUP = np.dtype(
    [("file", np.int64), ("number", np.int64), ("first", np.int64), ("rows", np.int64), ("bytes", np.int64)]
)
"""A row group: the place of its file in a list, its own in the file, and of its first row there."""
LOOKED_AT = 16
"""Images of a stream whose headers say whether it is in colour."""


@dataclass
class _Open:
    """A row group in memory."""

    values: Array
    left: int
    """Rows that were not asked for yet."""
    asked: int
    """When one was, last, in rows that this process has read."""


@dataclass
class _Kept:
    """The row groups that this process has in memory, and the lock on them: neither outlives a fork."""

    process: int
    groups: dict[int, _Open] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    rows: int = 0


class ParquetStore(Store):
    """Images in a column of Parquet files, row group by row group, in the order of `groups`.

    A row group is read when a row of it is asked for, and let go when all were, or when none was while `patience` rows
    of others were read.
    """

    def __init__(self, root: str, files: Sequence[str], groups: np.ndarray, column: str, patience: int):
        self.root, self.files, self.groups, self.column, self.patience = root, files, groups, column, patience
        paths = [PurePosixPath(file.replace("\\", "/")) for file in files]
        above = posixpath.commonpath([path.parent for path in paths])
        self.names = [str(path.relative_to(above)) for path in paths]  # the same wherever the files lie
        self.ends = groups["rows"].cumsum()
        self._kept: _Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    def let_go(self) -> None:
        """Keep no row group in memory."""
        self._kept = None

    def name(self, row: int) -> str:
        return f"{self.root}, {self.key(row)}"

    def key(self, row: int) -> str:
        group, own = self._place(row)
        return f"{self.names[group['file']]}, row {group['first'] + own}"

    def identity(self, row: int) -> bytes:
        group, _ = self._place(row)
        return f"{self.key(row)}\0{group['bytes']}\0".encode()

    def size(self, row: int) -> int:
        return len(self.content(row))

    def content(self, row: int) -> bytes:
        value = self._value(row)
        if not value.is_valid:
            raise ValueError(f"cannot read the image {self.name(row)}: there is none in the row")
        return value.as_buffer().to_pybytes()

    def opener(self, row: int, whole: bool) -> Callable[[], BinaryIO]:
        content = self.content(row)  # now, so that a fault of the storage is not taken for one of the image
        return lambda: io.BytesIO(content)

    def _place(self, row: int) -> tuple[np.void, int]:
        """The row group, and row in it."""
        number = int(self.ends.searchsorted(row, side="right"))
        return self.groups[number], row - int(self.ends[number] - self.groups["rows"][number])

    def _value(self, row: int) -> Any:
        kept = self._kept
        if kept is None or kept.process != os.getpid():
            kept = self._kept = _Kept(os.getpid())
        number = int(self.ends.searchsorted(row, side="right"))
        with kept.lock:
            kept.rows += 1
            if number not in kept.groups:
                for old in [old for old, group in kept.groups.items() if kept.rows - group.asked > self.patience]:
                    del kept.groups[old]
                kept.groups[number] = _Open(self._read_group(number), int(self.groups["rows"][number]), 0)
            group = kept.groups[number]
            group.left, group.asked = group.left - 1, kept.rows
            if not group.left:
                del kept.groups[number]
        return group.values[row - int(self.ends[number] - self.groups["rows"][number])]

    def _read_group(self, number: int) -> Array:
        """The images' bytes, of a row group."""
        import fsspec
        from pyarrow import types
        from pyarrow.parquet import ParquetFile

        group = self.groups[number]
        path = self.files[group["file"]]
        with _naming(f"row group {group['number']} of {path}"):
            with fsspec.open(path, "rb") as file, ParquetFile(file) as parquet:
                table = parquet.read_row_group(int(group["number"]), columns=[self.column], use_threads=False)
            if len(table) != group["rows"]:
                raise ValueError(f"it is damaged: it has {len(table):,} rows, not {group['rows']:,} as the footer says")
            values = table.column(0).combine_chunks()
        return values.field("bytes") if types.is_struct(values.type) else values


class StreamedImages(StoredImages):
    """The first images of a `ParquetStore`, or the others, trained on in an order in which few row groups are needed at
    a time: `order.streamed`.

    Attributes:
        lanes: into how many parts an epoch is cut: by forwards of a step, and by workers. They decide the order, so
            that a run that continues keeps those that it was begun with.
    """

    lanes: tuple[int, int] = 1, 1

    def batches(self, batch_size: int, seed: int, epoch: int, start: int) -> Batches:
        rows = self.store.groups["rows"]
        counts = np.diff(self.store.ends.clip(self.rows.start, self.rows.stop), prepend=self.rows.start)
        assert counts.sum() == len(self) and (counts <= rows).all()
        return streamed(counts[counts > 0], self.lanes, self.config.shuffle_buffer, batch_size, seed, epoch, start)

    def fingerprint(self) -> str:
        """Of what the files' footers tell of the row groups."""
        store = self.store
        digest = hashlib.sha256(f"{self.rows}\0".encode())
        for group in store.groups.tolist():
            digest.update(f"{store.names[group[0]]}\0{group[1:]}\0".encode())
        return digest.hexdigest()

    def contents(self) -> str | None:
        """SHA-256 of the fingerprint and the bytes of the files, by `file_digests`; None if some are not on this
        machine, where `data.revision` names a version.
        """
        files, digest = self.store.files, hashlib.sha256(self.fingerprint().encode())
        if not all(map(os.path.isfile, files)):
            return None
        for found in file_digests(files, SAMPLE):
            digest.update(found)
        return digest.hexdigest()


def load_stream(config: DataConfig, progress: bool) -> tuple[StreamedImages, StreamedImages, Layout]:
    """The training and the held-out images of a set of Parquet files, of which the footers alone are read now, and how
    they were read. Of a set with one split, the held-out ones are those of row groups at random.

    Raises:
        OSError: when there is no such set, or none that may be read.
        ValueError: when its files are of another kind, it is not clear what is in them, or one is damaged.
    """
    builder, root = rows_builder(config), config.described
    if builder.name != "parquet":
        raise ValueError(
            f"data.streaming needs Parquet files, got {root} of the kind {builder.name}. Leave data.streaming out, so "
            "that the set is prepared on the disk first, or write it as Parquet: `Dataset.to_parquet`; of many sets on "
            "the Hub, data.revision refs/convert/parquet is that"
        )
    found = {str(split): [str(file) for file in files] for split, files in builder.config.data_files.items()}
    parts = find_parts(list(found), root)
    files = [file for part in parts for file in found[part]]
    with ThreadPoolExecutor(16) as pool:  # of which each waits for its file
        footers = pool.map(_footer, files)
        bar = tqdm(footers, "reading footers", len(files), unit="file", disable=not progress, leave=False)
        metadata, schemas = zip(*bar, strict=True)
    column = _column(config, schemas, files)
    groups = []
    for place, footer in enumerate(metadata):
        sizes = [footer.row_group(number) for number in range(footer.num_row_groups)]
        firsts = np.cumsum([0, *(size.num_rows for size in sizes)]).tolist()
        own = [(place, n, firsts[n], size.num_rows, size.total_byte_size) for n, size in enumerate(sizes)]
        groups.append(np.array([group for group in own if group[3]], dtype=GROUP))
    counts = [len(found[part]) for part in parts]
    none = groups[0][:0]  # of a set with one split
    halves = [np.concatenate(groups[: counts[0]]), np.concatenate([none, *groups[counts[0] :]])]
    halves = [np.random.default_rng(0).permutation(half) for half in halves]
    total = sum(int(half["rows"].sum()) for half in halves)
    heldout = int(halves[1]["rows"].sum()) if len(parts) > 1 else max(1, round(total * config.heldout_fraction))
    if not 0 < heldout < total:
        raise ValueError(
            f"{root} must have images to train on and others to hold out, got {total - heldout} and {heldout}"
        )
    store = ParquetStore(root, files, np.concatenate(halves), column, 2 * config.shuffle_buffer)
    layout = Layout(len(parts) == 2, unused_splits(found, parts))
    halves = range(total - heldout), range(total - heldout, total)
    train, held_out = (StreamedImages(config, Records(store=store, rows=half)) for half in halves)
    # headers cost a row group, which is not kept: training reads it when its turn comes
    train, held_out = looked_at(train, held_out, LOOKED_AT if config.channels is None else 0)
    store.let_go()
    return train, held_out, layout


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Raise what goes wrong as a file is read as a ValueError or an OSError that begins with `what`."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # on a damaged file, pyarrow raises nearly anything
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"cannot read {what}: {' '.join(str(error).split()).rstrip('.')}") from error


def _footer(path: str) -> tuple[FileMetaData, Any]:
    """Of a Parquet file: what is in it, and its schema."""
    import fsspec
    from pyarrow.parquet import ParquetFile

    with _naming(path), fsspec.open(path, "rb") as file, ParquetFile(file) as parquet:
        return parquet.metadata, parquet.schema_arrow


def _column(config: DataConfig, schemas: Sequence[Any], files: Sequence[str]) -> str:
    """The one with the images, the same in all files."""
    from datasets import Features

    found = []
    for schema, file in {schema: file for schema, file in zip(schemas, files, strict=True)}.items():
        with _naming(file):
            features = Features.from_arrow_schema(schema)
        found.append(find_columns(features, config, False).image)
    for schema, file in zip(schemas, files, strict=True):
        if found[0] not in schema.names or schema.field(found[0]).type != schemas[0].field(found[0]).type:
            raise ValueError(f"the column {found[0]} must be of the same type in all files, and is not so in {file}")
    return found[0]
