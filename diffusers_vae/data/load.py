"""Image sets by name or place: what is there, read or ready to be read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torchvision.transforms.v2 import functional as transforms

from ..images.fit import Fit
from ..messages import problem_list, showable
from . import rows
from .arrays import ArrayStore, ImageArray, array_classes, array_files
from .augmentation import Augmentation
from .captions import read_captions
from .check import in_size, size_in_words
from .config import IN_MEMORY, PLACED, DataConfig
from .files import Files
from .folders import Division, class_names, divide
from .named import heldout_indices, load_cifar10, load_digits, load_mnist
from .sets import ArrayImages, Captions, ImageSet, Layout, Records, StoredImages
from .store import FileStore, Store, left_out
from .stream import load_stream
from .tables import RowStore

logger = logging.getLogger(__name__)
MEMORY_LIMIT = 2**31
"""Bytes of pixels up to which a set is read once and kept in memory."""
Loaded = tuple["ImageSet", "ImageSet", "Layout"]


def load_data(
    config: DataConfig, progress: bool = False, memory_limit: int | None = None, captions: bool = False
) -> tuple[ImageSet, ImageSet]:
    """Load the training and the held-out images.

    Args:
        config: which images.
        progress: show a bar while a folder is read, and say which files are skipped.
        memory_limit: bytes of pixels up to which images are read now and kept in memory; by default `MEMORY_LIMIT`.
        captions: read those of a folder, as `read_captions` says, or of rows.

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
    limit = MEMORY_LIMIT if memory_limit is None else memory_limit
    if config.streaming:
        train, heldout, layout = load_stream(config, progress)
    elif config.name in PLACED:
        load = {"folder": _load_folder, "array": _load_arrays, "datasets": _load_rows}[config.name]
        train, heldout, layout = load(config, progress, limit, captions)
    else:
        parts = {"digits": load_digits, "cifar10": load_cifar10}.get(str(config.name), load_mnist)(config)
        sizes = [(part[0].shape[2], part[0].shape[3]) for part in parts for _ in part[0]]
        files = size_in_words(config, len(sizes), {"RGB" if parts[0][0].shape[1] == 3 else "grey": len(sizes)}, sizes)
        train, heldout = (_in_memory(*part, config=config, files=files) for part in parts)
        layout = Layout(config.name != "digits")
    if layout.split and config.heldout_fraction != DataConfig.heldout_fraction:
        unused = f"data.heldout_fraction {config.heldout_fraction} is not used, since the set has a held-out part"
        layout = replace(layout, notes=(*layout.notes, unused))
    for note in layout.notes if progress else ():
        logger.warning("%s", showable(note))
    train.augmentation = Augmentation.of(config)
    return train, heldout, layout


def refuse_colours(images: ImageSet, config: DataConfig, source: str) -> None:
    """Raise ValueError if the images are in colour, data.channels is null and the model `source` takes grey images."""
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
    """Load the images of `split`, held-out, training or all, and return which that is: by default `default`, but all
    of a set without parts. The other arguments and errors are those of `load_data`.
    """
    if split not in (None, "held-out", "training", "all"):
        raise ValueError(f"split must be held-out, training or all, got {split}")
    train, heldout, layout = load_with_layout(config, progress, memory_limit, captions)
    if split is None:
        split = default if layout.split or config.name in IN_MEMORY else "all"
    if split != "all":
        return (train if split == "training" else heldout), split
    both, errors = train.records.joined(heldout.records), train.errors + heldout.errors
    if isinstance(train, StoredImages):
        return StoredImages(train.config, both, errors), split
    assert isinstance(train, ArrayImages) and isinstance(heldout, ArrayImages)
    return ArrayImages(torch.cat([train.pixels, heldout.pixels]), both, errors), split


def _in_memory(
    pixels: torch.Tensor, labels: torch.Tensor, classes: tuple[str, ...], config: DataConfig, files: str
) -> ArrayImages:
    if pixels.shape[1] == 1 and config.channels == 3:
        pixels = pixels.expand(-1, 3, -1, -1)
    elif pixels.shape[1] == 3 and config.channels == 1:
        pixels = transforms.rgb_to_grayscale(pixels)
    fit = Fit(config.size, config.fit == "pad")
    fitted = [fit.resize(chunk) for chunk in pixels.split(4096)]
    return ArrayImages(torch.cat(fitted), Records(labels, classes, files=files))


