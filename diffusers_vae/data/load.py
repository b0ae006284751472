"""Image sets by name or location, in memory or read on demand."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
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
from .sets import ArrayImages, ImageSet, Layout, Records, StoredImages
from .store import FileStore, left_out
from .stream import load_stream
from .tables import RowStore

logger = logging.getLogger(__name__)
MEMORY_LIMIT = 2**31
"""Maximum bytes of pixels of a set that is read once and kept in memory."""
Loaded = tuple["ImageSet", "ImageSet", "Layout"]


def load_data(
    config: DataConfig, progress: bool = False, memory_limit: int | None = None, captions: bool = False
) -> tuple[ImageSet, ImageSet]:
    """Load the training and the held-out images.

    Args:
        config: Settings of the data set.
        progress: Whether to show a progress bar while a folder is read, and log which files are skipped.
        memory_limit: Maximum bytes of pixels for which images are read now and kept in memory; by default
            `MEMORY_LIMIT`.
        captions: Whether to read captions, those of a folder by `read_captions`, or those of rows.

    Raises:
        FileNotFoundError: If files are missing and cannot be downloaded, with the folder to put them into.
        OSError: If a Hub data set is not available, with what to do.
        ValueError: Naming files that cannot be read.
    """
    train, heldout, _ = load_with_layout(config, progress, memory_limit, captions)
    return train, heldout


def load_with_layout(
    config: DataConfig, progress: bool = False, memory_limit: int | None = None, captions: bool = False
) -> Loaded:
    """Load the images like `load_data`, and return how their files were read. With `progress`, log its notes."""
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
        unused = f"data.heldout_fraction {config.heldout_fraction} is not used, because the set has a held-out part"
        layout = replace(layout, notes=(*layout.notes, unused))
    for note in layout.notes if progress else ():
        logger.warning("%s", showable(note))
    train.augmentation = Augmentation.of(config)
    return train, heldout, layout


def refuse_colours(images: ImageSet, config: DataConfig, source: str) -> None:
    """Raise ValueError if images are in colour, data.channels is null and the model `source` takes grey images."""
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
    """Load the images of `split`: held-out, training or all. Return them and the split, by default `default`, or all
    for a set without parts. The other arguments and errors are those of `load_data`.
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
    paths, count, split = [*chain(*division.parts)], len(division.parts[0]), len(division.parts) == 2
    if not split:
        train, heldout = heldout_indices(count, config)
        order, count = np.concatenate([train, heldout]), len(train)
        paths, labels = [paths[i] for i in order], None if labels is None else labels[order]
    told, notes = read_captions(files, paths) if captions else (None, [])
    ignored = left_out(files, division.others)
    if ignored and progress:
        logger.warning("%d files look like images and are left out:\n%s", len(ignored), problem_list(ignored))
    store = FileStore(files.root, paths, files.members, ignored)
    records = Records(labels, classes, told, store, np.arange(len(paths)))
    parts = _part(config, records, slice(count)), _part(config, records, slice(count, None))
    return *in_size(*parts, progress, memory_limit), Layout(split, (*division.notes, *notes))


def _load_arrays(config: DataConfig, progress: bool, memory_limit: int, captions: bool) -> Loaded:
    groups, notes = array_files(Path(config.location))
    settings = config.image_column, config.channels, config.stated_range
    parts = [[ImageArray(path, *settings) for path in group] for group in groups]
    store = ArrayStore([array for arrays in parts for array in arrays])
    labels, classes = array_classes(parts, config.label_column)
    counts = [sum(map(len, arrays)) for arrays in parts]
    loaded = in_size(*_parts(config, Records(labels, classes, None, store), counts), progress, memory_limit, False)
    if isinstance(loaded[0], ArrayImages):
        store.forget()
    return *loaded, Layout(len(groups) == 2, notes)


def _load_rows(config: DataConfig, progress: bool, memory_limit: int, captions: bool) -> Loaded:
    found, root = rows.open_rows(config, progress), config.described
    parts = {name: found[name] for name in rows.find_parts(list(found), root)}
    of_each = [rows.find_columns(part.features, config, captions) for part in parts.values()]
    columns = of_each[0]
    if any(found != columns for found in of_each):
        raise ValueError(f"the columns of {' and '.join(parts)} in {root} must be the same")
    store = RowStore(root, parts, columns.image, rows.own_folders(config.location))
    labels, classes = rows.read_labels(root, parts, columns.label) if columns.label else (None, None)
    told = rows.read_row_captions(root, parts, columns.caption) if captions and columns.caption else None
    loaded = _parts(config, Records(labels, classes, told, store), [len(part) for part in parts.values()])
    return *in_size(*loaded, progress, memory_limit), Layout(len(parts) == 2, rows.unused_splits(found, parts))


def _parts(config: DataConfig, records: Records, counts: Sequence[int]) -> tuple[StoredImages, StoredImages]:
    """Return the training and held-out images of a store, each in a fixed random order: two parts of `counts` images,
    or one part split at random.
    """
    if len(counts) == 1:
        train, heldout = heldout_indices(counts[0], config)
    else:
        train, heldout = (np.random.default_rng(0).permutation(count) for count in counts)
        heldout += counts[0]
    records = replace(records, rows=np.arange(sum(counts)))
    return _part(config, records, train), _part(config, records, heldout)


def _part(config: DataConfig, records: Records, indices: slice | np.ndarray) -> StoredImages:
    """Return the images at the indices. A part without labels has negative ones in `records`."""
    selected = records.select(indices)
    if selected.labels is None or selected.labels[0] < 0:
        selected = replace(selected, labels=None, classes=None)
    return StoredImages(config, selected)


def _labelled(files: Files, division: Division) -> tuple[torch.Tensor | None, tuple[str, ...] | None]:
    """Return labels (N,) from the folders of the files or from their `.cls` files, -1 in a part without labels, and the
    names of the classes; None if there are fewer than two.
    """
    of_folders = class_names(division)
    in_folders = [None not in names_of for names_of in of_folders]
    names = [
        names_of if inside else _told_beside(files, part)
        for names_of, inside, part in zip(of_folders, in_folders, division.parts, strict=True)
    ]
    found = {name for name in chain(*names) if name is not None}
    if len(found) < 2:
        return None, None
    numbers = not any(in_folders) and all(name.isdecimal() for name in found)
    classes = sorted(found, key=int) if numbers else sorted(found)
    class_of: dict[str | None, int] = {None: -1} | {name: number for number, name in enumerate(classes)}
    return torch.tensor([class_of[name] for name in chain(*names)]), tuple(classes)


def _told_beside(files: Files, part: Sequence[Path]) -> Sequence[str | None]:
    """Return the text of `NAME.cls` beside each `NAME.png`, as in WebDataset, or None for each if some have none."""
    beside = [str(path.with_suffix(".cls")) for path in part]
    if not all(map(files.exists, beside)):
        return [None] * len(part)
    return [files.read(path).decode(errors="replace").strip() for path in beside]
