"""Image sets, as batches by index: digits, torchvision's named sets, folders, archives, arrays, rows of tables."""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import math
import os
import pickle
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from ..fields import at_home, only_with, refuse_unread
from ..images.files import OVERSIZE, Header
from ..images.ranges import ValueRange
from ..messages import problem_list, showable
from ..silence import report_progress
from ..untrusted import MAX_PAGES, MAX_UNPACKED, open_regular
from .arrays import SUFFIXES as ARRAYS
from .arrays import ArrayStore, ImageArray, array_classes, array_files, holds_arrays
from .augmentation import Augmentation
from .captions import read_captions
from .files import ARCHIVES, Files, is_output
from .folders import Division, class_names, divide
from .order import MicroBatch, TrainingSet
from .rows import (
    PARQUET,
    RowStore,
    find_columns,
    find_parts,
    is_hub_id,
    open_rows,
    own_folders,
    read_labels,
    read_row_captions,
    unused_splits,
    was_saved,
)
from .store import IMAGE_SUFFIXES, FileStore, Store, left_out

logger = logging.getLogger(__name__)

PAGED = (".apng", ".avif", ".avifs", ".gif", ".heic", ".heics", ".heif", ".heifs", ".tif", ".tiff", ".webp")
"""Suffixes of files that may hold several images."""
OF_ROWS = ("subset", "revision", "image_column", "label_column", "caption_column")
"""Settings of `DataConfig` that belong to one data set of rows."""
OF_TRAINING = ("horizontal_flip", "vertical_flip", "color_jitter", "streaming", "shuffle_buffer", "lanes")
"""Those that change how a set is trained on, and not what is measured or encoded of it."""
GREY = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L")
"""Modes of Pillow's without colours."""
LOOKED_AT = 256
"""Images of each part whose headers are read first: they say whether a set is in colour, unless all are grey."""
MEASURED = 32
"""Number of training images that are checked for unused depth."""
MEMORY_LIMIT = 2**31
"""Bytes of pixels up to which a set is read once and kept in memory."""
IN_MEMORY = ("digits", "mnist", "qmnist", "fashion-mnist", "cifar10")
"""Names of sets whose images are all of one size, and in memory."""
PLACED = ("folder", "array", "datasets")
"""Names of sets that `data.root` says."""
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
Captions = list[tuple[str, ...]]
Loaded = tuple["ImageSet", "ImageSet", "Layout"]
T = TypeVar("T")


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are brought to one size."""

    name: Literal["digits", "mnist", "qmnist", "fashion-mnist", "cifar10", "folder", "array", "datasets"] | None = None
    """digits: scikit-learn's 1,797 embedded 8x8 digits, with a margin of one pixel. folder: image files below `root`.
    array: NumPy arrays of many images. datasets: what Hugging Face's `datasets` opens, on the Hub or here: Parquet,
    Arrow, WebDataset. The others: torchvision's. null: what lies at `root`; without it, digits."""
    root: str | None = None
    """Folder of the files, as torchvision lays them out; where torchvision's sets are downloaded to if missing (data).
    Of a folder, one with image files, zip archives and tars (WebDataset's shards) below it, or such an archive itself:
    archives are read where they are, without unpacking. Of arrays, an .npy or .npz, or a folder with such files, of
    (N, height, width), (N, channels, height, width) or (N, height, width, channels). Of datasets, NAMESPACE/NAME on the
    Hub, a folder or a .parquet file; it is prepared once in the cache of `datasets`, which takes as much room as the
    set."""
    subset: str | None = only_with(None, name=("datasets",))
    """Of datasets, which configuration of the set, where it has several."""
    revision: str | None = only_with(None, name=("datasets",))
    """Of datasets on the Hub, a branch, a tag or a commit; by default what is newest."""
    image_column: str | None = only_with(None, name=("datasets", "array"))
    """Of datasets, where the images are; by default the only column of type Image. One with the bytes of image files,
    alone or as `bytes` beside their `path`, must be named. Of an .npz, the key of its images; by default the only array
    with three or four axes."""
    label_column: str | None = only_with(None, name=("datasets", "array"), streaming=False)
    """Of datasets, where the classes are, whole numbers or words; by default the only column of type ClassLabel.
    Of an .npz, the key of the labels; by default there are none. An .npy has them in NAME.labels.npy beside it."""
    caption_column: str | None = only_with(None, name=("datasets",), streaming=False)
    """Of datasets, where the captions are, a string or a list of strings each, for what needs any; by default a column
    named text or caption."""
    resolution: int | tuple[int, int] = 32
    """Side of the images in pixels, or [height, width]."""
    channels: int | None = None
    """1: grey, 3: RGB, 4: RGBA without conversion; other numbers: files with that many channels, without conversion.
    null: 1 if the headers of all images say grey, else 3 (of a stream, some headers); config.yaml has the value."""
    value_range: tuple[float, float] | None = only_with(None, name=PLACED)
    """Of files: what their values mean, [low, high]. They are taken as they are, of whatever depth; low
    is -1 and high is 1 in model range, and a value outside is an error. It is saved beside the model, and undone where
    `diffusers-vae reconstruct` writes files. null: 8 bits a value; what has more, or other colours, is converted."""
    fit: Literal["crop", "pad"] = only_with("crop", crops=False)
    """crop: scale the image to cover the resolution, cut the centre. pad: black borders, scaled only if too large."""
    crops: int | Literal["random"] | None = only_with(None, name=PLACED)
    """So many crops of each image of a folder at its own resolution, at places drawn once, instead of the whole image
    brought to size; images smaller than the resolution are scaled up to cover it. Of the held-out images too. random:
    one of each image, at another place in every epoch; of the held-out images always at the same."""
    horizontal_flip: bool = False
    """Mirror every second training image, drawn anew in every epoch: for what looks as well the other way round."""
    vertical_flip: bool = False
    """Likewise, upside down: for pictures from above, of cells or of materials."""
    color_jitter: tuple[float, float, float, float] | None = None
    """[brightness, contrast, saturation, hue]: how far these of training images are changed at random at most, as in
    torchvision's ColorJitter; the model learns the colours that it is shown."""
    on_bad_image: Literal["stop", "skip"] = only_with("stop", name=PLACED)
    """What a file of a folder that cannot be read does. stop: an error that names it, before training starts if it
    shows when all are read or, in a set too large for memory, in their headers. skip: left out, counted and listed in
    bad_images.txt."""
    heldout_fraction: float = only_with(0.1, name=("digits", *PLACED))
    """Share of the images held out, at random but always the same, of a set without a held-out part. Parts are folders,
    archives, arrays or splits named train and validation, val, test or the like: docs/images.md."""
    streaming: bool = only_with(False, name=("datasets",))
    """Read Parquet files, of data.name datasets, a row group at a time while training, here or from the Hub, instead of
    preparing all on the disk first. Each epoch has its own order, in which row groups come at random and their images
    are shuffled among `shuffle_buffer`. Without labels and captions; files are not checked before."""
    shuffle_buffer: int = only_with(4096, streaming=True)
    """Images of a stream, over all processes, among which the next ones are drawn; their files are kept in memory."""
    lanes: tuple[int, int] | None = only_with(None, streaming=True)
    """Pieces of a stream that are read side by side: so many parts of a batch times so many batches in a row. null:
    as many as forwards of a step, over all processes, and workers, so that each row group is read once; a run that is
    continued keeps its own, and with them its order, whatever the number of processes."""
    num_workers: int = 2
    """Processes that read images, for sets that are too large to be kept in memory."""

    def __post_init__(self):
        at_home(self, "root")
        if self.root == "":
            raise ValueError("data.root must name a folder, a file or a data set on the Hub, got an empty text")
        if self.name is None and self.root is None and self.channels not in (None, 1):
            raise ValueError(
                f"data.channels {self.channels} needs images that are named: give data.root, a folder for example, or "
                "data.name; without both, they are scikit-learn's digits, which are grey"
            )
        if self.name is None:
            object.__setattr__(self, "name", "digits" if self.root is None else kind_at(self.root))
        if self.root is None:
            object.__setattr__(self, "root", "data")
        if self.channels is None and self.name in IN_MEMORY:
            object.__setattr__(self, "channels", 3 if self.name == "cifar10" else 1)
        for name, choices in (
            ("name", (*IN_MEMORY, *PLACED)),
            ("fit", ("crop", "pad")),
            ("on_bad_image", ("stop", "skip")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"data.{name} must be one of {', '.join(choices)}, got {getattr(self, name)}")
        if self.name == "digits" and self.root != "data":  # which is what an older config.yaml states
            raise ValueError(
                f"data.root {self.root} would be ignored with data.name digits: leave out data.name, or set it to what "
                f"lies there, one of {', '.join(PLACED)}; or leave out data.root"
            )
        refuse_unread("data", self)
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"data.channels must be at least 1, got {self.channels}")
        if self.value_range is not None:
            try:
                ValueRange(*self.value_range)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"data.value_range must be [low, high], two finite increasing numbers, got {list(self.value_range)}"
                ) from error
        if self.as_they_are and self.name in IN_MEMORY:
            raise ValueError(
                f"data.channels {self.channels} is for files, and the images of {self.name} have 1 or 3 channels"
            )
        if min(self.size) < 8:
            raise ValueError(f"data.resolution must be at least 8 pixels a side, got {self.resolution}")
        if self.crops not in (None, "random") and not (isinstance(self.crops, int) and self.crops >= 1):
            raise ValueError(f"data.crops must be at least 1, or random, got {self.crops}")
        for name in ("horizontal_flip", "vertical_flip"):
            if getattr(self, name) and self.name in ("digits", "mnist", "qmnist"):
                raise ValueError(f"data.{name} makes another sign of a digit: leave it out with data.name {self.name}")
        if self.color_jitter is not None:
            if self.channels not in (None, 1, 3):
                raise ValueError(f"data.color_jitter is for grey or RGB images, got data.channels {self.channels}")
            try:
                v2.ColorJitter(*self.color_jitter)
            except ValueError as error:
                raise ValueError(
                    "data.color_jitter must be [brightness, contrast, saturation, hue], each at least 0 and hue at "
                    f"most 0.5, got {list(self.color_jitter)}"
                ) from error
        if self.streaming and isinstance(self.crops, int):
            raise ValueError(f"of a stream, data.crops must be random or null, got {self.crops}")
        if self.shuffle_buffer < 1:
            raise ValueError(f"data.shuffle_buffer must be at least 1, got {self.shuffle_buffer}")
        if self.lanes is not None and min(self.lanes) < 1:
            raise ValueError(f"data.lanes must be at least 1 each, got {list(self.lanes)}")
        if not 0 < self.heldout_fraction < 1:
            raise ValueError(f"data.heldout_fraction must lie between 0 and 1, got {self.heldout_fraction}")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers must be at least 0, got {self.num_workers}")

    @property
    def described(self) -> str:
        """The set's name, of a folder or file its own, of one on the Hub with its namespace."""
        if self.name == "datasets":
            return self.root if is_hub_id(self.root) else Path(self.root).resolve().name
        return Path(self.root).resolve().name if self.name in ("folder", "array") else self.name

    @property
    def as_they_are(self) -> bool:
        """Whether the values in files are not converted to grey or RGB of 8 bits."""
        return self.value_range is not None or self.channels not in (None, 1, 3)

    @property
    def dtype(self) -> torch.dtype:
        """Of pixels as they are read: uint8 in [0, 255] or float32 in [0, 1]."""
        return torch.uint8 if self.value_range is None else torch.float32

    @property
    def resize(self) -> str:
        """How images of another size are brought to `resolution`, in words."""
        how = f"bicubic with antialiasing, on {'8-bit' if self.value_range is None else 'float32'} values"
        if self.crops is not None:
            places = "a place" if self.crops == "random" else f"{self.crops} places"
            return f"cut out at {places} of each, always the same; if smaller, scaled to cover ({how})"
        if self.name not in (*IN_MEMORY, "array") and not self.as_they_are:
            how += f"; JPEGs that are {2 * OVERSIZE} times as large or more, from a decode at reduced scale"
        if self.fit == "crop":
            return f"scaled to cover ({how}), then the centre is cut out"
        border = "black" if self.value_range is None else "the lowest value"
        return f"scaled if too large ({how}), then padded with {border}"

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images."""
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else tuple(self.resolution)

    @property
    def changes_images(self) -> str:
        """Settings that change a training image from epoch to epoch, as text; empty if there are none."""
        unchanged = {"horizontal_flip": False, "vertical_flip": False, "color_jitter": None}
        changing = [name for name, value in unchanged.items() if getattr(self, name) != value]
        changing += ["crops"] * (self.crops == "random")
        return ", ".join(f"data.{name} {getattr(self, name)}" for name in changing)


@dataclass(frozen=True)
class ReadImages:
    """What was asked for and could be read."""

    pixels: torch.Tensor
    """(B, C, H, W), uint8 in [0, 255] or float32 in [0, 1]."""
    kept: Sequence[int]
    """Places, in the indices asked for, of the B images."""
    errors: tuple[str, ...] = ()
    """Why the others could not be read, with their names."""
    stop: bool = False
    """Whether that is to stop the run."""
    unreachable: str = ""
    """Why nothing could be read, if that is no fault of the images."""

    def checked(self) -> ReadImages:
        """These; ValueError naming a file that cannot be read and is not to be skipped, OSError when they could not be
        reached. A worker does not raise it itself, since there it would arrive wrapped in a traceback.
        """
        if self.unreachable:
            raise OSError(f"{self.unreachable}. When it can be read again, the same command continues")
        if self.errors and self.stop:
            raise ValueError(
                f"{self.errors[0]}. Mend or remove it, or leave such files out with data.on_bad_image skip"
            )
        return self

    def blank(self) -> ReadImages:
        """One black image, for a process that is left without any and must take part all the same."""
        return ReadImages(self.pixels.new_zeros(1, *self.pixels.shape[1:]), [0])

    def pin_memory(self) -> ReadImages:
        """The same in page-locked memory, from which a device copies without waiting; torch's `DataLoader` calls it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        pinned = {name: value.pin_memory() for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **pinned)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What was read, by name."""
        return {"pixels": self.pixels}


