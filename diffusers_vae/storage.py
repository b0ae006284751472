"""Files and folders that appear whole or not at all, checksums and folder locks: the only module that makes writes
durable.

Each durable operation is announced to the watcher before it happens, so that a test can end the process at that point.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file

from .messages import showable

logger = logging.getLogger(__name__)

Operation = Literal["open", "write", "fsync", "rename", "unlink", "mkdir", "rmdir"]
"""open: a file is created. write: it is filled or appended to."""
Watcher = Callable[[Operation, Path, Path | None], object]

_watcher: Watcher | None = None


def watch(watcher: Watcher | None) -> None:
    """Call `watcher(operation, path, new path of a rename)` in this process before each durable operation."""
    global _watcher
    _watcher = watcher


def _announce(operation: Operation, path: Path, to: Path | None = None) -> None:
    if _watcher is not None:
        _watcher(operation, path, to)


@contextmanager
def naming(path: Path) -> Generator[None]:
    """Convert every file system error in this context into an OSError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"cannot write {path}: {reason}") from error


@contextmanager
def scratch_folder() -> Generator[Path]:
    """Yield a temporary folder, and delete it at the end. An error for lack of space names it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield Path(folder)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            advice = "Set TMPDIR to a folder with more space"
            raise OSError(f"cannot write {folder}: {error.strerror}. {advice}") from error


def acquire(lock: FileLock, doing: str, setting: str) -> None:
    """Take the lock in a folder, which is created if it is missing. If another process holds the lock, wait some
    seconds, in case that is a remnant of a killed process.

    Args:
        setting: What names the folder.

    Raises:
        OSError: If another process is still `doing` something there.
    """
    folder = Path(lock.lock_file).parent
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{setting} must be a folder, got the file {folder.resolve()}")
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("%s is in use: waiting, in case a killed process still holds it", showable(folder))
            lock.acquire(timeout=15)
    except Timeout as error:
        raise OSError(
            f"another process is {doing} {folder.resolve()}: wait until it ends or choose another {setting}"
        ) from error
    except NotImplementedError:
        logger.warning("%s cannot be locked: make sure that no two processes use it", showable(folder))


ODD = "backslashreplace"
"""Error handler for file names that are not UTF-8: writing text must not fail because of them."""


def write_file(path: Path, text: str) -> None:
    """Replace `path` with a file that holds this text, atomically and durably."""
    with whole_file(path) as partial:
        _announce("write", partial)
        partial.write_text(text, encoding="utf-8", errors=ODD)


@contextmanager
def whole_file(path: Path) -> Generator[Path]:
    """Yield a path to write to. It durably replaces `path` at the end; an error leaves no trace of it. OSErrors name
    `path`.
    """
    partial = partial_of(path)
    with naming(path):
        try:
            _announce("open", partial)
            yield partial
            sync(partial)
            _rename(partial, path)
            sync(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def whole_files(folder: Path) -> Generator[Path]:
    """Yield an empty folder to write files to, in subfolders too. At the end, once all are on the disk, move each into
    `folder`; an error leaves `folder` unchanged. OSErrors name `folder`.
    """
    partial = partial_of(folder / "results")
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            begin_folder(partial)
            yield partial
            written = sorted(filter(Path.is_file, partial.rglob("*")))
            for path in written:
                _announce("write", path)
                sync(path)
            for path in written:
                target = folder / path.relative_to(partial)
                target.parent.mkdir(parents=True, exist_ok=True)
                _rename(path, target)
            sync(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_folder(path: Path) -> Generator[Path]:
    """Yield an empty folder to write to. It durably replaces `path` at the end; an error leaves no trace of it.
    OSErrors name `path`. Files are announced to the watcher once they are written.
    """
    partial = partial_of(path)
    with naming(path):
        try:
            begin_folder(partial)
            yield partial
            written = sorted(partial.rglob("*"))
            for entry in filter(Path.is_file, written):
                _announce("write", entry)
            for entry in written:
                sync(entry)
            finish_folder(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def begin_folder(partial: Path) -> None:
    """Create `partial` as an empty folder."""
    delete_folder(partial)
    _announce("mkdir", partial)
    partial.mkdir(parents=True)


def finish_folder(partial: Path, path: Path) -> None:
    """Replace `path` with the folder `partial`, whose files are on the disk."""
    sync(partial)
    old = path.with_name(f".{path.name}.old")
    delete_folder(old)
    if path.exists():
        _rename(path, old)
    _rename(partial, path)
    sync(path.parent)
    with suppress(OSError):  # `path` is complete; the next replacement deletes the old one
        delete_folder(old)


def discard_folder(path: Path) -> None:
    """Delete a folder that other processes look for: rename it first, so that a partly deleted one is never read."""
    old = path.with_name(f".{path.name}.old")
    _rename(path, old)
    delete_folder(old)


def delete_leftovers(folder: Path, pattern: str) -> None:
    """Delete partial or replaced versions of folders that match `pattern`, left in `folder` by killed processes."""
    for path in (path for kind in ("partial", "old") for path in sorted(folder.glob(f".{pattern}.{kind}"))):
        with suppress(OSError):
            delete_folder(path)


def delete_folder(path: Path) -> None:
    """Delete a folder with its content, if it exists. A link is deleted, not its target."""
    if path.is_symlink():
        return delete_file(path)
    for parent, folders, files in os.walk(path, topdown=False):
        links = [name for name in sorted(folders) if Path(parent, name).is_symlink()]
        for name in (*sorted(files), *links):
            delete_file(Path(parent, name))
        _announce("rmdir", Path(parent))
        os.rmdir(parent)


def delete_file(path: Path) -> None:
    """Delete a file, if it exists."""
    if path.exists() or path.is_symlink():
        _announce("unlink", path)
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Create a folder, if it does not exist."""
    if not path.is_dir():
        _announce("mkdir", path)
        path.mkdir(exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file; `sync` makes it durable."""
    _announce("open", path)
    with path.open("w", encoding="utf-8", errors=ODD) as file:
        _announce("write", path)
        file.write(text)


def append_text(path: Path, text: str) -> None:
    """Append to a file, or create it; `sync` makes it durable. OSErrors name `path`."""
    _announce("write", path)
    with naming(path), path.open("a", encoding="utf-8", errors=ODD) as file:
        file.write(text)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; `sync` makes it durable."""
    _announce("write", path)
    save_file(tensors, path, metadata)


def copy_file(source: Path, path: Path) -> None:
    """Copy a file; `sync` makes it durable."""
    _announce("write", path)
    shutil.copyfile(source, path)


UMASK = os.umask(0o077)  # setting it is the only way to read it
os.umask(UMASK)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk. Give safetensors files, which only the owner could read, the usual mode."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot sync folders
    if path.suffix == ".safetensors" or path.name.endswith(".safetensors.partial"):
        with suppress(OSError):  # not every file system has permissions
            path.chmod(0o666 & ~UMASK)
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        _announce("fsync", path)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(path: Path, to: Path) -> None:
    _announce("rename", path, to)
    path.replace(to)


def partial_of(path: Path) -> Path:
    """Return where `path` is written before it is complete."""
    return path.with_name(f".{path.name}.partial")


def described(path: Path) -> dict[str, Any]:
    """Return the size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = digest_of_file(file)
        return {"bytes": file.tell(), "sha256": digest}


def digest_of_file(file: BinaryIO) -> str:
    """Return the SHA-256 of the rest of an open file."""
    digest = hashlib.sha256()
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()


def digest_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of tensors with their names, dtypes and shapes, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a value as JSON, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
