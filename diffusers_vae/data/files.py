"""Files of a data set by name, in folders and archives."""

from __future__ import annotations

import io
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from ..images.grid import SIGNATURE
from ..untrusted import MAX_TEXT, MAX_UNPACKED, Reader, Unreachable, open_regular, read_bytes

ARCHIVES = (".tar", ".zip")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tar.xz", ".txz", ".tar.zst")
SECTIONS = {b"data", b"optimizer", b"run"}
"""Sections of a run's config.yaml that another program's is unlikely to have."""
OF_RUN = ("checkpoints", "lora", "model", "nonfinite", "pictures", "pipeline", "tensorboard")
"""Folders of a run or an evaluation."""
OWN_PICTURES, OWN_FOLDER = ("contact-sheet.png", "samples.png"), "reconstructions"
"""Default files and folders to which commands write pictures."""
LOCAL_HEADER = 30
"""Bytes of a zip archive's local header before the file name (PKWARE, APPNOTE.TXT, 4.3.7)."""


@dataclass(frozen=True)
class Member:
    """File in an archive, which any process and thread can read independently."""

    archive: str
    offset: int
    """Offset of the content in a tar, of the local header in a zip."""
    stored: int
    """Stored bytes of the content."""
    size: int
    """Unpacked bytes of the content."""
    crc: int | None = None
    """CRC-32 of the content, in a zip."""
    deflated: bool = False

    def open(self) -> BinaryIO:
        """Open the content, unchecked. Unless it is compressed, no more than requested is read."""
        return io.BytesIO(self.read()) if self.deflated else Reader(_Part(self))

    def read(self) -> bytes:
        """Return the content; ValueError if it is damaged."""
        with Reader(_Part(self)) as part:
            content = part.read(self.stored)
        if self.deflated:
            try:  # read one byte more than stated, to detect excess content
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, self.size + 1)
            except zlib.error as error:
                raise ValueError(f"it is damaged in the archive: {error}") from error
        # like zipfile, trust a zip's checksum even where its stated size is wrong
        whole = len(content) == self.size if self.crc is None else zlib.crc32(content) == self.crc
        if len(content) > self.size or not whole:
            raise ValueError("it is damaged in the archive")
        return content


class _Part(io.RawIOBase):
    """Raw bytes of a member in its archive."""

    def __init__(self, member: Member):
        try:
            self.file = open_regular(member.archive).detach()
        except FileNotFoundError as error:  # all images of the archive are missing
            raise Unreachable(str(error)) from error
        self.start, self.length, self.at = member.offset, member.stored, 0
        if member.crc is not None:  # the extra field may be longer than in the directory
            self.file.seek(member.offset)
            header = self.file.read(LOCAL_HEADER)
            self.start += LOCAL_HEADER + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence])
        return self.at

    def readinto(self, buffer: Any, /) -> int:
        self.file.seek(self.start + self.at)
        count = self.file.readinto(memoryview(buffer)[: max(0, self.length - self.at)]) or 0
        self.at += count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


