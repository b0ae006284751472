"""Stores of images: their names, bytes and pixels, by row."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from ..images.files import Header, read_header, read_image
from ..images.fit import Fit
from ..images.ranges import ValueRange
from ..images.raw_files import as_they_are, raw_header, read_raw, read_values
from ..silence import report_progress
from ..untrusted import open_beside_others, open_regular, unreadable
from .files import Files, Member
from .kinds import IMAGE_SUFFIXES

HEIF = (".heic", ".heics", ".heif", ".heifs", ".hif")
UNREAD = (
    *HEIF, ".arw", ".avif", ".bpg", ".cr2", ".cr3", ".cur", ".czi", ".dcm", ".dcx", ".dds", ".dicom", ".dng", ".emf",
    ".eps",
    ".exr", ".fit", ".fits", ".flif", ".fts", ".hdr", ".icns", ".jls", ".jxl", ".jxr", ".lsm", ".mha", ".mng", ".nd2",
    ".nef", ".nii", ".nii.gz", ".nrrd", ".nrw", ".orf", ".pcd", ".pcx", ".pef", ".pfm", ".psb", ".psd", ".qoi", ".raf",
    ".ras", ".rw2", ".sgi", ".sr2", ".srw", ".svg", ".svgz", ".svs", ".wmf", ".xbm", ".xcf", ".xpm",
)  # fmt: skip
"""Lower-case suffixes of other formats of images, HEIF among them unless pillow-heif is installed."""
RENAMED = re.compile(rf"({'|'.join(map(re.escape, IMAGE_SUFFIXES))})([^a-z.][^.]*|\.\d+)")
"""End of names such as photo.jpg.1 (wget), photo.jpg_large and photo.png?size=large."""
CONTENT = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|II\*\0|MM\0\*|....ftyp(avi|hei|mif)|.{128}DICM", re.DOTALL
)
"""First bytes of common image files."""
MAX_SNIFFED = 1000
"""Maximum number of files without a suffix whose first bytes are read."""


def left_out(files: Files, paths: Sequence[Path]) -> tuple[str, ...]:
    """Return files that look like images, by suffix, name or content, but are not read, each with advice."""
    found, sniffed = [], 0
    for path in paths:
        name, suffix = path.name.lower(), path.suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            continue
        if name.endswith(UNREAD):
            advice = "pip install pillow-heif, which reads it" if suffix in HEIF else "convert it to PNG or TIFF"
        elif match := RENAMED.search(name):
            advice = f"rename it to end in {match[1]}" if match.end() == len(name) else ""
        elif not suffix and sniffed < MAX_SNIFFED:
            sniffed += 1
            advice = "give it the suffix of its format" if CONTENT.match(_beginning(files, path)) else ""
        else:
            continue
        found += [f"{path}: {advice}"] * bool(advice)
    return tuple(found)


def _beginning(files: Files, path: Path) -> bytes:
    """Return the first bytes of a file, or none if it cannot be read."""
    member = files.members.get(str(path))
    with suppress(OSError, ValueError), member.open() if member else open_beside_others(path) as file:
        return file.read(132)
    return b""


WHOLE = 2**32
"""Maximum bytes of a set that is hashed completely. For a larger set, `SAMPLED` bytes of each file are hashed: a small
change of an uncompressed file may then go unnoticed, but changed pixels of a PNG or JPEG also change the last sample.
"""
SAMPLED, SAMPLE = 2**14, 2**12
"""Total sampled bytes per file, and bytes per sample. Samples are spread evenly over the file."""


def content_digest(file: BinaryIO, size: int, limit: int, sample: int) -> bytes:
    """Return 128 bits of the SHA-256 of an open file: of its `size` bytes, or of `limit` bytes in samples of
    `sample`.
    """
    digest = hashlib.sha256(f"{size}\0".encode())
    if size <= limit:
        while content := file.read(2**20):
            digest.update(content)
    else:
        for start in np.linspace(0, size - sample, max(2, limit // sample)).astype(np.int64).tolist():
            file.seek(start)
            digest.update(file.read(sample))
    return digest.digest()[:16]


def file_digests(paths: Sequence[str | Path], sample: int) -> Iterator[bytes]:
    """Yield the `content_digest` of each file: of all its bytes or, if the files exceed `WHOLE` bytes together, of an
    equal share of that for each file, in samples of `sample` bytes.
    """
    sizes = [os.path.getsize(path) for path in paths]
    limit = WHOLE if sum(sizes) <= WHOLE else max(SAMPLED, WHOLE // len(sizes))
    for path, size in zip(paths, sizes, strict=True):
        with open_regular(path) as file:
            yield content_digest(file, size, limit, sample)
        report_progress()


def find_row(ends: np.ndarray, row: int) -> tuple[int, int]:
    """Return the part that contains a row, and the row's index in it, for parts that end at `ends`."""
    part = int(ends.searchsorted(row, side="right"))
    return part, row - (int(ends[part - 1]) if part else 0)