@runtime_checkable
class ImageSet(TrainingSet, Protocol):
    """Images of one size, with or without labels; any first part is a fair sample, of a stream one of row groups."""

    labels: torch.Tensor | None
    """(N,) int64 classes."""
    classes: tuple[str, ...] | None
    """Name of each class."""
    captions: Captions | None
    """One or more of each image."""
    errors: tuple[str, ...]
    """Why files were left out so far, with their names."""
    files: str
    """What the images are and what is made of them, in a line for people."""

    @property
    def channels(self) -> int:
        """Number of channels of the images as they are read."""
        ...

    def __getitems__(self, indices: Sequence[int]) -> ReadImages:
        """The images at `indices`."""
        ...

    def name(self, index: int) -> str:
        """Of an image, for people: its file, or its number."""
        ...

    def first(self, count: int) -> ImageSet:
        """The first `count` images, which are a fair sample."""
        ...

    def fingerprint(self) -> str:
        """The same for the same images in the same order, and for others another, as far as that can be told without
        reading them.
        """
        ...

    def contents(self) -> str | None:
        """The same for the same images in the same order, and for others another, as far as that can be told by reading
        their files, in whole or in part; None where the fingerprint is of all pixels.
        """
        ...


@dataclass(frozen=True)
class Layout:
    """How the files of a set were read."""

    split: bool
    """Whether the set has a part to train on and one that is held out, and is not cut."""
    notes: tuple[str, ...] = ()
    """What is not used, and what is in spite of its name."""