class Files:
    """Files in `root`, a folder or an archive. Archives are listed like folders, and not unpacked.

    Hidden files are left out, and so are this package's outputs, which `outputs` lists. Links are followed, but no
    folder is read twice. FileNotFoundError if `root` is neither a folder nor an archive.
    """

    def __init__(self, root: Path):
        self.root = root
        self.members: dict[str, Member] = {}
        self.archives: dict[str, list[str]] = {}
        self.outputs: set[str] = set()
        if root.is_file() and root.suffix.lower() in ARCHIVES:
            self._list(str(root))
        elif not root.is_dir():
            _refuse_compressed(root.name)
            raise FileNotFoundError(
                f"data.root must be a folder of images or an archive of them ({', '.join(ARCHIVES)}), got "
                f"{root.resolve()}, which is {'neither' if root.exists() else 'not there'}"
            )

    def inside(self, folder: Path) -> dict[Path, bool]:
        """Return the entries of a folder or an archive, and whether each is a folder."""
        if folder.is_dir():
            folders, names = [], []
            for path in folder.iterdir():
                if not path.name.startswith("."):
                    (folders if path.is_dir() else names).append(path.name)
            self._leave_out_outputs(str(folder), folders, names)
            return {folder / name: True for name in folders} | {folder / name: False for name in names}
        found: dict[Path, bool] = {}
        for path in self.below(folder):
            first, *rest = path.relative_to(folder).parts
            found[folder / first] = found.get(folder / first, False) or bool(rest)
        return found

    def below(self, folder: Path) -> list[Path]:
        """Return all files in a folder or an archive, recursively and sorted; ValueError naming an archive that cannot
        be read, or that holds files that are also unpacked beside it.
        """
        if folder.is_file():
            return sorted(map(Path, self._list(str(folder))))
        if not folder.is_dir():  # in an archive
            archive = next(str(above) for above in folder.parents if str(above) in self.archives)
            return sorted(Path(path) for path in self.archives[archive] if path.startswith(f"{folder}{os.sep}"))
        paths, packed, read = [], [], set()
        for parent, folders, names in os.walk(folder, followlinks=True):
            if os.path.realpath(parent) in read:
                folders.clear()
                continue
            read.add(os.path.realpath(parent))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            self._leave_out_outputs(parent, folders, names)
            for path in (os.path.join(parent, name) for name in names if not name.startswith(".")):
                _refuse_compressed(path)
                if path.lower().endswith(ARCHIVES) and os.path.exists(path):
                    packed += self._list(path)
                else:
                    paths.append(path)
        unpacked = {Path(path).relative_to(folder).parts: path for path in paths} if packed else {}
        for path in packed:
            if twin := unpacked.get(self.folders_to(Path(path), folder)):
                raise ValueError(
                    f"{self.members[path].archive} holds a file that also lies unpacked beside it, {twin}: its images "
                    "would be there twice. Move one of the two elsewhere"
                )
        return sorted(map(Path, paths + packed))

    def folders_to(self, path: Path, folder: Path) -> tuple[str, ...]:
        """Return the names of folders from the folder to a file in it, without an archive's name."""
        member = self.members.get(str(path))
        archive = member and Path(member.archive)
        if archive is None or archive == folder or not archive.is_relative_to(folder):
            return path.relative_to(folder).parts
        return archive.parent.relative_to(folder).parts + path.relative_to(archive).parts

    def read(self, path: str, limit: int = MAX_TEXT) -> bytes:
        """Return the content of a file of at most `limit` bytes; ValueError naming it if it is larger, irregular or
        damaged.
        """
        member = self.members.get(path)
        if member is None:
            return read_bytes(path, limit)
        try:
            if member.size > limit:
                raise ValueError(f"it must hold at most {limit:,} bytes of text, got {member.size:,}")
            return member.read()
        except ValueError as error:
            raise ValueError(f"cannot read {path}: {error}") from error

    def exists(self, path: str) -> bool:
        """Return whether the file exists. An irregular file exists, and is rejected when it is read."""
        return path in self.members or (os.path.exists(path) and not os.path.isdir(path))

    def beside(self, path: str) -> set[str]:
        """Return the names of the files in the folder of a file, which may be in an archive."""
        folder = os.path.dirname(path)
        return self._names[folder] if path in self.members else set(os.listdir(folder or "."))

    def names_in(self, folder: str) -> Collection[str]:
        """Return the names of the files in a folder, also of an archive, and of the subfolders if it is on the disk."""
        return os.listdir(folder or ".") if os.path.isdir(folder or ".") else self._names.get(folder, set())

    @cached_property
    def unpacked(self) -> dict[str, list[str]]:
        """Return the files in archives by the paths they would have if unpacked beside the archive or into a folder of
        its name.
        """
        found: dict[str, list[str]] = {}
        for path, member in self.members.items():
            inside = os.path.relpath(path, member.archive)
            for folder in (os.path.dirname(member.archive), os.path.splitext(member.archive)[0]):
                found.setdefault(os.path.join(folder, inside), []).append(path)
        return found

    @cached_property
    def _names(self) -> dict[str, set[str]]:
        """Return the names of the files in archives, by folder."""
        names: dict[str, set[str]] = {}
        for path in self.members:
            names.setdefault(os.path.dirname(path), set()).add(os.path.basename(path))
        return names

    def _list(self, archive: str) -> list[str]:
        """Return the files in an archive, and add them to the members."""
        archive = str(Path(archive))  # as in the paths of its files
        if archive not in self.archives:
            found = _members(archive)
            self.members |= found
            names: dict[str, list[str]] = {}
            for path in found:
                names.setdefault(os.path.dirname(path), []).append(os.path.basename(path))
            outputs = {folder for folder, inside in names.items() if is_output(folder, inside, self.read)}
            self.outputs |= outputs
            inside = tuple(f"{folder}{os.sep}" for folder in outputs)
            self.archives[archive] = [path for path in found if not path.startswith(inside)] if inside else list(found)
        return self.archives[archive]

    def _leave_out_outputs(self, parent: str, folders: list[str], names: list[str]) -> None:
        """Remove this package's outputs from the names in a folder. If `root` itself is a run, it may also hold images:
        then only the folders of a run are removed.
        """
        written = is_output(parent, names, self.read)
        left_out = []
        if written and parent == str(self.root):
            left_out = [name for name in folders if name in OF_RUN]
        elif written:
            self.outputs.add(os.path.normpath(parent))
            folders.clear()
            names.clear()
        pictures = names if os.path.basename(parent) == OWN_FOLDER else {*OWN_PICTURES}.intersection(names)
        left_out += [name for name in pictures if is_own_picture(os.path.join(parent, name))]
        self.outputs |= {os.path.normpath(os.path.join(parent, name)) for name in left_out}
        folders[:] = [name for name in folders if name not in left_out]
        names[:] = [name for name in names if name not in left_out]


