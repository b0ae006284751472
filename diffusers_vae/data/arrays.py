"""Arrays of many images in NumPy files, read in place."""

from __future__ import annotations

import hashlib
import math
import re
import zipfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from PIL import Image

from ..images.files import Header
from ..images.fit import Fit
from ..images.ranges import ValueRange
from ..images.raw_files import as_they_are, read_npy_header
from ..untrusted import Unreachable, open_regular
from .files import zip_entries
from .kinds import ARRAYS
from .parts import HELDOUT, is_bare, is_plain, part_of, split_of
from .store import Store, file_digests, find_row

LABELS = ".labels.npy"
SAMPLES, SAMPLE = 64, 4096
"""Number and bytes of the samples that identify a file."""
SEEN = 100
"""Number of images whose values an error message reports."""
Headers = dict[str | None, tuple[tuple[int, ...], bool, np.dtype]]


class ImageArray:
    """Images in an `.npy`, read on demand, or in an array of an `.npz`, read into memory at once. Pickles do not
    contain the data.

    Args:
        path: Path of the file.
        column: Key of the array in an `.npz`; by default, its only array with the shape of images.
        channels: Number of channels, which identifies their axis.
        value_range: Range of the values.

    Raises:
        ValueError: Naming the file, if it is damaged or holds no such array.
    """

    def __init__(self, path: Path, column: str | None, channels: int | None, value_range: ValueRange | None):
        headers = _headers(path)
        if is_npz(path):
            column = _image_column(path, headers, column)
        elif column is not None:
            raise ValueError(f"data.image_column is the key of an array in an .npz, got {column} for {path}")
        self.path, self.column = path, column
        self.shape, fortran, self.dtype = headers[column]
        if self.dtype.hasobject:
            raise ValueError(f"{self} holds Python objects, which are not unpickled; store numbers, all of one shape")
        if self.dtype.kind not in "biuf":
            raise ValueError(f"{self} must hold real numbers, got {self.dtype}")
        if not math.prod(self.shape):
            raise ValueError(f"{self} is empty: its shape is {self.shape}")
        self.layout = _layout(str(self), self.shape, channels, value_range)
        values = _load(path, column)
        self.values = values if is_npz(path) else None
        digest = hashlib.sha256(f"{column} {self.dtype.str} {self.shape} {fortran}".encode())
        with open_regular(path) as file:
            for start in np.linspace(0, max(0, path.stat().st_size - SAMPLE), SAMPLES).astype(np.int64).tolist():
                file.seek(start)
                digest.update(file.read(SAMPLE))
        self.digest = digest.digest()
        if value_range is None and self.dtype.kind != "b" and self.dtype != np.uint8:
            first = [self.image(index) for index in range(min(SEEN, len(self)))]
            least, most = min(values.min() for values in first), max(values.max() for values in first)
            raise ValueError(
                f"{self} holds {self.dtype.name}, and nothing states what its values mean: those of its first "
                f"{len(first)} images lie in [{least}, {most}]. State data.value_range, [low, high], or store uint8"
            )

    def __str__(self) -> str:
        return f"{self.path}" if self.column is None else f"{self.path}, {self.column}"

    def __len__(self) -> int:
        return self.shape[0]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"values": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        if is_npz(self.path):
            self.values = _load(self.path, self.column)

    def image(self, index: int) -> np.ndarray:
        """Return an image (C, H, W) in the array's dtype; OSError or ValueError if the file no longer holds it."""
        if self.values is not None:
            values = self.values[index]
        else:
            mapped = np.lib.format.open_memmap(self.path, mode="r")
            if (mapped.shape, mapped.dtype) != (self.shape, self.dtype):
                raise ValueError(f"the file was changed: it now holds {mapped.shape} {mapped.dtype}")
            values = np.array(mapped[index])  # a copy, because mapped pages would count as our memory
        return values[None] if self.layout == "NHW" else np.moveaxis(values, -1, 0) if self.layout == "NHWC" else values

    def labels(self, column: str | None) -> np.ndarray | None:
        """Return labels (N,), integers or text, from that array of an `.npz`, or from NAME.labels.npy beside
        NAME.npy.
        """
        beside = self.path.with_name(self.path.stem + LABELS)
        if is_npz(self.path):
            if column is None:
                return None
            if column not in (headers := _headers(self.path)):
                raise ValueError(f"{self.path} has no array {column}: it holds {_listed(headers)}")
            name, labels = f"{self.path}, {column}", _load(self.path, column)
        elif column is not None:
            raise ValueError(
                f"data.label_column is the key of an array in an .npz, got {column}; labels of {self} lie in {beside}"
            )
        elif beside.exists():
            name, labels = str(beside), _load(beside)
        else:
            return None
        if labels.shape != (len(self),) or labels.dtype.kind not in "biuSU":
            raise ValueError(
                f"labels must be one integer or text for each of the {len(self):,} images of {self}, got shape "
                f"{labels.shape} and dtype {labels.dtype} in {name}"
            )
        return np.char.decode(labels, "utf-8") if labels.dtype.kind == "S" else np.asarray(labels)


