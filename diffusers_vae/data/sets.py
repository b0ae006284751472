"""Image sets, as batches by index: in memory, or read on demand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from ..images.files import Header
from ..images.ranges import ValueRange
from ..silence import report_progress
from .augmentation import Augmentation
from .batch import ReadImages
from .config import DataConfig
from .fit import cut, resized, scaled_size
from .order import MicroBatch, TrainingSet
from .store import Store

Captions = list[tuple[str, ...]]


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
                return resized(pixels, config)[None]
            # of the name alone, so that an image more or less moves no crop of the others
            name = hashlib.sha256(self.store.key(row).encode(errors="surrogateescape")).digest()
            seeds = (np.random.SeedSequence([int.from_bytes(name, "big"), *crop]) for crop in crops)
            places = (np.random.default_rng(seed).random(2) for seed in seeds)
            return torch.stack([resized(cut(pixels, config.size, place), config) for place in places])

        # crops are of the image at its own resolution
        scaled = None if crops else lambda *size: scaled_size(*size, config)
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