class _Images(TrainingSet):
    """What sets of images have in common but for the pixels: labels (N,) or None, the names of the labels' classes,
    captions, the rows of a store that they come from, if any, and, of crops, the number of each among its row's.
    """

    augmentation: Augmentation | None = None
    """Of the images when they are trained on."""

    def __init__(
        self,
        labels: torch.Tensor | None = None,
        classes: tuple[str, ...] | None = None,
        captions: Captions | None = None,
        store: Store | None = None,
        rows: np.ndarray | None = None,
        crops: np.ndarray | None = None,
        errors: tuple[str, ...] = (),
        files: str = "",
    ):
        self.labels, self.classes, self.captions = labels, classes, captions
        self.store, self.rows, self.crops, self.errors, self.files = store, rows, crops, errors, files

    def about(self, indices: slice | np.ndarray | None = None) -> dict[str, Any]:
        """All of this by keyword, of the images at `indices`."""
        indices = slice(None) if indices is None else indices
        places = range(0 if self.captions is None else len(self.captions))
        chosen = places[indices] if isinstance(indices, slice) else indices
        return {
            "labels": None if self.labels is None else self.labels[indices],
            "classes": self.classes,
            "captions": None if self.captions is None else [self.captions[index] for index in chosen],
            "store": self.store,
            "rows": None if self.rows is None else self.rows[indices],
            "crops": None if self.crops is None else self.crops[indices],
            "errors": self.errors,
            "files": self.files,
        }

    def name(self, index: int) -> str:
        if self.store is None:
            return f"image {index}"
        name = self.store.name(int(self.rows[index]))
        return name if self.crops is None else f"{name}, crop {self.crops[index]}"

    def read(self, batch: MicroBatch) -> ReadImages:
        read = self._read(batch)
        return self.augmentation(read, batch) if self.augmentation else read

    def _read(self, batch: MicroBatch) -> ReadImages:
        return self.__getitems__(batch.indices)


class ArrayImages(_Images):
    """Images kept in memory: `pixels` (N, C, H, W), uint8 or float32 in [0, 1], and what `_Images` has.

    Only the pixels can be on another device than the CPU: `to`.
    """

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor | None = None, **about: Any):
        super().__init__(labels, **about)
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def channels(self) -> int:
        return self.pixels.shape[1]

    def __getitems__(self, indices: Sequence[int]) -> ReadImages:
        # several times faster on a CPU than to index with a list
        rows = torch.as_tensor(indices, dtype=torch.long)
        if self.pixels.is_cuda:  # from pinned memory, so that nothing waits for the copy
            rows = rows.pin_memory().to(self.pixels.device, non_blocking=True)
        return ReadImages(self.pixels.index_select(0, rows), range(len(indices)))

    def to(self, device: torch.device | str) -> ArrayImages:
        """The same images with their pixels on `device`."""
        return ArrayImages(self.pixels.to(device), **self.about())

    def first(self, count: int) -> ArrayImages:
        """The first `count` images, which are a fair sample."""
        return ArrayImages(self.pixels[:count], **self.about(slice(count)))

    def fingerprint(self) -> str:
        """Of all pixels."""
        return hashlib.sha256(self.pixels.cpu().contiguous().numpy().data).hexdigest()

    def contents(self) -> None:
        """None: the fingerprint is of all pixels."""


