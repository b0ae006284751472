"""Processes that end at a chosen durable operation, and what they leave on the disk."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from diffusers_vae import storage

ENDED = 9
"""Exit code of a process that ended itself."""


class Disk:
    """A watcher of `storage` that counts operations and knows which files were written and not synced."""

    def __init__(self):
        self.count = 0
        self.operations: list[str] = []
        self.lossy: list[int] = []
        """Operations before which a power failure would lose something."""
        self.unsynced: set[Path] = set()
        self.written: set[Path] = set()
        """Files whose writing was announced."""
        self.announced: tuple = ("", None, None)

    def __call__(self, operation: str, path: Path, to: Path | None) -> None:
        self._done(*self.announced)
        self.announced = (operation, path.absolute(), to and to.absolute())
        if operation in ("open", "write"):
            self.written.add(path.absolute())
        if self.to_lose():
            self.lossy.append(self.count)
        self.at(self.count)
        self.operations.append(f"{operation} {os.path.relpath(to or path)}")
        self.count += 1

    def at(self, number: int) -> None:
        """What a subclass does before operation `number`, counted from 0."""

    def _done(self, operation: str, path: Path, to: Path | None) -> None:
        if operation in ("open", "write"):
            self.unsynced.add(path)
        elif operation in ("fsync", "unlink"):
            self.unsynced.discard(path)
        elif operation == "rename":
            moved = {file for file in self.unsynced if file == path or path in file.parents}
            self.unsynced = self.unsynced - moved | {to / file.relative_to(path) for file in moved}

    def to_lose(self) -> list[Path]:
        """Files with content that a power failure would empty now."""
        return [path for path in self.unsynced if path.is_file() and path.stat().st_size]


class End(Disk):
    """Ends the process at operation `number` and leaves the paths that a power failure would empty then in `lost`."""

    def __init__(self, number: int, lost: Path):
        super().__init__()
        self.number, self.lost = number, lost

    def at(self, number: int) -> None:
        if number == self.number:
            self.lost.write_text(json.dumps([str(path) for path in self.to_lose()]))
            os._exit(ENDED)


class Snapshots(Disk):
    """Copies the folder `root` as it would be left by an end at each operation, to `folder`/NUMBER, and by a power
    failure, to `folder`/NUMBER-power, where that differs.
    """

    def __init__(self, root: Path, folder: Path):
        super().__init__()
        self.root, self.folder = root.absolute(), folder

    def at(self, number: int) -> None:
        shutil.copytree(self.root, self.folder / f"{number:04d}")
        if number in self.lossy:
            copy_after_power_failure(self.root, self.to_lose(), self.folder / f"{number:04d}-power")


def copy_after_power_failure(root: Path, lost: Iterable[Path], to: Path) -> None:
    """Copy the folder `root` to `to`, where those files below it that were not synced are empty."""
    shutil.copytree(root, to)
    for path in lost:
        (to / path.relative_to(root)).write_bytes(b"")


def in_folder(work: Callable[[], object], folder: Path) -> None:
    """Do `work` in the working directory `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    work()


def watched(work: Callable[[], object], folder: Path, disk: Disk, rank: int = 0) -> None:
    """Do `work` in the working directory `folder` under the watcher `disk` of process `rank`, and leave the operations
    of each process, and which of them are lossy, in `folder`.operations-RANK. A file that gets its name at once must be
    written by `storage`, which announces it.
    """
    here = int(os.environ.get("RANK", "0"))
    disk = disk if here == rank else Disk()
    storage.watch(disk)
    opened = set()

    def note(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = Path(os.fsdecode(arguments[0])).absolute()
            if arguments[2] & (os.O_WRONLY | os.O_RDWR) and folder in path.parents and ".partial" not in str(path):
                opened.add(path)

    sys.addaudithook(note)
    in_folder(work, folder)
    storage.watch(None)
    unannounced = {path for path in opened - disk.written if path.is_file() and path.name != ".lock"}
    assert not unannounced, f"written without storage: {unannounced}"
    _operations_file(folder, here).write_text(json.dumps([disk.operations, disk.lossy]))


def operations(folder: Path, rank: int = 0) -> tuple[list[str], list[int]]:
    """The operations of process `rank` that `watched` saw in `folder`, and the numbers of the lossy ones."""
    return tuple(json.loads(_operations_file(folder, rank).read_text()))


def _operations_file(folder: Path, rank: int) -> Path:
    return folder.with_name(f"{folder.name}.operations-{rank}")


def state_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but locks, and every empty folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock":
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_dir() and not any(path.iterdir()):
            found[path.relative_to(folder).as_posix()] = "empty folder"
    return found