def _load_folder(config: DataConfig, progress: bool, memory_limit: int, captions: bool) -> Loaded:
    files = Files(Path(config.location))
    division = divide(files)
    for part in division.parts:
        part[:] = [part[i] for i in np.random.default_rng(0).permutation(len(part))]
    labels, classes = _labelled(files, division)
    parts, split = division.parts, len(division.parts) == 2
    if not split:
        ((found,), (of_all,)) = parts, labels
        indices = heldout_indices(len(found), config)
        parts = [[found[i] for i in part] for part in indices]
        labels = [None if of_all is None else of_all[torch.from_numpy(part)] for part in indices]
    paths = [path for part in parts for path in part]
    told, notes = read_captions(files, paths) if captions else (None, [])
    ignored = left_out(files, division.others)
    if ignored and progress:
        logger.warning("%d files look like images and are left out:\n%s", len(ignored), problem_list(ignored))
    store, count = FileStore(files.root, paths, files.members, ignored), len(parts[0])
    records = Records(None, None, told, store, np.arange(len(paths)))
    train, heldout = (
        StoredImages(config, replace(records.select(part), labels=own, classes=None if own is None else classes))
        for part, own in zip((slice(count), slice(count, None)), labels, strict=True)
    )
    layout = Layout(split, (*division.notes, *notes))
    return *in_size(train, heldout, progress, memory_limit), layout


def _load_arrays(config: DataConfig, progress: bool, memory_limit: int, captions: bool) -> Loaded:
    groups, notes = array_files(Path(config.location))
    settings = config.image_column, config.channels, config.stated_range
    parts = [[ImageArray(path, *settings) for path in group] for group in groups]
    store = ArrayStore([array for arrays in parts for array in arrays])
    labels, classes = array_classes(parts, config.label_column)
    counts = [sum(map(len, arrays)) for arrays in parts]
    loaded = in_size(*_stored(config, store, counts, labels, classes, None), progress, memory_limit, headers=False)
    if isinstance(loaded[0], ArrayImages):
        store.forget()
    return *loaded, Layout(len(groups) == 2, notes)


def _load_rows(config: DataConfig, progress: bool, memory_limit: int, captions: bool) -> Loaded:
    found, root = rows.open_rows(config, progress), config.described
    parts = {name: found[name] for name in rows.find_parts(list(found), root)}
    of_each = [rows.find_columns(part.features, config, captions) for part in parts.values()]
    columns = of_each[0]
    if any(own != columns for own in of_each):
        raise ValueError(f"the columns of {' and '.join(parts)} in {root} must be the same")
    store = RowStore(root, parts, columns.image, rows.own_folders(config.location))
    labels, classes = rows.read_labels(root, parts, columns.label) if columns.label else (None, None)
    told = rows.read_row_captions(root, parts, columns.caption) if captions and columns.caption else None
    counts = [len(part) for part in parts.values()]
    layout = Layout(len(parts) == 2, rows.unused_splits(found, parts))
    return *in_size(*_stored(config, store, counts, labels, classes, told), progress, memory_limit), layout


def _stored(
    config: DataConfig,
    store: Store,
    counts: Sequence[int],
    labels: torch.Tensor | None,
    classes: tuple[str, ...] | None,
    told: Captions | None,
) -> tuple[StoredImages, StoredImages]:
    """Return the images of a store to train on and those held out, each in a fixed random order: of two parts of
    `counts` images, or of one, cut at random. Labels are negative in a part that has none.
    """
    if len(counts) == 1:
        rows = heldout_indices(counts[0], config)
    else:
        rows = [np.random.default_rng(0).permutation(count) for count in counts]
        rows[1] += counts[0]
    every = Records(labels, classes, told, store, np.arange(sum(counts)))
    parts = [every.select(own) for own in rows]
    parts = [
        replace(own, labels=None, classes=None) if own.labels is None or own.labels[0] < 0 else own for own in parts
    ]
    train, heldout = (StoredImages(config, own) for own in parts)
    return train, heldout


def _labelled(files: Files, division: Division) -> tuple[list[torch.Tensor | None], tuple[str, ...] | None]:
    """Return the labels of each part, by the folders of its files or by their `.cls` files, and the names of the
    classes, the same in all parts; None if there are fewer than two.
    """
    of_folders = class_names(division)
    in_folders = [None not in own for own in of_folders]
    names = [
        [str(name) for name in own] if inside else _told_beside(files, part)
        for own, inside, part in zip(of_folders, in_folders, division.parts, strict=True)
    ]
    known = {name for own in names for name in own or ()}
    if len(known) < 2:
        return [None] * len(names), None
    numbers = not any(in_folders) and all(name.isdecimal() for name in known)
    classes = sorted(known, key=int) if numbers else sorted(known)
    place_of = {name: place for place, name in enumerate(classes)}
    return [None if own is None else torch.tensor([place_of[name] for name in own]) for own in names], tuple(classes)


def _told_beside(files: Files, part: Sequence[Path]) -> list[str] | None:
    """Return the text of `NAME.cls` beside each `NAME.png`, as in WebDataset; None if some have none."""
    beside = [str(path.with_suffix(".cls")) for path in part]
    if not all(map(files.exists, beside)):
        return None
    return [files.read(path).decode(errors="replace").strip() for path in beside]