def is_output(folder: str, names: Collection[str], read: Callable[[str], bytes] = read_bytes) -> bool:
    """Return whether a folder is a run, an evaluation, a comparison or a latent cache, by the names of its files."""
    if "config.yaml" in names:
        with suppress(OSError, ValueError):
            if {*re.findall(rb"(?m)^(\w+):", read(os.path.join(folder, "config.yaml")))} >= SECTIONS:
                return True
    marks = ({"evaluation.json", "report.html"}, {"comparison.json", "comparison.png"})
    if any(mark <= {*names} for mark in marks):
        return True
    return "index.json" in names and any(re.fullmatch(r"shard-\d{5}\.safetensors", name) for name in names)


def is_own_picture(path: str) -> bool:
    """Return whether a command of this package wrote a picture."""
    try:
        with open_regular(path) as file:
            return SIGNATURE.encode() in file.read(256)
    except (OSError, ValueError):
        return False


def _refuse_compressed(path: str) -> None:
    if path.lower().endswith(COMPRESSED):
        raise ValueError(
            f"a compressed tar does not allow random access: pack the images of {path} in a .tar without compression, "
            "or move it elsewhere"
        )


def zip_entries(opened: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Return the files in a zip archive; ValueError naming a file that is encrypted, uses a compression other than
    deflate, is compressed and larger than `MAX_UNPACKED`, or overlaps another.
    """
    entries = sorted(opened.infolist(), key=lambda entry: entry.header_offset)
    starts = [entry.header_offset for entry in entries] + [opened.start_dir]
    for entry, following in zip(entries, starts[1:], strict=True):
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{entry.filename} is encrypted or packed otherwise than by deflate")
        if entry.compress_type == zipfile.ZIP_DEFLATED and entry.file_size > MAX_UNPACKED:
            raise ValueError(
                f"{entry.filename} unpacks to {entry.file_size:,} bytes, and a compressed file may unpack to at most "
                f"{MAX_UNPACKED:,}: store it without compression"
            )
        if entry.header_offset + LOCAL_HEADER + entry.compress_size > following:
            raise ValueError(f"{entry.filename} overlaps what follows it in the archive: pack it again")
    return [entry for entry in opened.infolist() if not entry.is_dir()]


def _holds_a_header(content: bytes) -> bool:
    """Return whether a tar header of a file begins at some block."""
    for at in range(0, len(content), tarfile.BLOCKSIZE):
        with suppress(tarfile.HeaderError):
            tarfile.TarInfo.frombuf(content[at : at + tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
            return True
    return False


def _members(archive: str) -> dict[str, Member]:
    """Return the files of an archive by their paths in it; ValueError naming the archive if it is damaged."""
    listed: dict[str, Member] = {}
    try:
        end = os.path.getsize(archive)
        if archive.lower().endswith(".zip"):
            with open_regular(archive) as file, zipfile.ZipFile(file) as opened:
                for entry in zip_entries(opened):
                    name = entry.filename if "/" in entry.filename else entry.filename.replace("\\", "/")
                    listed[name] = Member(
                        archive,
                        entry.header_offset,
                        entry.compress_size,
                        entry.file_size,
                        entry.CRC,
                        entry.compress_type == zipfile.ZIP_DEFLATED,
                    )
        else:
            with open_regular(archive) as file, tarfile.open(fileobj=file, mode="r:") as opened:
                for entry in opened:
                    if entry.islnk() or entry.issym():
                        raise ValueError(f"{entry.name} is a link; pack it with --dereference --hard-dereference")
                    if not entry.isreg():
                        continue
                    if entry.issparse():
                        raise ValueError(f"{entry.name} has holes; pack it without --sparse")
                    if not 0 <= entry.size <= end - entry.offset_data:
                        raise ValueError(f"it ends within {entry.name}")
                    listed[entry.name] = Member(archive, entry.offset_data, entry.size, entry.size)
                opened.fileobj.seek(opened.offset)
                if any(opened.fileobj.read(tarfile.BLOCKSIZE) or b"cut"):  # tarfile accepts any end
                    raise ValueError("it has no end, as if it was truncated; pack it again")
                if _holds_a_header(opened.fileobj.read(2**20)):  # tools ignore anything else
                    raise ValueError("it continues after its end, as concatenated tars do; pack it again")
    except Exception as error:  # on a damaged one, the readers raise nearly anything
        raise ValueError(f"cannot read the archive {archive}: {error}") from error
    files = {}
    for name, member in listed.items():
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise ValueError(f"cannot read the archive {archive}: {name} would lie outside of it")
        if not any(part.startswith((".", "__MACOSX")) for part in parts):
            files[os.path.join(archive, *parts)] = member
    return files