class Store:
    """Images of any size, one per row, which any process and thread can read independently. In the base class, their
    bytes are those of image files, from any source.
    """

    def name(self, row: int) -> str:
        """Return the name of an image for people: its file, or another location."""
        raise NotImplementedError

    def key(self, row: int) -> str:
        """Return text that identifies a row independent of the set's location; positions of crops depend on it."""
        raise NotImplementedError

    def identity(self, row: int) -> bytes:
        """Return bytes that identify an image as far as possible without reading it."""
        raise NotImplementedError

    def size(self, row: int) -> int:
        """Return the number of stored bytes."""
        raise NotImplementedError

    @cached_property
    def total(self) -> int:
        """Return the bytes of all images."""
        raise NotImplementedError

    def opener(self, row: int, whole: bool) -> Callable[[], BinaryIO]:
        """Return a function that opens the bytes of an image, to read all of them or the beginning."""
        raise NotImplementedError

    def content(self, row: int) -> bytes:
        """Return the stored bytes; ValueError naming the image if it is damaged."""
        try:
            with self.opener(row, True)() as file:
                return file.read()
        except (OSError, ValueError) as error:
            raise unreadable(self.name(row), error) from error

    def digest(self, row: int) -> bytes:
        """Return 16 bytes that depend only on the content, by `content_digest`."""
        limit = WHOLE if self.total <= WHOLE else SAMPLED
        try:
            with self.opener(row, False)() as file:
                return content_digest(file, self.size(row), limit, SAMPLE)
        except (FileNotFoundError, ValueError) as error:  # missing, or damaged in an archive
            return hashlib.sha256(type(error).__name__.encode()).digest()[:16]

    def is_raw(self, row: int, channels: int, value_range: ValueRange | None) -> bool:
        """Return whether values are read without conversion."""
        return as_they_are(channels, value_range)

    def header(self, row: int, channels: int, value_range: ValueRange | None) -> Header:
        """Read the header; ValueError naming the image if it cannot be read."""
        opener = self.opener(row, False)
        if self.is_raw(row, channels, value_range):
            return raw_header(self.name(row), channels, value_range, opener)
        return read_header(self.name(row), opener)

    def read(self, row: int, channels: int, value_range: ValueRange | None, fit: Fit) -> torch.Tensor:
        """Return the result of `fit` for the pixels, (B, C, height, width), by `read_raw` or `read_image`."""
        opener = self.opener(row, True)
        if self.is_raw(row, channels, value_range):
            return read_raw(self.name(row), channels, value_range, fit, opener)
        return read_image(self.name(row), channels, fit, opener)

    def values(self, row: int, channels: int) -> np.ndarray:
        """Return the stored values (C, H, W); ValueError naming the image if they cannot be read unconverted."""
        return read_values(self.name(row), channels, self.opener(row, True))[0]


class FileStore(Store):
    """Image files in `root`, including `members` of archives; `left_out` lists files that look like images."""

    def __init__(
        self, root: Path, paths: Sequence[Path], members: Mapping[str, Member], left_out: tuple[str, ...] = ()
    ):
        self.root, self.paths, self.left_out = root, paths, left_out
        self.members = {str(path): members[str(path)] for path in paths if str(path) in members}
        self.sizes = np.full(len(paths), -1)
        self.digests, self.digested = np.zeros((len(paths), 16), np.uint8), np.zeros(len(paths), bool)

    def name(self, row: int) -> str:
        return str(self.paths[row])

    def key(self, row: int) -> str:
        return self.paths[row].relative_to(self.root).as_posix()

    def identity(self, row: int) -> bytes:
        return f"{self.key(row)}\0{self.size(row)}\0".encode(errors="surrogateescape")

    def size(self, row: int) -> int:
        """Return the bytes, as of the first call, so that the fingerprint survives a deletion; 0 if missing then."""
        member = self._member(row)
        if member is not None:
            return member.size
        if self.sizes[row] < 0:
            try:
                self.sizes[row] = self.paths[row].stat().st_size
            except FileNotFoundError:
                self.sizes[row] = 0
        return int(self.sizes[row])

    @cached_property
    def total(self) -> int:
        return sum(map(self.size, range(len(self.paths))))

    def digest(self, row: int) -> bytes:
        """Return the digest, as of the first call."""
        if not self.digested[row]:
            self.digests[row] = np.frombuffer(super().digest(row), np.uint8)
            self.digested[row] = True
        return self.digests[row].tobytes()

    def opener(self, row: int, whole: bool) -> Callable[[], BinaryIO]:
        member = self._member(row)
        if member is None:
            return partial(open_beside_others, self.paths[row])
        return (lambda: io.BytesIO(member.read())) if whole else member.open

    def is_raw(self, row: int, channels: int, value_range: ValueRange | None) -> bool:
        return super().is_raw(row, channels, value_range) or self.paths[row].suffix.lower() == ".npy"

    def _member(self, row: int) -> Member | None:
        return self.members.get(str(self.paths[row])) if self.members else None
