"""Image files: where they lie, packed into archives, damaged; disks without room."""

import shutil
import tarfile
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from diffusers_vae.data import ImageSet


def paths_of(image_set) -> list[Path]:
    """The file of each image of a folder."""
    return [image_set.records.store.paths[row] for row in image_set.records.rows]


@dataclass(frozen=True)
class ByIndex:
    """An image set as torch's `DataLoader` reads one: a batch at a time."""

    images: ImageSet

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices):
        return self.images.read(indices)


def pixels_of(read):
    """Collates what workers of a `DataLoader` read; by name, since they may be other programs."""
    return read.pixels


def copy_checkout(folder: Path):
    """Copy this checkout without what was built or trained in it, so that builds write elsewhere."""
    left_out = (".git", "__pycache__", "*.egg-info", "build", "dist", "runs", "data.tar")
    shutil.copytree(Path(__file__).parents[2], folder, ignore=shutil.ignore_patterns(*left_out))


def files_of(folder):
    return [(path, path.relative_to(folder).as_posix()) for path in sorted(folder.rglob("*")) if path.is_file()]


def zipped(folder, archive, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(archive, "w", compression) as opened:
        for path, name in files_of(folder):
            opened.write(path, name)
        opened.writestr("__MACOSX/cat/._0.png", b"no image")
    return archive


def tarred(folder, archive, prefix="./"):
    with tarfile.open(archive, "w") as opened:
        for path, name in files_of(folder):
            opened.add(path, prefix + name)
    return archive


def pack(kind, folder, target):
    if kind == "folder":
        return folder
    if kind == "tar":
        return tarred(folder, target.with_suffix(".tar"))
    if kind == "zip":
        return zipped(folder, target.with_suffix(".zip"))
    if kind == "zip, stored":
        return zipped(folder, target.with_suffix(".zip"), zipfile.ZIP_STORED)
    target.mkdir()
    for name in ("ship", "cat"):  # shards beside each other
        part = target.parent / f"only {name}"
        shutil.copytree(folder / name, part / name)
        tarred(part, target / f"00{len(name)}.tar")
    return target


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def filled(disk):
    """Fill a disk to its last block; the file that does."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    return filler