class StoredImages(_Images):
    """Images of a store, read on demand as `config` says, and what `_Images` has."""

    def __init__(self, config: DataConfig, store: Store, rows: np.ndarray, **about: Any):
        super().__init__(store=store, rows=rows, **about)
        self.config = config

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def channels(self) -> int:
        return self.config.channels

    def __getitems__(self, indices: Sequence[int]) -> ReadImages:
        return self._read_at(indices, (0,))

    def _read(self, batch: MicroBatch) -> ReadImages:
        return self._read_at(batch.indices, (batch.seed, batch.epoch))

    def _read_at(self, indices: Sequence[int], place: tuple[int, ...]) -> ReadImages:
        """The images at the indices; random crops at the place of this number."""
        config, pixels, kept, errors = self.config, [], [], []
        empty = torch.zeros(0, config.channels, *config.size, dtype=config.dtype)
        for number, index in enumerate(indices):
            crops = [place] if config.crops == "random" else []
            crops = crops if self.crops is None else [(int(self.crops[index]),)]
            try:
                pixels.append(self._read_one(index, crops)[0])
                kept.append(number)
            except ValueError as error:
                errors += [str(error)] * (str(error) not in errors)  # of two crops of a file
            except OSError as error:
                return ReadImages(empty, [], unreachable=str(error))
        stop = config.on_bad_image == "stop"
        return ReadImages(torch.stack(pixels) if pixels else empty, kept, tuple(errors), stop)

    def read_all(self, index: int) -> torch.Tensor:
        """Pixels (B, C, H, W): all crops of an image, of which this is a set of whole ones, or the image, B = 1.
        ValueError naming it when it cannot be read.
        """
        crops = {"random": 1, None: 0}.get(self.config.crops, self.config.crops)
        return self._read_one(index, [(crop,) for crop in range(crops)])

    def _read_one(self, index: int, crops: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """Pixels (B, C, H, W): the crops of these numbers of an image or, without, the whole, B = 1."""
        config, row = self.config, int(self.rows[index])

        def fit(pixels: torch.Tensor) -> torch.Tensor:
            if not crops:
                return _bring_to_size(pixels, config)[None]
            # of the name alone, so that an image more or less moves no crop of the others
            name = hashlib.sha256(self.store.key(row).encode(errors="surrogateescape")).digest()
            seeds = (np.random.SeedSequence([int.from_bytes(name, "big"), *crop]) for crop in crops)
            places = (np.random.default_rng(seed).random(2) for seed in seeds)
            return torch.stack([_bring_to_size(_cut(pixels, config.size, place), config) for place in places])

        # crops are of the image at its own resolution
        scaled = None if crops else lambda *size: _scaled_size(*size, config)
        return self.store.read(row, config, fit, scaled)

    def header(self, index: int) -> Header:
        """Of an image; ValueError naming it when that tells that it cannot be read."""
        return self.store.header(int(self.rows[index]), self.config)

    def first(self, count: int) -> StoredImages:
        """The first `count` images, which are a fair sample."""
        return type(self)(self.config, **self.about(slice(count)))

    def fingerprint(self) -> str:
        """Of what the store tells without reading, which would take as long as an epoch, and of the crops."""
        digest, known = hashlib.sha256(), {}
        if self.config.value_range is not None:
            digest.update(f"{ValueRange(*self.config.value_range)}\0".encode())
        for index, row in enumerate(self.rows.tolist()):
            if row not in known:  # crops share a file
                known[row] = self.store.identity(row)
            digest.update(known[row])
            digest.update(b"" if self.crops is None else f"crop {self.crops[index]}\0".encode())
        return digest.hexdigest()

    def contents(self) -> str | None:
        """SHA-256 of the fingerprint and the content of each image, or of samples of it in a set of more than
        `store.WHOLE` bytes.
        """
        digest = hashlib.sha256(self.fingerprint().encode())
        rows = list(dict.fromkeys(self.rows.tolist()))  # crops share a file
        for row in rows[:1]:
            self.store.digest(row)  # adds up the sizes of all, before several threads would
        with ThreadPoolExecutor() as pool:
            for found in pool.map(self.store.digest, rows):
                digest.update(found)
                report_progress()
        return digest.hexdigest()

    def without(self, bad: dict[int, str]) -> StoredImages:
        """The set without the images at the indices `bad`, which gives the reasons."""
        good = np.array([index for index in range(len(self)) if index not in bad], dtype=np.int64)
        errors = (*self.errors, *(bad[index] for index in sorted(bad)))
        return StoredImages(self.config, **self.about(good) | {"errors": errors})

    def seen_as(self, config: DataConfig, files: str) -> StoredImages:
        """The set as `config` says, with what its files are in words."""
        return type(self)(config, **self.about() | {"files": files})

    def cropped(self) -> StoredImages:
        """Of a set of whole images, the set of their crops: the first of each, then the second of each, and so on, so
        that a first part is a fair sample and neighbours are of different images. Without so many `config.crops`
        the set itself.
        """
        count = self.config.crops
        if not isinstance(count, int):
            return self
        every = np.tile(np.arange(len(self)), count)
        return StoredImages(self.config, **self.about(every) | {"crops": np.repeat(np.arange(count), len(self))})


def load_data(
    config: DataConfig, progress: bool = False, memory_limit: int | None = None, captions: bool = False
) -> tuple[ImageSet, ImageSet]:
    """The training and the held-out images.

    Args:
        config: which images.
        progress: show a bar while a folder is read, and say which files are skipped.
        memory_limit: bytes of pixels up to which the images of a folder are read now and kept, and not on demand; by
            default `MEMORY_LIMIT`.
        captions: read those of a folder too, as `read_captions` says, or of rows; else there are none, whatever text
            files mean.

    Raises:
        FileNotFoundError: saying which files go where, when they are missing and cannot be downloaded.
        OSError: saying what to do, when a data set on the Hub cannot be had.
        ValueError: for files that cannot be read, by name.
    """
    train, heldout, _ = load_with_layout(config, progress, memory_limit, captions)
    return train, heldout


def load_with_layout(
    config: DataConfig, progress: bool = False, memory_limit: int | None = None, captions: bool = False
) -> Loaded:
    """The images as `load_data` returns them, and how their files were read; with `progress`, its notes are logged."""
    stored = {"folder": _load_folder, "array": _load_arrays, "datasets": _load_rows}
    if config.streaming:
        from .stream import load_stream  # which needs this file

        train, heldout, layout = load_stream(config, progress)
    elif config.name in stored:
        limit = MEMORY_LIMIT if memory_limit is None else memory_limit
        train, heldout, layout = stored[config.name](config, progress, limit, captions)
    else:
        load = {"digits": _load_digits, "cifar10": _load_cifar10}.get(config.name, _load_mnist)
        parts = load(config)
        sizes = [tuple(part[0].shape[2:]) for part in parts for _ in part[0]]
        files = _in_words(config, len(sizes), {"RGB" if parts[0][0].shape[1] == 3 else "grey": len(sizes)}, sizes)
        train, heldout = (_in_memory(*part, config, files) for part in parts)
        layout = Layout(config.name != "digits")
    if layout.split and config.heldout_fraction != DataConfig.heldout_fraction:
        unused = f"data.heldout_fraction {config.heldout_fraction} is not used, since the set has a held-out part"
        layout = replace(layout, notes=(*layout.notes, unused))
    for note in layout.notes if progress else ():
        logger.warning("%s", showable(note))
    train.augmentation = Augmentation.of(config)
    return train, heldout, layout


def refuse_colours(images: ImageSet, config: DataConfig, source: str) -> None:
    """Raise ValueError where `config` leaves data.channels to the images, and they are in colour, for a model `source`
    of grey images: it would see photographs in grey.
    """
    if config.channels is None and images.channels != 1:
        raise ValueError(
            f"{source} takes grey images, and {config.described} has some in colour: --data.channels 1 reads them as "
            "grey"
        )


def load_split(
    config: DataConfig,
    split: str | None = None,
    progress: bool = False,
    captions: bool = False,
    default: Literal["held-out", "training"] = "held-out",
    memory_limit: int | None = None,
) -> tuple[ImageSet, str]:
    """The images of `split`, held-out, training or all, and which that is: by default `default`, but all of a folder
    or of arrays without parts. Progress, captions, memory_limit and errors are those of `load_data`.
    """
    if split not in (None, "held-out", "training", "all"):
        raise ValueError(f"split must be held-out, training or all, got {split}")
    train, heldout, layout = load_with_layout(config, progress, memory_limit, captions)
    if split is None:
        split = default if layout.split or config.name in IN_MEMORY else "all"
    if split != "all":
        return (train if split == "training" else heldout), split
    one, two = train.about(), heldout.about()
    both: dict[str, Any] = {"errors": train.errors + heldout.errors, "store": train.store, "files": train.files}
    if train.labels is not None and heldout.labels is not None:
        both |= {"labels": torch.cat([train.labels, heldout.labels]), "classes": train.classes}
    if train.captions is not None:
        both["captions"] = train.captions + heldout.captions
    both |= {name: np.concatenate([one[name], two[name]]) for name in ("rows", "crops") if one[name] is not None}
    if isinstance(train, StoredImages):
        return StoredImages(train.config, **both), split
    return ArrayImages(torch.cat([train.pixels, heldout.pixels]), **both), split


def _cut(pixels: torch.Tensor, size: tuple[int, int], place: np.ndarray) -> torch.Tensor:
    """The part of an image (C, H, W) of that size, or, when the image is smaller and must be scaled to cover it, what
    then fills it, `place` in [0, 1)^2 of the way from top left to bottom right.
    """
    height, width = pixels.shape[-2:]
    scale = max(1, size[0] / height, size[1] / width)
    rows, columns = min(height, math.ceil(size[0] / scale)), min(width, math.ceil(size[1] / scale))
    top, left = int(place[0] * (height - rows + 1)), int(place[1] * (width - columns + 1))
    return pixels[:, top : top + rows, left : left + columns]


def _scale(height: int, width: int, config: DataConfig) -> float:
    """By which an image of that size is multiplied; then its centre is cut out, or it is padded."""
    scales = (config.size[0] / height, config.size[1] / width)
    return max(scales) if config.fit == "crop" else min(1.0, *scales)


def _scaled_size(height: int, width: int, config: DataConfig) -> tuple[int, int]:
    scale = _scale(height, width, config)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _bring_to_size(pixels: torch.Tensor, config: DataConfig) -> torch.Tensor:
    height, width = pixels.shape[-2:]
    if (height, width) == config.size:
        return pixels
    scale = _scale(height, width, config)
    # what will be cut off anyway must not be enlarged first: a strip of 1x100000 pixels would take gigabytes
    needed = [math.ceil(4 * side / scale) for side in config.size]
    if height > needed[0] or width > needed[1]:
        pixels = transforms.center_crop(pixels, [min(height, needed[0]), min(width, needed[1])])
        height, width = pixels.shape[-2:]
    if scale != 1:
        size = list(_scaled_size(height, width, config))
        pixels = transforms.resize(pixels, size, transforms.InterpolationMode.BICUBIC, antialias=True)
        if pixels.is_floating_point():
            pixels = pixels.clamp(0, 1)  # it overshoots at edges
    return transforms.center_crop(pixels, list(config.size))  # pads with 0 where the image is smaller


def _in_memory(
    pixels: torch.Tensor, labels: torch.Tensor, classes: tuple[str, ...], config: DataConfig, files: str
) -> ArrayImages:
    if pixels.shape[1] == 1 and config.channels == 3:
        pixels = pixels.expand(-1, 3, -1, -1)
    elif pixels.shape[1] == 3 and config.channels == 1:
        pixels = transforms.rgb_to_grayscale(pixels)
    fitted = [_bring_to_size(chunk, config) for chunk in pixels.split(4096)]
    return ArrayImages(torch.cat(fitted), labels, classes=classes, files=files)


def _heldout_indices(length: int, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Train and held-out indices, shuffled; the same for every seed of a run, so that runs can be compared."""
    heldout = max(1, round(length * config.heldout_fraction))
    if heldout >= length:
        raise ValueError(f"no image is left to train on: {length} images, {heldout} of them held out")
    order = np.random.default_rng(0).permutation(length)
    return order[heldout:], order[:heldout]


def _load_digits(config: DataConfig) -> list[tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))
    pixels = torch.nn.functional.pad(pixels, (1, 1, 1, 1))  # the strokes touch the border of the 8x8 pixels
    labels = torch.from_numpy(digits.target.astype(np.int64))
    parts = map(torch.from_numpy, _heldout_indices(len(pixels), config))
    return [(pixels[part, None], labels[part], DIGITS) for part in parts]


def _mnist_files(name: str) -> list[str]:
    if name == "qmnist":
        parts = [("qmnist-train", "int"), ("qmnist-test", "int")]
    else:
        parts = [("train", "ubyte"), ("t10k", "ubyte")]
    rank = 2 if name == "qmnist" else 1  # QMNIST's labels are a table
    return [f"{part}-{kind}" for part, dtype in parts for kind in ("images-idx3-ubyte", f"labels-idx{rank}-{dtype}")]


def _load_mnist(config: DataConfig) -> list[tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]]:
    """torchvision reads unpacked files only; packed ones are unpacked in memory, so that a kill leaves none behind."""
    kind = {"mnist": datasets.MNIST, "qmnist": datasets.QMNIST, "fashion-mnist": datasets.FashionMNIST}[config.name]
    files = _mnist_files(config.name)
    raw = Path(config.root) / kind.__name__ / "raw"
    if not all((raw / file).exists() or (raw / f"{file}.gz").exists() for file in files):
        parts = [{"what": "train"}, {"what": "test"}] if config.name == "qmnist" else [{"train": True}]
        packed = [f"{file}.gz" for file in files]
        _download(lambda: [kind(config.root, download=True, **part) for part in parts], raw, packed)
    classes = tuple(map(str.lower, kind.classes)) if config.name == "fashion-mnist" else DIGITS
    loaded = []
    for images, labels in zip(files[::2], files[1::2], strict=True):
        pixels, targets = _read_idx(raw / images, 3), _read_idx(raw / labels, 2 if config.name == "qmnist" else 1)
        if len(pixels) != len(targets):
            raise ValueError(f"{raw} is damaged: {images} holds {len(pixels)} images, and {labels} {len(targets)}")
        loaded.append([pixels[:, None], (targets[:, 0] if targets.ndim == 2 else targets).long(), classes])
    if config.name == "qmnist":  # whose first 10,000 test images are those of MNIST
        loaded[1][:2] = [values[:10_000] for values in loaded[1][:2]]
    return [tuple(part) for part in loaded]


def _read_idx(path: Path, rank: int) -> torch.Tensor:
    """The array in a file of MNIST's format (LeCun et al. 1998), uint8 or int32, packed as `path`.gz if not there."""
    file = path if path.exists() else path.with_name(f"{path.name}.gz")
    try:
        with open_regular(file) as opened, opened if file == path else gzip.open(opened) as stored:
            content = stored.read(MAX_UNPACKED + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    if len(content) > MAX_UNPACKED:
        raise ValueError(f"{file} must hold at most {MAX_UNPACKED:,} bytes, got more")
    try:
        dtype = {8: np.dtype("u1"), 12: np.dtype(">i4")}[content[2]]
        if content[:2] != b"\0\0" or content[3] != rank:
            raise ValueError("wrong header")
        shape = np.frombuffer(content, ">u4", rank, 4)
        values = np.frombuffer(content, dtype, offset=4 + 4 * rank).reshape(shape)
    except (IndexError, KeyError, ValueError) as error:
        raise ValueError(f"{path.parent} is damaged: {path.name} is no IDX file of rank {rank}: {error}") from error
    return torch.from_numpy(values.astype(dtype.newbyteorder("=")))


def _load_cifar10(config: DataConfig) -> list[tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]]:
    """torchvision reads unpacked files only; packed ones are unpacked in memory, so that a kill leaves none behind."""
    kind, root = datasets.CIFAR10, Path(config.root)
    folder, packed = root / kind.base_folder, root / kind.filename
    if not (folder.exists() or packed.exists()):
        _download(lambda: kind(root, download=True), root, [packed.name])
    if folder.exists():
        content = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    elif check_integrity(str(packed), kind.tgz_md5):
        with tarfile.open(packed) as archive:
            content = {Path(entry.name).name: archive.extractfile(entry).read() for entry in archive if entry.isreg()}
    else:
        raise ValueError(f"{packed} is damaged or not CIFAR-10: its md5 is not {kind.tgz_md5}")
    read = {}
    for name, md5 in (*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])):
        if hashlib.md5(content.get(name, b""), usedforsecurity=False).hexdigest() != md5:
            raise ValueError(f"{folder} is damaged or not CIFAR-10: the md5 of {name} is not {md5}")
        read[name] = _ArrayUnpickler(io.BytesIO(content[name]), encoding="latin1").load()
    classes = tuple(map(str.lower, read[kind.meta["filename"]][kind.meta["key"]]))
    parts = [[read[name] for name, _ in listed] for listed in (kind.train_list, kind.test_list)]
    return [
        (
            torch.from_numpy(np.concatenate([batch["data"] for batch in part])).view(-1, 3, 32, 32),
            torch.tensor([label for batch in part for label in batch["labels"]]),
            classes,
        )
        for part in parts
    ]