class ArrayStore(Store):
    """Store of the images of several arrays, in sequence."""

    def __init__(self, arrays: Sequence[ImageArray]):
        self.arrays = arrays
        self.ends = np.cumsum([len(array) for array in arrays])

    def name(self, row: int) -> str:
        array, index = self._find(row)
        return f"{array}, image {index}"

    def key(self, row: int) -> str:
        array, index = self._find(row)
        return f"{array.path.name}/{index}"

    def identity(self, row: int) -> bytes:
        return self._find(row)[0].digest + f"{self.key(row)}\0".encode(errors="surrogateescape")

    def digest(self, row: int) -> bytes:
        array, index = self._find(row)
        return self._digests[array.path] + index.to_bytes(8, "big")

    @cached_property
    def _digests(self) -> dict[Path, bytes]:
        """Return a digest of each file's bytes, by `file_digests`."""
        paths = list(dict.fromkeys(array.path for array in self.arrays))
        return dict(zip(paths, file_digests(paths, 2**16), strict=True))

    def size(self, row: int) -> int:
        array, _ = self._find(row)
        return math.prod(array.shape[1:]) * array.dtype.itemsize

    def content(self, row: int) -> bytes:
        return self.values(row, 0).tobytes()

    def header(self, row: int, channels: int, value_range: ValueRange | None) -> Header:
        array, _ = self._find(row)
        sizes = dict(zip(array.layout, array.shape, strict=True))
        mode = f"{sizes.get('C', 1)}x {array.dtype.name}"
        if not as_they_are(channels, value_range):
            mode = "1" if array.dtype.kind == "b" else {1: "L", 3: "RGB"}[sizes.get("C", 1)]
        return Header(array.path.suffix[1:].upper(), mode, sizes["H"], sizes["W"])

    def read(self, row: int, channels: int, value_range: ValueRange | None, fit: Fit) -> torch.Tensor:
        values = self.values(row, channels)
        if value_range is not None:
            try:
                return fit(value_range.to_unit(values))
            except ValueError as error:
                raise ValueError(f"cannot read {self.name(row)}: {error}") from error
        if values.dtype.kind == "b":
            values = values * np.uint8(255)  # like a 1-bit file
        if len(values) == 3 and channels == 1:  # like a file
            values = np.asarray(Image.fromarray(np.ascontiguousarray(np.moveaxis(values, 0, -1))).convert("L"))[None]
        pixels = torch.from_numpy(np.array(values))  # a writable copy
        return fit(pixels.expand(channels, -1, -1))

    def values(self, row: int, channels: int) -> np.ndarray:
        array, index = self._find(row)
        try:
            return array.image(index)
        except OSError as error:  # concerns all images in the file
            raise Unreachable(f"cannot reach {self.name(row)}: {error}") from error
        except ValueError as error:
            raise ValueError(f"cannot read {self.name(row)}: {error}") from error

    def forget(self) -> None:
        """Release what was read into memory, when nothing more will be read."""
        for array in self.arrays:
            array.values = None

    def _find(self, row: int) -> tuple[ImageArray, int]:
        number, index = find_row(self.ends, row)
        return self.arrays[number], index


def array_files(root: Path) -> tuple[list[list[Path]], tuple[str, ...]]:
    """Return the files of arrays in `root`, or `root` itself, and notes about them. There are two lists, training and
    held-out files, if names mean parts (`parts.split_of`), and otherwise one.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: For labels without images, and if it is unclear what to train on.
    """
    if root.is_file() and root.suffix.lower() in ARRAYS:
        return [[root]], ()
    if not root.is_dir():
        kind = "neither" if root.exists() else "not there"
        raise FileNotFoundError(
            f"data.root must be an .npy, an .npz or a folder with such files, got {root.resolve()}, which is {kind}"
        )
    files = sorted(path for path in root.iterdir() if path.suffix.lower() in ARRAYS and path.name[0] != ".")
    labels = [path for path in files if path.name.endswith(LABELS)]
    images = [path for path in files if path not in labels]
    if not images:
        raise FileNotFoundError(f"no array in {root.resolve()}: none of {', '.join(ARRAYS)}")
    with_labels = {path.with_name(path.stem + LABELS) for path in images if not is_npz(path)}
    for path in labels:
        if path not in with_labels:
            raise ValueError(f"{path} are labels of {path.name.removesuffix(LABELS)}.npy, which is missing")
    named = {path.name: path for path in images}
    parts = {name: part for name in named if (part := part_of(name, True))}
    if split := split_of(named, lambda name: True, lambda: len(parts) == len(named)):
        groups = [[named[name] for name in group] for group in (split.training, split.heldout)]
        unused = sorted(named.keys() - {*split.training, *split.heldout})
        return groups, (f"unused, because other parts are used: {', '.join(unused)}",) if unused else ()
    bare = {name for name in parts if is_bare(name, True) and (is_plain(name, True) or parts[name].word in HELDOUT)}
    if bare and (bare < named.keys() or len({parts[name].word for name in bare}) > 1):
        raise ValueError(
            f"it is not clear what to train on in {root.resolve()}: its arrays are either in files named as a part to "
            f"train on and as one that is held out, such as train.npy and test.npy, or none is named so, got "
            f"{', '.join(sorted(named)[:10])}. Rename or move some"
        )
    doubtful = [] if bare else [*parts]
    note = f"used for training despite the name of a part, because no other part is beside it: {', '.join(doubtful)}"
    return [images], (note,) if doubtful else ()


