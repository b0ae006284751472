"""Image sets, read in batches by index, in memory or on demand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch

from ..images.files import Header
from ..images.fit import Fit
from ..silence import report_progress
from .augmentation import Augmentation
from .config import DataConfig
from .order import MicroBatch, TrainingSet
from .store import Store

Captions = list[tuple[str, ...]]
S = TypeVar("S", bound="StoredImages")


@dataclass(frozen=True)
class Records:
    """Labels, captions and rows of the images of a set; None if there are none."""

    labels: torch.Tensor | None = None
    """(N,) int64 classes."""
    classes: tuple[str, ...] | None = None
    """Name of each class."""
    captions: Captions | None = None
    """One or more captions per image."""
    store: Store | None = None
    """Store of the images."""
    rows: np.ndarray | range | None = None
    """Rows (N,) of the store."""
    crops: np.ndarray | None = None
    """Number (N,) of each crop among those of its image."""
    files: str = ""
    """What the images are and what is made of them, in a line for people."""

    def select(self, indices: slice | np.ndarray) -> Records:
        """Return the records of the images at `indices`."""
        rows = self.rows
        if isinstance(rows, range):
            rows = rows[indices] if isinstance(indices, slice) else np.asarray(rows)[indices]
        elif rows is not None:
            rows = rows[indices]
        return replace(
            self,
            labels=None if self.labels is None else self.labels[indices],
            captions=self.captions and [self.captions[index] for index in np.arange(len(self.captions))[indices]],
            rows=rows,
            crops=None if self.crops is None else self.crops[indices],
        )

    def joined(self, other: Records) -> Records:
        """Return these records followed by `other`. Labels and captions are kept only if both have them."""
        labels = None if self.labels is None or other.labels is None else torch.cat([self.labels, other.labels])
        return replace(
            self,
            labels=labels,
            classes=None if labels is None else self.classes,
            captions=None if self.captions is None or other.captions is None else self.captions + other.captions,
            rows=None if self.rows is None or other.rows is None else np.concatenate([self.rows, other.rows]),
            crops=None if self.crops is None or other.crops is None else np.concatenate([self.crops, other.crops]),
        )


@dataclass(frozen=True)
class ReadImages:
    """Requested images that could be read."""

    pixels: torch.Tensor
    """Pixels (B, C, H, W), uint8 in [0, 255] or float32 in [0, 1]."""
    kept: Sequence[int]
    """Positions of the B images in the requested indices."""
    errors: tuple[str, ...] = ()
    """Why the others could not be read, with their names."""
    stop: bool = False
    """Whether errors stop the run."""
    unreachable: str = ""
    """Why nothing could be read, if the images are not at fault."""

    def checked(self) -> ReadImages:
        """Return these images; ValueError naming a file that stops the run, OSError if storage could not be reached. A
        worker does not raise it itself, because it would arrive wrapped in a traceback.
        """
        if self.unreachable:
            raise OSError(f"{self.unreachable}. When it can be read again, the same command continues")
        if self.errors and self.stop:
            raise ValueError(
                f"{self.errors[0]}. Repair or remove it, or leave such files out with data.on_bad_image skip"
            )
        return self

    def blank(self) -> ReadImages:
        """Return one black image, for a process that has none but must take part."""
        return ReadImages(self.pixels.new_zeros(1, *self.pixels.shape[1:]), [0])

    def pin_memory(self) -> ReadImages:
        """Return a copy in page-locked memory, from which a device copies without waiting; for `DataLoader`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        pinned = {name: value.pin_memory() for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **pinned)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what was read, by name."""
        return {"pixels": self.pixels}


@dataclass(frozen=True)
class Layout:
    """Description of how the files of a set were read."""

    split: bool
    """Whether the set has a training and a held-out part, so that none was split off."""
    notes: tuple[str, ...] = ()
    """Notes on what is not used, or used despite its name."""


class ImageSet(TrainingSet):
    """Set of images of one size. Any first part is a fair sample, for a stream one of row groups. `errors` describe the
    files left out so far.
    """

    augmentation: Augmentation | None = None
    """Transforms of training images."""

    def __init__(self, records: Records | None = None, errors: tuple[str, ...] = ()):
        self.records, self.errors = records or Records(), errors

    @property
    def labels(self) -> torch.Tensor | None:
        """Return classes (N,), int64."""
        return self.records.labels

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Return the name of each class."""
        return self.records.classes

    @property
    def captions(self) -> Captions | None:
        """Return one or more captions per image."""
        return self.records.captions

    @property
    def files(self) -> str:
        """Return a one-line description of the images and how they are read, for people."""
        return self.records.files

    @property
    def channels(self) -> int:
        """Return the number of channels of the images after reading."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Return the name of an image for people: its file, or its number."""
        store, rows, crops = self.records.store, self.records.rows, self.records.crops
        if store is None or rows is None:
            return f"image {index}"
        name = store.name(int(rows[index]))
        return name if crops is None else f"{name}, crop {crops[index]}"

    def read(self, indices: Sequence[int]) -> ReadImages:
        """Read the images at `indices`."""
        raise NotImplementedError

    def read_batch(self, batch: MicroBatch) -> ReadImages:
        read = self._read_batch(batch)
        if not self.augmentation or not read.kept:
            return read
        indices = [batch.indices[position] for position in read.kept]
        return replace(read, pixels=self.augmentation(read.pixels, batch.seed, batch.epoch, indices))

    def _read_batch(self, batch: MicroBatch) -> ReadImages:
        return self.read(batch.indices)

    def first(self, count: int) -> ImageSet:
        """Return the first `count` images, which are a fair sample."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Return a hash of the images and their order, as far as it can be computed without reading them."""
        raise NotImplementedError

    def contents(self) -> str | None:
        """Return a hash of the files, read fully or partly; None if the fingerprint covers all pixels."""
        raise NotImplementedError