ARRAY_NAMES = ("numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype", "_codecs.encode")


class _ArrayUnpickler(pickle.Unpickler):
    """Calls nothing but what makes an array of NumPy."""

    def find_class(self, module: str, name: str) -> Any:
        if module.replace("numpy._core", "numpy.core") + f".{name}" in ARRAY_NAMES:  # NumPy 2 has renamed it
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only arrays are read")


def _download(download, folder: Path, files: list[str]) -> None:
    try:
        download()
    except (OSError, RuntimeError) as error:
        names = ", ".join(files)
        raise FileNotFoundError(
            f"the data set is not there and cannot be downloaded ({error}). Put {names} into {folder.resolve()}, or "
            "point data.root to where they lie in torchvision's layout"
        ) from error


def _load_folder(config: DataConfig, progress: bool, memory_limit: int, captions: bool) -> Loaded:
    files = Files(Path(config.root))
    division = divide(files)
    for part in division.parts:
        part[:] = [part[i] for i in np.random.default_rng(0).permutation(len(part))]
    labels, classes = _labelled(files, division)
    parts, split = division.parts, len(division.parts) == 2
    if not split:
        ((found,), (of_all,)) = parts, labels
        indices = _heldout_indices(len(found), config)
        parts = [[found[i] for i in part] for part in indices]
        labels = [None if of_all is None else of_all[torch.from_numpy(part)] for part in indices]
    paths = [path for part in parts for path in part]
    told, notes = read_captions(files, paths) if captions else (None, [])
    ignored = left_out(files, division.others)
    if ignored and progress:
        logger.warning("%d files look like images and are left out:\n%s", len(ignored), problem_list(ignored))
    store, count = FileStore(files.root, paths, files.members, ignored), len(parts[0])
    train, heldout = (
        StoredImages(
            config,
            store,
            np.arange(len(paths))[part],
            labels=classed,
            classes=None if classed is None else classes,
            captions=None if told is None else told[part],
        )
        for part, classed in zip((slice(count), slice(count, None)), labels, strict=True)
    )
    layout = Layout(split, (*division.notes, *notes))
    return *_in_size(train, heldout, progress, memory_limit), layout