def array_classes(
    parts: Sequence[Sequence[ImageArray]], column: str | None
) -> tuple[torch.Tensor | None, tuple[str, ...] | None]:
    """Return labels (N,) of all images, -1 in a part without labels, and the names of the classes: the sorted integers
    or texts of all parts. None if there are fewer than two.

    Raises:
        ValueError: If only some files of a part have labels.
    """
    found: list[tuple[np.ndarray, np.ndarray] | None] = []
    for arrays in parts:
        labels_of = [array.labels(column) for array in arrays]
        missing = [array.path for array, labels in zip(arrays, labels_of, strict=True) if labels is None]
        if 0 < len(missing) < len(labels_of):
            raise ValueError(f"{missing[0]} has no {missing[0].stem + LABELS} beside it, others have")
        found += [None if labels is None else np.unique(labels, return_inverse=True) for labels in labels_of]
    values = {str(value) for labels_of in found if labels_of is not None for value in labels_of[0].tolist()}
    if len(values) < 2:
        return None, None
    classes = sorted(values, key=int) if all(re.fullmatch("-?[0-9]+", name) for name in values) else sorted(values)
    class_of = {name: number for number, name in enumerate(classes)}
    counts = [len(array) for arrays in parts for array in arrays]
    numbers = [
        np.full(count, -1)
        if labels_of is None
        else np.array([class_of[str(value)] for value in labels_of[0].tolist()])[labels_of[1]]
        for count, labels_of in zip(counts, found, strict=True)
    ]
    return torch.from_numpy(np.concatenate(numbers)), tuple(classes)


def is_npz(path: Path) -> bool:
    """Return whether the file can hold several arrays."""
    return path.suffix.lower() == ".npz"


def _layout(name: str, shape: tuple[int, ...], channels: int | None, value_range: ValueRange | None) -> str:
    wanted = {channels} if channels and as_they_are(channels, value_range) else {1, 3}
    fitting = []
    if len(shape) == 3 and 1 in wanted and shape[2] > 4:  # otherwise it is one colour image
        fitting = ["NHW"]
    elif len(shape) == 4:
        fitting = [layout for layout, axis in (("NCHW", 1), ("NHWC", 3)) if shape[axis] in wanted]
    if len(fitting) == 1:
        return fitting[0]
    rule = "images must be (N, channels, height, width), (N, height, width, channels) or, of one, (N, height, width)"
    counts = " or ".join(map(str, sorted(wanted)))
    if fitting:
        raise ValueError(
            f"it is not clear where the channels of {name} lie: {rule}, and both the second and the last axis of "
            f"{shape} may be {counts} channels. Of one channel, take the axis away; else enlarge the images"
        )
    raise ValueError(f"{rule}, with {counts} channels for data.channels {channels or 'null'}, got {shape} in {name}")


def _headers(path: Path) -> Headers:
    """Return shape, whether in Fortran order, and dtype of the arrays in an `.npz`, by key, or of the one in an
    `.npy`.
    """
    try:
        with open_regular(path) as file:
            if not is_npz(path):
                return {None: read_npy_header(file)}
            with zipfile.ZipFile(file) as opened:
                return {
                    entry.filename.removesuffix(".npy"): read_npy_header(cast(BinaryIO, opened.open(entry)))
                    for entry in zip_entries(opened)
                }
    except Exception as error:  # readers raise nearly any error for damaged files
        raise ValueError(f"cannot read {path}: {error}") from error


def _load(path: Path, column: str | None = None) -> np.ndarray:
    """Return the array with this key in an `.npz`, in memory, or the array in an `.npy`, mapped.

    Raises:
        OSError: If the file cannot be reached.
        ValueError: If it is damaged or truncated, or holds Python objects.
    """
    try:
        with open_regular(path) as file:  # rejects a pipe
            if column is None:
                return np.lib.format.open_memmap(path, mode="r")
            with np.load(file) as arrays:
                return arrays[column]
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"cannot read {path}{f', {column}' if column else ''}: {error}") from error


def _image_column(path: Path, headers: Headers, column: str | None) -> str | None:
    fitting = [key for key, (shape, _, _) in headers.items() if len(shape) in (3, 4)]
    if column is None and len(fitting) == 1:
        return fitting[0]
    if column in headers:
        return column
    wrong = "several arrays" if fitting else "no array"
    wrong = f"no array {column}" if column else f"{wrong} with the shape of images"
    raise ValueError(f"{path} has {wrong}; name one by data.image_column, of {_listed(headers)}")


def _listed(headers: Headers) -> str:
    return "; ".join(f"{key} {shape} {dtype}" for key, (shape, _, dtype) in headers.items()) or "nothing"
