"""Checks of a set's files by their headers, before training."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from tqdm import tqdm

from ..images.files import Header
from ..messages import problem_list
from ..untrusted import MAX_PAGES
from .config import DataConfig
from .sets import ArrayImages, ImageSet, StoredImages

logger = logging.getLogger(__name__)
PAGED = (".apng", ".avif", ".avifs", ".gif", ".heic", ".heics", ".heif", ".heifs", ".tif", ".tiff", ".webp")
"""Suffixes of files that may hold several images."""
GREY = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L")
"""Pillow's modes without colours."""
LOOKED_AT = 256
"""Number of images per part whose headers are read first: if all are grey, more are read to detect colours."""
MEASURED = 32
"""Number of training images that are checked for unused depth."""
S = TypeVar("S", bound=StoredImages)
T = TypeVar("T")


def in_size(
    train: StoredImages, heldout: StoredImages, progress: bool, memory_limit: int, headers: bool = True
) -> tuple[ImageSet, ImageSet]:
    """Return the sets in memory if their pixels fit, otherwise read on demand, without unreadable images. In the latter
    case, `headers` identify these, if each image has a header.
    """
    asked = train.config
    train, heldout = looked_at(train, heldout)
    longest = max(len(train), len(heldout))
    unsure = headers and asked.channels is None and train.channels == 1 and longest > LOOKED_AT

    def too_large() -> bool:
        count, size = asked.crops or 1, asked.size[0] * asked.size[1] * train.channels * asked.dtype.itemsize
        return count == "random" or (len(train) + len(heldout)) * count * size > memory_limit

    if unsure and not too_large():  # some of the others may be in colour
        train, heldout = looked_at(train.seen_as(asked, ""), heldout.seen_as(asked, ""), longest)
        unsure = False
    loaded: list[ImageSet]
    if too_large():
        if headers:
            (train, heldout), found = _scan([train, heldout], StoredImages.header, "checking files", progress)
            if unsure:
                found = [header for part in found for header in part]
                train, heldout = _described(train.seen_as(asked, ""), heldout.seen_as(asked, ""), found)
        loaded = [part.cropped() for part in (train, heldout)]
    else:
        (train, heldout), read = _scan([train, heldout], StoredImages.read_all, "reading images", progress)
        loaded = [
            ArrayImages(torch.stack(pixels, 1).flatten(0, 1), part.cropped().records, part.errors)
            for part, pixels in zip((train, heldout), read, strict=True)
        ]
    if progress:
        if headers:
            _warn_of_pages([train, heldout])
        _warn_of_depth(loaded[0], train.config)
    return loaded[0], loaded[1]


def looked_at(train: S, heldout: S, count: int = LOOKED_AT) -> tuple[S, S]:
    """Return the parts with a description of the first `count` headers of each, and with `data.channels` from them."""
    with ThreadPoolExecutor() as pool:
        found = [pool.map(partial(_header_of_any, part), range(min(count, len(part)))) for part in (train, heldout)]
    return _described(train, heldout, [header for part in found for header in part if header])


def _described(train: S, heldout: S, headers: Sequence[Header]) -> tuple[S, S]:
    """Return the parts like `looked_at`, by these headers."""
    colours = Counter(_colours(header.mode) for header in headers)
    config = train.config
    if config.channels is None:
        config = replace(config, channels=3 if set(colours) - {"grey"} else 1)
    sizes = [(header.height, header.width) for header in headers]
    words = size_in_words(config, len(train) + len(heldout), colours, sizes)
    return train.seen_as(config, words), heldout.seen_as(config, words)


def _header_of_any(images: StoredImages, index: int) -> Header | None:
    """Return the header of an image, of 1 or 3 channels if unspecified, or None if it cannot be read."""
    for channels in (1, 3) if images.config.channels is None else (images.config.channels,):
        with suppress(ValueError):
            return images.store.header(int(images.rows[index]), channels, images.config.stated_range)
    return None