def _load_arrays(config: DataConfig, progress: bool, memory_limit: int, captions: bool) -> Loaded:
    groups, notes = array_files(Path(config.root))
    parts = [[ImageArray(path, config) for path in group] for group in groups]
    store = ArrayStore([array for arrays in parts for array in arrays])
    labels, classes = array_classes(parts, config.label_column)
    counts = [sum(map(len, arrays)) for arrays in parts]
    loaded = _in_size(*_stored(config, store, counts, labels, classes, None), progress, memory_limit, headers=False)
    if isinstance(loaded[0], ArrayImages):
        store.forget()
    return *loaded, Layout(len(groups) == 2, notes)


def _load_rows(config: DataConfig, progress: bool, memory_limit: int, captions: bool) -> Loaded:
    found, root = open_rows(config, progress), config.described
    parts = {name: found[name] for name in find_parts(list(found), root)}
    of_each = [find_columns(part.features, config, captions) for part in parts.values()]
    columns = of_each[0]
    if any(own != columns for own in of_each):
        raise ValueError(f"the columns of {' and '.join(parts)} in {root} must be the same")
    store = RowStore(root, parts, columns.image, own_folders(config.root))
    labels, classes = read_labels(root, parts, columns.label) if columns.label else (None, None)
    told = read_row_captions(root, parts, columns.caption) if captions and columns.caption else None
    counts = [len(part) for part in parts.values()]
    layout = Layout(len(parts) == 2, unused_splits(found, parts))
    return *_in_size(*_stored(config, store, counts, labels, classes, told), progress, memory_limit), layout


