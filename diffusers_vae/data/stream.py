"""Images from Parquet files that need not fit on a disk, local or on the Hub, one row group at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from .check import looked_at
from .config import DataConfig
from .order import Batches, streamed
from .rows import find_columns, find_parts, rows_builder, unused_splits
from .sets import Layout, Records, StoredImages
from .store import SAMPLE, file_digests
from .tables import GROUP, ParquetStore, naming

if TYPE_CHECKING:
    from pyarrow.parquet import FileMetaData

LOOKED_AT = 16
"""Number of images of a stream whose headers determine whether it is in colour."""


class StreamedImages(StoredImages):
    """The first images of a `ParquetStore`, or the others, trained on in the order of `order.streamed`."""

    lanes: tuple[int, int] = 1, 1
    """Number of parts of an epoch, by forwards of a step and by workers; a resumed run keeps them."""

    def __init__(self, config: DataConfig, records: Records, errors: tuple[str, ...] = ()):
        super().__init__(config, records, errors)
        assert isinstance(records.store, ParquetStore) and isinstance(records.rows, range)
        self.parquet, self.span = records.store, records.rows

    def batches(self, batch_size: int, seed: int, epoch: int, start: int) -> Batches:
        counts = np.diff(self.parquet.ends.clip(self.span.start, self.span.stop), prepend=self.span.start)
        assert counts.sum() == len(self) and (counts <= self.parquet.groups["rows"]).all()
        return streamed(counts[counts > 0], self.lanes, self.config.shuffle_buffer, batch_size, seed, epoch, start)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the row groups in the files' footers."""
        digest = hashlib.sha256(f"{self.span}\0".encode())
        for group in self.parquet.groups.tolist():
            digest.update(f"{self.parquet.names[group[0]]}\0{group[1:]}\0".encode())
        return digest.hexdigest()

    def contents(self) -> str | None:
        """Return the SHA-256 of fingerprint and files, by `file_digests`; None if some files are not on this
        machine.
        """
        files, digest = self.parquet.files, hashlib.sha256(self.fingerprint().encode())
        if not all(map(os.path.isfile, files)):
            return None
        for found in file_digests(files, SAMPLE):
            digest.update(found)
        return digest.hexdigest()


def load_stream(config: DataConfig, progress: bool) -> tuple[StreamedImages, StreamedImages, Layout]:
    """Return the training and the held-out images of a set of Parquet files, by their footers, and how they were read.
    In a set with one split, row groups are held out at random. OSError if there is no such set or access is denied,
    ValueError if its files are of another kind, unclear or damaged.
    """
    builder, root = rows_builder(config), config.described
    if builder.name != "parquet":
        raise ValueError(
            f"data.streaming needs Parquet files, got {root} of the kind {builder.name}. Leave data.streaming out, so "
            "that the set is prepared on the disk first, or write it as Parquet: `Dataset.to_parquet`; of many sets on "
            "the Hub, data.revision refs/convert/parquet is that"
        )
    found = {str(split): [*map(str, files)] for split, files in (builder.config.data_files or {}).items()}
    parts = find_parts(list(found), root)
    files = [file for part in parts for file in found[part]]
    with ThreadPoolExecutor(16) as pool:  # each thread waits for a file
        footers = pool.map(_footer, files)
        bar = tqdm(footers, "reading footers", len(files), unit="file", disable=not progress, leave=False)
        metadata, schemas = zip(*bar, strict=True)
    column = _column(config, schemas, files)
    groups = []
    for file_index, footer in enumerate(metadata):
        sizes = [footer.row_group(number) for number in range(footer.num_row_groups)]
        firsts = np.cumsum([0, *(size.num_rows for size in sizes)]).tolist()
        row_groups = [(file_index, n, firsts[n], size.num_rows, size.total_byte_size) for n, size in enumerate(sizes)]
        groups.append(np.array([group for group in row_groups if group[3]], dtype=GROUP))
    counts = [len(found[part]) for part in parts]
    none = groups[0][:0]  # for a set with one split
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
    # reading headers loads a row group, which is not kept: training reads it again in its turn
    train, held_out = looked_at(train, held_out, LOOKED_AT if config.channels is None else 0)
    store.let_go()
    return train, held_out, layout


def _footer(path: str) -> tuple[FileMetaData, Any]:
    """Return the metadata and the schema of a Parquet file."""
    import fsspec
    from pyarrow.parquet import ParquetFile

    with naming(path), fsspec.open(path, "rb") as file, ParquetFile(file) as parquet:
        return parquet.metadata, parquet.schema_arrow


def _column(config: DataConfig, schemas: Sequence[Any], files: Sequence[str]) -> str:
    """Return the column with the images, the same in all files."""
    from datasets import Features

    found = []
    for schema, file in {schema: file for schema, file in zip(schemas, files, strict=True)}.items():
        with naming(file):
            features = Features.from_arrow_schema(schema)
        found.append(find_columns(features, config, False).image)
    for schema, file in zip(schemas, files, strict=True):
        if found[0] not in schema.names or schema.field(found[0]).type != schemas[0].field(found[0]).type:
            raise ValueError(f"the column {found[0]} must be of the same type in all files, and is not so in {file}")
    return found[0]