def _colours(mode: str) -> str:
    """Return a description of a header's mode: grey, RGB, RGBA, 5 channels."""
    count, _, dtype = mode.partition("x ")
    if dtype:
        return {"1": "grey", "3": "RGB"}.get(count, f"{count} channels")
    mode = mode.removesuffix(";16") if mode != "I;16" else mode
    return "grey" if mode in GREY else {"P": "with a palette"}.get(mode, mode)


def size_in_words(config: DataConfig, count: int, colours: Mapping[str, int], sizes: Sequence[tuple[int, int]]) -> str:
    """Return a description of `count` images, with colours and (height, width) of some, and how they are read."""
    of, channels = f"{count:,} images of {config.described}", config.channels or 0
    read_as = {1: "grey", 3: "RGB"}.get(channels, f"with {channels} channels")
    wanted = f"{'x'.join(map(str, config.size))} {read_as}"
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


def _warn_of_pages(parts: Sequence[StoredImages]) -> None:
    """Log a warning that names the files with more than one page or frame."""
    rows = sorted({int(row) for part in parts for row in part.rows})
    store, channels, value_range = parts[0].store, parts[0].channels, parts[0].config.stated_range
    # the name of a table's row ends with its file, in parentheses
    rows = [row for row in rows if store.name(row).lower().rstrip(")").endswith(PAGED)]
    with ThreadPoolExecutor() as pool:
        headers = list(pool.map(lambda row: store.header(row, channels, value_range), rows))
    several = [pages_of(store.name(row), header) for row, header in zip(rows, headers, strict=True) if header.pages > 1]
    if several:
        logger.warning(
            "%d files hold several pages or frames; only the first is read:\n%s",
            len(several),
            problem_list(several),
        )


def _warn_of_depth(images: ImageSet, config: DataConfig) -> None:
    """Log a warning if most images use only a small part of the value range."""
    pixels = images.read(range(min(MEASURED, len(images)))).pixels.flatten(1)
    values = pixels / 255 if pixels.dtype == torch.uint8 else pixels
    lowest, highest = values.amin(1), values.amax(1)
    if not len(values) or 2 * (highest - lowest < 1 / 4).sum() < len(values):
        return
    advice = (
        "Files of 16 bits are divided by 257, although many hold fewer bits: if so, state data.value_range, which "
        "`diffusers-vae data` proposes"
        if config.stated_range is None
        else f"If data.value_range {config.stated_range} is too wide, state a narrower one"
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
    """Return a file and its number of pages as text."""
    return f"{name}: {header.pages}{' or more' * (header.pages == MAX_PAGES)}"


def _scan(
    parts: list[StoredImages], look: Callable[[StoredImages, int], T], title: str, progress: bool
) -> tuple[list[StoredImages], list[list[T]]]:
    """Return the parts without the files for which `look` raises ValueError, and its results for the others; ValueError
    naming those files unless they are to be skipped.
    """

    def attempt(position: tuple[StoredImages, int]) -> tuple[T | None, str | None]:
        try:
            return look(*position), None
        except ValueError as error:
            return None, str(error)

    positions = [(part, index) for part in parts for index in range(len(part))]
    with ThreadPoolExecutor() as pool:
        results = list(tqdm(pool.map(attempt, positions), title, len(positions), unit="img", disable=not progress))
    errors = sorted(error for _, error in results if error)
    shown = problem_list(errors)
    if errors and parts[0].config.on_bad_image == "stop":
        raise ValueError(
            f"{len(errors)} of {len(positions)} files cannot be read; remove or repair them, or leave them out with "
            f"data.on_bad_image skip:\n{shown}"
        )
    if errors and progress:
        logger.warning("%d of %d files cannot be read and are left out:\n%s", len(errors), len(positions), shown)
    kept, found = [], []
    for part in parts:
        of_part, results = results[: len(part)], results[len(part) :]
        kept.append(part.without({index: error for index, (_, error) in enumerate(of_part) if error}))
        found.append([value for value, error in of_part if not error])
        if not len(kept[-1]):
            raise ValueError(
                f"no image is left to {'hold out' if kept[1:] else 'train on'}: none can be read:\n{shown}"
            )
    return kept, found
