"""What lies at a place: image files, arrays, or rows, here or on the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from ..untrusted import SUFFIXES
from .files import ARCHIVES, is_output
from .parts import TRAINING, part_of

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
"""What the name of a data set on the Hub looks like."""
PARQUET = ".parquet"


def was_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` has written it."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def is_hub_id(root: str) -> bool:
    """Whether `root` is nothing on this machine and can be a data set on the Hub."""
    return HUB_ID.fullmatch(root) is not None and not Path(root).exists()


ARRAYS = (".npy", ".npz")


def holds_arrays(path: Path) -> bool:
    """Whether `path` is a file of arrays, or a folder with one named as a training part: others may be images."""
    if path.suffix.lower() in ARRAYS:
        return True
    names = [file.name for file in path.iterdir() if file.suffix.lower() in ARRAYS] if path.is_dir() else []
    return any((part := part_of(name, True)) and part.word in TRAINING for name in names)


IMAGE_SUFFIXES = tuple(sorted((".npy", *SUFFIXES)))
"""Lower-case suffixes of the files of a folder that are read as images."""


def kind_at(root: str) -> Literal["folder", "array", "datasets"]:
    """Return the data.name of what lies at `root`: image files, arrays, or rows, here or on the Hub."""
    return "datasets" if holds_rows(root) else "array" if holds_arrays(Path(root)) else "folder"


def holds_rows(place: str) -> bool:
    """Whether data.name datasets reads it: a set on the Hub, a Parquet file, what `save_to_disk` has written, or a
    folder with Parquet files and with neither images nor archives.
    """
    path = Path(place)
    if not path.is_dir():
        return path.suffix.lower() == PARQUET or (is_hub_id(place) and path.suffix.lower() not in (*ARCHIVES, *ARRAYS))
    found = was_saved(path)
    for parent, folders, names in os.walk(path):
        if is_output(parent, names):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        suffixes = {Path(name).suffix.lower() for name in names}
        if suffixes & {*IMAGE_SUFFIXES, *ARCHIVES}:
            return False
        found |= PARQUET in suffixes
    return found