def _stored(
    config: DataConfig,
    store: Store,
    counts: Sequence[int],
    labels: torch.Tensor | None,
    classes: tuple[str, ...] | None,
    told: Captions | None,
) -> tuple[StoredImages, StoredImages]:
    """The parts to train on and held out, each in a fixed random order, of the images of a store: cut at random, or so
    many each. Labels are negative in a part that has none.
    """
    if len(counts) == 1:
        rows = _heldout_indices(counts[0], config)
    else:
        rows = [np.random.default_rng(0).permutation(count) for count in counts]
        rows[1] += counts[0]
    train, heldout = (
        StoredImages(
            config,
            store,
            own,
            labels=labels[own] if labelled else None,
            classes=classes if labelled else None,
            captions=None if told is None else [told[row] for row in own],
        )
        for own, labelled in ((own, labels is not None and labels[own[0]] >= 0) for own in rows)
    )
    return train, heldout


def _in_size(
    train: StoredImages, heldout: StoredImages, progress: bool, memory_limit: int, headers: bool = True
) -> tuple[ImageSet, ImageSet]:
    """The sets in memory, if their pixels fit, else to be read on demand; without the images that cannot be read, of a
    set to be read on demand as far as `headers` tell, where each has its own.
    """
    asked = train.config
    train, heldout = looked_at(train, heldout)
    unsure = headers and asked.channels is None and train.channels == 1 and max(len(train), len(heldout)) > LOOKED_AT

    def too_large() -> bool:
        count, size = asked.crops or 1, asked.size[0] * asked.size[1] * train.channels * asked.dtype.itemsize
        return count == "random" or (len(train) + len(heldout)) * count * size > memory_limit

    if unsure and not too_large():  # a few of the others may have colours
        train, heldout = looked_at(train.seen_as(asked, ""), heldout.seen_as(asked, ""), max(len(train), len(heldout)))
        unsure = False
    if too_large():
        parts = [train, heldout]
        if headers:
            parts, found = _scan(parts, StoredImages.header, "checking files", progress)
        if unsure:
            train, heldout = (part.seen_as(asked, "") for part in parts)
            parts = _described(train, heldout, [header for part in found for header in part])
        loaded = tuple(part.cropped() for part in parts)
    else:
        parts, read = _scan([train, heldout], StoredImages.read_all, "reading images", progress)
        loaded = tuple(
            ArrayImages(torch.stack(pixels, 1).flatten(0, 1), **part.cropped().about())  # the order of `cropped`
            for part, pixels in zip(parts, read, strict=True)
        )
    if progress:
        if headers:
            _warn_of_pages(parts)
        _warn_of_depth(loaded[0], parts[0].config)
    return loaded


def looked_at(train: StoredImages, heldout: StoredImages, count: int = LOOKED_AT) -> tuple[StoredImages, StoredImages]:
    """The parts with `data.channels`, where that is null, by the headers of the first `count` images of each, and with
    what these say in words.
    """
    with ThreadPoolExecutor() as pool:
        found = [pool.map(partial(_header_of_any, part), range(min(count, len(part)))) for part in (train, heldout)]
    return _described(train, heldout, [header for part in found for header in part if header])


def _described(
    train: StoredImages, heldout: StoredImages, headers: Sequence[Header]
) -> tuple[StoredImages, StoredImages]:
    """The parts as `looked_at` returns them, by these headers."""
    colours = Counter(_colours(header.mode) for header in headers)
    config = train.config
    if config.channels is None:
        config = replace(config, channels=3 if set(colours) - {"grey"} else 1)
    sizes = [(header.height, header.width) for header in headers]
    words = _in_words(config, len(train) + len(heldout), colours, sizes)
    return train.seen_as(config, words), heldout.seen_as(config, words)


def _header_of_any(images: StoredImages, index: int) -> Header | None:
    """The header of an image of 1 or of 3 channels, if none are asked for; None where it cannot be read."""
    for channels in (1, 3) if images.config.channels is None else (images.config.channels,):
        with suppress(ValueError):
            return images.store.header(int(images.rows[index]), replace(images.config, channels=channels))
    return None


def _colours(mode: str) -> str:
    """Description of a header's mode: grey, RGB, RGBA, 5 channels."""
    count, _, dtype = mode.partition("x ")
    if dtype:
        return {"1": "grey", "3": "RGB"}.get(count, f"{count} channels")
    mode = mode.removesuffix(";16") if mode != "I;16" else mode
    return "grey" if mode in GREY else {"P": "with a palette"}.get(mode, mode)