class ArrayImages(ImageSet):
    """Images in memory: `pixels` (N, C, H, W), uint8 or float32 in [0, 1], which may be on another device."""

    def __init__(self, pixels: torch.Tensor, records: Records | None = None, errors: tuple[str, ...] = ()):
        super().__init__(records, errors)
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def channels(self) -> int:
        return self.pixels.shape[1]

    def read(self, indices: Sequence[int]) -> ReadImages:
        # several times faster on a CPU than indexing with a list
        rows = torch.as_tensor(indices, dtype=torch.long)
        if self.pixels.is_cuda:  # from pinned memory, so that the copy does not block
            rows = rows.pin_memory().to(self.pixels.device, non_blocking=True)
        return ReadImages(self.pixels.index_select(0, rows), range(len(indices)))

    def to(self, device: torch.device | str) -> ArrayImages:
        """Return the same images with their pixels on `device`."""
        return ArrayImages(self.pixels.to(device), self.records, self.errors)

    def first(self, count: int) -> ArrayImages:
        return ArrayImages(self.pixels[:count], self.records.select(slice(count)), self.errors)

    def fingerprint(self) -> str:
        """Return the SHA-256 of all pixels."""
        return hashlib.sha256(self.pixels.cpu().contiguous().numpy().data).hexdigest()

    def contents(self) -> None:
        """Return None: the fingerprint covers all pixels."""


