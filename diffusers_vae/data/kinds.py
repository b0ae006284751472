"""Kinds of data at a location: image files, arrays, or rows, on this machine or on the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from ..untrusted import SUFFIXES
from .files import ARCHIVES, is_output
from .parts import TRAINING, part_of

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
"""Pattern of the name of a Hub data set."""
PARQUET = ".parquet"


def was_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` of `datasets` wrote the folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def is_hub_id(root: str) -> bool:
    """Return whether `root` does not exist on this machine and may be a Hub data set."""
    return HUB_ID.fullmatch(root) is not None and not Path(root).exists()


ARRAYS = (".npy", ".npz")


def holds_arrays(path: Path) -> bool:
    """Return whether `path` is a file of arrays, or a folder with an array named as a training part: other arrays may
    be images.
    """
    if path.suffix.lower() in ARRAYS:
        return True
    names = [file.name for file in path.iterdir() if file.suffix.lower() in ARRAYS] if path.is_dir() else []
    return any((part := part_of(name, True)) and part.word in TRAINING for name in names)


IMAGE_SUFFIXES = tuple(sorted((".npy", *SUFFIXES)))
"""Lower-case suffixes of the files in a folder that are read as images."""


def kind_at(root: str) -> Literal["folder", "array", "datasets"]:
    """Return the data.name of what `root` names: image files, arrays or rows, on this machine or on the Hub."""
    return "datasets" if holds_rows(root) else "array" if holds_arrays(Path(root)) else "folder"


def holds_rows(root: str) -> bool:
    """Return whether data.name datasets reads `root`: a Hub data set, a Parquet file, a folder from `save_to_disk`, or
    a folder with Parquet files and with neither images nor archives.
    """
    path = Path(root)
    if not path.is_dir():
        return path.suffix.lower() == PARQUET or (is_hub_id(root) and path.suffix.lower() not in (*ARCHIVES, *ARRAYS))
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