def _in_words(config: DataConfig, count: int, colours: Mapping[str, int], sizes: Sequence[tuple[int, int]]) -> str:
    """What `count` images are, of which these are the colours and the (height, width) of some, and what becomes of
    them.
    """
    of, read_as = f"{count:,} images of {config.described}", {1: "grey", 3: "RGB"}
    wanted = f"{'x'.join(map(str, config.size))} {read_as.get(config.channels, f'with {config.channels} channels')}"
    if not sizes:
        return f"{of}, read as {wanted}"
    ends = [min(sizes, key=math.prod), max(sizes, key=math.prod)]
    span = " to ".join("x".join(map(str, size)) for size in dict.fromkeys(ends))
    if config.crops is not None:
        how = ", one random crop of each" if config.crops == "random" else f", {config.crops:,} crops of each"
    else:
        how = "" if set(sizes) == {config.size} else ", padded" if config.fit == "pad" else ", resized"
    looked = f" in {len(sizes):,} of them" if len(sizes) < count else ""
    return f"{of}, {' and '.join(sorted(colours))}, {span}{looked}; read as {wanted}{how}"


def kind_at(root: str) -> Literal["folder", "array", "datasets"]:
    """Return the data.name of what lies at `root`: image files, arrays, or rows, here or on the Hub."""
    return "datasets" if holds_rows(root) else "array" if holds_arrays(Path(root)) else "folder"


def holds_rows(place: str) -> bool:
    """Whether a place is one for data.name datasets: a set on the Hub, a Parquet file, what `save_to_disk` has written,
    or a folder with Parquet files and with neither images nor archives.
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


def _labelled(files: Files, division: Division) -> tuple[list[torch.Tensor | None], tuple[str, ...] | None]:
    """As labels the places of the folders in which all files of a part lie, or of what their `.cls` files say, and the
    names of these when there are two or more, the same in all parts; else None.
    """
    names = class_names(division)
    in_folders = [None not in own for own in names]
    names = [
        own if inside else _told_beside(files, part)
        for own, inside, part in zip(names, in_folders, division.parts, strict=True)
    ]
    known = {name for own in names for name in own or ()}
    if len(known) < 2:
        return [None] * len(names), None
    numbers = not any(in_folders) and all(name.isdecimal() for name in known)
    classes = sorted(known, key=int if numbers else None)
    place_of = {name: place for place, name in enumerate(classes)}
    return [None if own is None else torch.tensor([place_of[name] for name in own]) for own in names], tuple(classes)


def _told_beside(files: Files, part: Sequence[Path]) -> list[str] | None:
    """What a `NAME.cls` beside each `NAME.png` says, as WebDataset has it; None where some have none."""
    beside = [str(path.with_suffix(".cls")) for path in part]
    if not all(map(files.exists, beside)):
        return None
    return [files.read(path).decode(errors="replace").strip() for path in beside]


def _warn_of_pages(parts: Sequence[StoredImages]) -> None:
    """Log a warning that names the files of which the first page or frame alone is read."""
    rows = sorted({int(row) for part in parts for row in part.rows})
    store, config = parts[0].store, parts[0].config
    # the name of a row of a table ends in that of its file, in parentheses
    rows = [row for row in rows if store.name(row).lower().rstrip(")").endswith(PAGED)]
    with ThreadPoolExecutor() as pool:
        headers = list(pool.map(lambda row: store.header(row, config), rows))
    several = [pages_of(store.name(row), header) for row, header in zip(rows, headers, strict=True) if header.pages > 1]
    if several:
        logger.warning(
            "%d files hold several pages or frames, of which only the first is read:\n%s",
            len(several),
            problem_list(several),
        )


def _warn_of_depth(images: ImageSet, config: DataConfig) -> None:
    """Log a warning when most images use only a small part of the values that they could have."""
    pixels = images.__getitems__(range(min(MEASURED, len(images)))).pixels.flatten(1)
    values = pixels / 255 if pixels.dtype == torch.uint8 else pixels
    lowest, highest = values.amin(1), values.amax(1)
    if not len(values) or 2 * (highest - lowest < 1 / 4).sum() < len(values):
        return
    advice = (
        "Files of 16 bits are divided by 257, although many hold fewer bits: if so, state data.value_range, which "
        "`diffusers-vae data` proposes"
        if config.value_range is None
        else f"If data.value_range {ValueRange(*config.value_range)} is too wide, state a narrower one"
    )
    logger.warning(
        "most of the first %d images use less than a quarter of the values from black (0) to white (1), and all lie "
        "between %.3f and %.3f. %s",
        len(values),
        lowest.min(),
        highest.max(),
        advice,
    )


def pages_of(name: str, header: Header) -> str:
    """A file and its number of pages, as text."""
    return f"{name}: {header.pages}{' or more' * (header.pages == MAX_PAGES)}"


def _scan(
    parts: list[StoredImages], look: Callable[[StoredImages, int], T], title: str, progress: bool
) -> tuple[list[StoredImages], list[list[T]]]:
    """The parts without the files at which `look` raises ValueError, and what it returns for the others.

    Raises:
        ValueError: naming all those files, unless they are to be skipped.
    """

    def attempt(place: tuple[StoredImages, int]) -> tuple[T | None, str | None]:
        try:
            return look(*place), None
        except ValueError as error:
            return None, str(error)

    places = [(part, index) for part in parts for index in range(len(part))]
    with ThreadPoolExecutor() as pool:
        results = list(tqdm(pool.map(attempt, places), title, len(places), unit="img", disable=not progress))
    errors = sorted(error for _, error in results if error)
    shown = problem_list(errors)
    if errors and parts[0].config.on_bad_image == "stop":
        raise ValueError(
            f"{len(errors)} of {len(places)} files cannot be read; remove or mend them, or leave them out with "
            f"data.on_bad_image skip:\n{shown}"
        )
    if errors and progress:
        logger.warning("%d of %d files cannot be read and are left out:\n%s", len(errors), len(places), shown)
    kept, found = [], []
    for part in parts:
        own, results = results[: len(part)], results[len(part) :]
        kept.append(part.without({index: error for index, (_, error) in enumerate(own) if error}))
        found.append([value for value, error in own if not error])
        if not len(kept[-1]):
            raise ValueError(
                f"no image is left to {'hold out' if kept[1:] else 'train on'}: none can be read:\n{shown}"
            )
    return kept, found