class StoredImages(ImageSet):
    """Images in rows of a store, read on demand as `config` specifies."""

    def __init__(self, config: DataConfig, records: Records, errors: tuple[str, ...] = ()):
        super().__init__(records, errors)
        assert records.store is not None and records.rows is not None
        self.config, self.store, self.rows = config, records.store, records.rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def channels(self) -> int:
        assert self.config.channels is not None
        return self.config.channels

    def read(self, indices: Sequence[int]) -> ReadImages:
        return self._read_at(indices, (0,))

    def _read_batch(self, batch: MicroBatch) -> ReadImages:
        return self._read_at(batch.indices, (batch.seed, batch.epoch))

    def _read_at(self, indices: Sequence[int], seed: tuple[int, ...]) -> ReadImages:
        """Read the images at the indices, with random crops of this seed."""
        config, pixels, kept, errors = self.config, [], [], []
        empty = torch.zeros(0, self.channels, *config.size, dtype=config.dtype)
        for number, index in enumerate(indices):
            crops = [seed] if config.crops == "random" else []
            crops = crops if self.records.crops is None else [(int(self.records.crops[index]),)]
            try:
                pixels.append(self._read_one(index, crops)[0])
                kept.append(number)
            except ValueError as error:
                errors += [str(error)] * (str(error) not in errors)  # two crops of a file give one error
            except OSError as error:
                return ReadImages(empty, [], unreachable=str(error))
        stop = config.on_bad_image == "stop"
        return ReadImages(torch.stack(pixels) if pixels else empty, kept, tuple(errors), stop)

    def read_all(self, index: int) -> torch.Tensor:
        """Read all crops (B, C, H, W) of an image of a set of whole images, or the image, B = 1."""
        crops = self.config.crops
        count = crops if isinstance(crops, int) else int(crops == "random")
        return self._read_one(index, [(crop,) for crop in range(count)])

    def _read_one(self, index: int, crops: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """Read the crops (B, C, H, W) of an image with these seeds or, without seeds, the whole image, B = 1."""
        config, row, positions = self.config, int(self.rows[index]), []
        if crops:  # from the name only, so that adding or removing an image changes no other crop
            name = hashlib.sha256(self.store.key(row).encode(errors="surrogateescape")).digest()
            seeds = (np.random.SeedSequence([int.from_bytes(name, "big"), *crop]) for crop in crops)
            positions = [np.random.default_rng(seed).random(2).tolist() for seed in seeds]
        fit = Fit(config.size, config.fit == "pad", tuple((down, right) for down, right in positions))
        return self.store.read(row, self.channels, config.stated_range, fit)

    def header(self, index: int) -> Header:
        """Read the header of an image; ValueError naming it if it cannot be read."""
        return self.store.header(int(self.rows[index]), self.channels, self.config.stated_range)

    def first(self: S, count: int) -> S:
        return type(self)(self.config, self.records.select(slice(count)), self.errors)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the rows' identities and the crops."""
        digest, identities, crops = hashlib.sha256(), {}, self.records.crops
        if self.config.stated_range:
            digest.update(f"{self.config.stated_range}\0".encode())
        for index, row in enumerate(map(int, self.rows)):
            if row not in identities:  # crops share a file
                identities[row] = self.store.identity(row)
            digest.update(identities[row])
            digest.update(b"" if crops is None else f"crop {crops[index]}\0".encode())
        return digest.hexdigest()

    def contents(self) -> str | None:
        """Return the SHA-256 of the fingerprint and the images, or of samples of images if they exceed
        `WHOLE` bytes.
        """
        digest = hashlib.sha256(self.fingerprint().encode())
        rows = list(dict.fromkeys(map(int, self.rows)))  # crops share a file
        for row in rows[:1]:
            self.store.digest(row)  # sum the sizes once, before several threads would
        with ThreadPoolExecutor() as pool:
            for found in pool.map(self.store.digest, rows):
                digest.update(found)
                report_progress()
        return digest.hexdigest()

    def without(self, bad: dict[int, str]) -> StoredImages:
        """Return the set without the images at the indices `bad`, which maps them to reasons."""
        good = np.array([index for index in range(len(self)) if index not in bad], dtype=np.int64)
        errors = (*self.errors, *(bad[index] for index in sorted(bad)))
        return StoredImages(self.config, self.records.select(good), errors)

    def seen_as(self: S, config: DataConfig, files: str) -> S:
        """Return the set read as `config` specifies, with a description of its files."""
        return type(self)(config, replace(self.records, files=files), self.errors)

    def cropped(self) -> StoredImages:
        """Return the set of `config.crops` crops of each image: the first of each, then the second of each, and so on,
        so that a first part is a fair sample.
        """
        count = self.config.crops
        if not isinstance(count, int):
            return self
        every = np.tile(np.arange(len(self)), count)
        records = replace(self.records.select(every), crops=np.repeat(np.arange(count), len(self)))
        return StoredImages(self.config, records, self.errors)
