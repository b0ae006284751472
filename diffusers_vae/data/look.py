"""Inspect a set of images before training."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from tqdm import tqdm

from ..fields import with_traits
from ..images.ranges import EXACT, ValueRange, to_uint8
from .check import GREY, pages_of
from .config import PLACED, DataConfig
from .load import load_data, load_with_layout
from .reading import image_batches
from .sets import ImageSet, StoredImages
from .store import FileStore

T = TypeVar("T")
DEPTHS = (8, 10, 12, 14)
"""Bit depths that are common in 16-bit files."""
NEARLY_CONSTANT = 2 / 255
"""Largest std of an image in [0, 1] that counts as constant."""
SHOWN = 64
"""Number of images on a contact sheet, and per batch."""


@dataclass(frozen=True)
class FileFigures:
    """Figures of the image files of a set."""

    formats: dict[str, int]
    """Number of files per format, largest first."""
    modes: dict[str, int]
    """Number of files per mode of Pillow, largest first: L (8-bit grey), RGB, RGBA, P (palette), I;16 (16-bit grey)."""
    sizes: dict[str, int]
    """Number of files per HEIGHTxWIDTH, largest first."""
    sides: tuple[int, int, int]
    """Minimum, median and maximum of the shorter sides."""
    duplicates: tuple[tuple[str, ...], ...]
    """Groups of files with the same bytes."""
    paged: tuple[str, ...]
    """Names of files with several pages or frames, with the number of pages. Only the first page is read."""
    leaks: int
    """Number of held-out files that are also training files."""


@dataclass(frozen=True)
class Look:
    """Figures of a set of images."""

    parts: dict[str, int]
    """Number of images per part, without files whose headers are unreadable."""
    split: bool
    """Whether the set itself defines these parts."""
    notes: tuple[str, ...]
    """Notes on files that are ignored, and on files that are used despite their names."""
    classes: dict[str, int]
    """Number of images per class."""
    captions: str
    """Number of images with captions, "none", or an error in the captions."""
    unreadable: tuple[str, ...]
    """Errors of unreadable files, with their names."""
    left_out: tuple[str, ...]
    """Files that look like images but are ignored, each with advice."""
    measured: int
    """Number of training images that the fields below describe, at the configured resolution."""
    mean: tuple[float, ...]
    """Mean per channel in [0, 1], from black or the lowest value to white or the highest."""
    std: tuple[float, ...]
    constant: tuple[str, ...]
    """Names of nearly constant images."""
    shown: torch.Tensor
    """First of the measured images, uint8 (B, C, H, W)."""
    files: FileFigures | None
    """None for sets without image files."""
    value_range: ValueRange | None = None
    """Range of the values in the files, if it is stated or proposed."""
    proposed: tuple[int, int] | None = None
    """Minimum and maximum of the values in the files, if all have 16 bits and a range is proposed."""


def look(config: DataConfig, max_images: int, progress: bool = False, duplicates: bool = True) -> Look:
    """Measure a set of images, without crops and without unreadable files.

    Reads all headers and, if `duplicates` is set, compares the content of files with equal size. Decodes only the first
    `max_images` training images; of a stream, also reads only their headers.

    Raises:
        FileNotFoundError: if the set does not exist.
        ValueError: if no image can be read, or if data.value_range must be stated; the message proposes one.
    """
    config = replace(config, on_bad_image="skip" if config.name in PLACED else "stop", crops=None)
    try:
        train, heldout, layout = load_with_layout(config, memory_limit=0, captions=True)
        count = 0 if train.captions is None else len(train) + len(heldout)
        captions = f"{count:,} images" if count else "none"
    except ValueError as error:
        unstated = config.name in ("folder", "array") and config.value_range is None
        if unstated and (advice := _range_to_state(config, max_images)):
            raise ValueError(advice) from error
        train, heldout, layout = load_with_layout(
            config, memory_limit=0
        )  # without captions this succeeds, so the error was about them
        captions = str(error)
    config, channels = replace(config, channels=train.channels), train.channels
    count = min(max_images, len(train))
    if not config.as_they_are and isinstance(train, StoredImages) and (depth := _depth(train.first(count))):
        channels, lowest, highest, bits = depth
        stated = replace(config, channels=channels, value_range=(0, 2**bits - 1))
        return replace(look(stated, max_images, progress, duplicates), proposed=(lowest, highest))
    sums, squares = torch.zeros(2, channels, dtype=torch.float64)
    shown, constant, measured = torch.zeros(0), [], 0
    with tqdm(total=count, desc="reading images", unit="img", disable=not progress, leave=False) as bar:
        for _, indices, images in image_batches(train, SHOWN, count, torch.device("cpu")):
            values = (images.double() + 1) / 2
            sums, squares = sums + values.mean((2, 3)).sum(0), squares + (values**2).mean((2, 3)).sum(0)
            flat = values.flatten(1).std(1, correction=0) <= NEARLY_CONSTANT
            constant += [train.name(index) for index, is_flat in zip(indices, flat.tolist(), strict=True) if is_flat]
            shown = shown if measured else to_uint8(images)
            measured += len(indices)
            bar.update(min(SHOWN, count - bar.n))
    if not measured:
        raise ValueError(f"none of {count} training images can be read: {train.errors[0]}")
    mean = sums / measured
    bad, files, ignored = [*train.errors, *heldout.errors], None, ()
    if isinstance(train, StoredImages) and isinstance(heldout, StoredImages):
        ignored = train.store.left_out if isinstance(train.store, FileStore) else ()
        # of a stream, only the images read above
        looked = {"training": train.first(count)} if config.streaming else {"training": train, "held-out": heldout}
        files = _files(looked, bad, progress, duplicates)
    return Look(
        parts={"training": len(train), "held-out": len(heldout)},
        split=layout.split,
        notes=layout.notes,
        classes=_classes([train, heldout]),
        captions=captions,
        unreadable=tuple(dict.fromkeys(bad)),
        left_out=ignored,
        measured=measured,
        mean=tuple(mean.tolist()),
        std=tuple((squares / measured - mean**2).clamp(min=0).sqrt().tolist()),
        constant=tuple(constant),
        shown=shown,
        files=files,
        value_range=config.stated_range,
    )


def _bits(highest: int) -> int | None:
    """Return the smallest of `DEPTHS` that holds a value, or None."""
    return next((bits for bits in DEPTHS if highest < 2**bits), None)


def _depth(images: StoredImages) -> tuple[int, int, int, int] | None:
    """Return (channels, lowest value, highest value, bits needed) if all files have 16 bits and the same number of
    channels, and at most 14 bits are needed; else None.
    """
    found = []
    for index, row in enumerate(map(int, images.rows)):
        try:
            mode = images.header(index).mode
            if ";16" not in mode:
                return None
            values = images.store.values(row, 1 if mode in GREY else 3)
        except (ImportError, ValueError):
            continue
        found.append((len(values), int(values.min()), int(values.max())))
        if _bits(found[-1][2]) is None or found[-1][0] != found[0][0]:
            return None
    highest = max((high for *_, high in found), default=0)
    if not (found and (bits := _bits(highest))):
        return None
    return found[0][0], min(low for _, low, _ in found), highest, bits


def _range_to_state(config: DataConfig, max_images: int) -> str | None:
    """Return an error that proposes ranges for data.value_range; None if all readable files hold 8-bit values."""
    try:  # with a range that accepts every value
        train, _ = load_data(replace(config, value_range=(-1e300, 1e300)), memory_limit=0)
    except ValueError:
        return None
    dtypes, lowest, highest, count = Counter(), math.inf, -math.inf, 0
    assert isinstance(train, StoredImages)
    for row in map(int, train.rows[:max_images]):
        try:
            values = train.store.values(row, train.channels)
        except ValueError:
            continue
        dtypes[values.dtype] += 1
        lowest, highest, count = min(lowest, values.min().item()), max(highest, values.max().item()), count + 1
    if not set(dtypes) - {np.dtype(np.uint8)}:
        return None
    listed = ", ".join(f"{dtype.name} in {files:,}" for dtype, files in dtypes.most_common())
    return (
        f"data.value_range must state the range of values that are not 8-bit: {listed} of {count:,} files, "
        f"{lowest:,.6g} to {highest:,.6g}. {_ranges(set(dtypes), lowest, highest)}"
    )


def _ranges(dtypes: set[np.dtype], lowest: float, highest: float) -> str:
    """Return a sentence that proposes ranges for values of these dtypes."""
    if not math.isfinite(highest - lowest):
        return "Training needs finite values: repair or remove these files"
    if all(dtype.kind == "f" for dtype in dtypes):
        low, high = next(
            (pair for pair in ((0, 1), (-1, 1), (0, 255)) if pair[0] <= lowest and highest <= pair[1]),
            (math.floor(lowest), math.ceil(highest)),
        )
        return f"Use --data.value_range '[{low}, {high}]', or the physical range of the values"
    whole = [np.iinfo(dtype) for dtype in dtypes if dtype.kind in "iu"] + [np.iinfo(np.uint8)]
    low, high = min(info.min for info in whole), max(info.max for info in whole)
    if high - low > EXACT:
        return (
            f"Use the physical range of the values, at most {EXACT:,} wide: --data.value_range '[{lowest}, {highest}]'"
        )
    bits = _bits(int(highest)) if lowest >= 0 else None
    if high > 255 and bits:
        return (
            f"Use --data.value_range '[0, {2**bits - 1}]' if the values have {bits} bits, as they appear to, "
            f"or '[{low}, {high}]', the full range of the file format"
        )
    if lowest < 0 and 2 * (highest - lowest) < high - low:
        return (
            f"Use the physical range of the values, such as --data.value_range '[{int(lowest)}, {int(highest)}]', the "
            f"range found in the files, or '[{low}, {high}]', the full range of the file format"
        )
    return f"Use --data.value_range '[{low}, {high}]', the full range of the file format"


def _classes(parts: Sequence[ImageSet]) -> dict[str, int]:
    counts = Counter(label for part in parts if part.labels is not None for label in part.labels.tolist())
    names = next((part.classes for part in parts if part.classes), ())
    return {name: counts[label] for label, name in enumerate(names)}


def _files(parts: Mapping[str, StoredImages], bad: list[str], progress: bool, duplicates: bool) -> FileFigures:
    """Measure the files. Errors of unreadable files are appended to `bad`."""

    def shown(values: Iterable[T], title: str, count: int) -> Iterable[T]:
        return tqdm(values, title, count, unit="img", disable=not progress, leave=False)

    images = [(name, part, index) for name, part in parts.items() for index in range(len(part))]
    with ThreadPoolExecutor() as pool:
        read = pool.map(lambda image: image[1].header(image[2]), images)
        headers = list(shown(read, "headers", len(images)))
        of_size: dict[int, list[tuple[str, StoredImages, int]]] = defaultdict(list)
        for name, part, index in images if duplicates else []:
            of_size[part.store.size(int(part.rows[index]))].append((name, part, index))
        alike = [image for group in of_size.values() if len(group) > 1 for image in group]
        hashed = shown(pool.map(lambda image: _digest(*image[1:]), alike), "duplicates", len(alike))
        groups: dict[bytes, list[tuple[str, str]]] = defaultdict(list)
        for (name, part, index), digest in zip(alike, hashed, strict=True):
            if isinstance(digest, ValueError):
                bad.append(str(digest))
            else:
                groups[digest].append((name, part.name(index)))
    same = [group for group in groups.values() if len(group) > 1]
    sides = sorted(min(header.height, header.width) for header in headers)
    named = [(part.name(index), header) for (_, part, index), header in zip(images, headers, strict=True)]
    return FileFigures(
        formats=dict(Counter(header.format for header in headers).most_common()),
        modes=dict(Counter(header.mode for header in headers).most_common()),
        sizes=dict(Counter(f"{header.height}x{header.width}" for header in headers).most_common()),
        sides=(sides[0], sides[len(sides) // 2], sides[-1]),
        duplicates=tuple(sorted(tuple(sorted(file for _, file in group)) for group in same)),
        paged=tuple(sorted(pages_of(name, header) for name, header in named if header.pages > 1)),
        leaks=sum(len([name for name, _ in group if name == "held-out"]) for group in same if len({*dict(group)}) > 1),
    )


def _digest(part: StoredImages, index: int) -> bytes | ValueError:
    try:
        return hashlib.sha256(part.store.content(int(part.rows[index]))).digest()
    except ValueError as error:
        return error


@dataclass(frozen=True)
class Recommended:
    """A preset to start with for a set of images, and settings to override."""

    preset: str
    settings: dict[str, str]
    """Values of settings, with full names as keys."""
    reasons: dict[str, str]
    """Reasons for `preset` and for settings that depend on the images."""


EPOCH = 20_000
"""Number of training images or crops to reach per epoch."""


def recommended(found: Look, config: DataConfig) -> Recommended:
    """Return the preset and settings to start with, including settings of `config` that differ from their defaults.

    Grey images get mnist-vae, others rgb-small. Large photographs are cropped to the preset's resolution; other images
    are resized to 64 pixels a side, or to 32 if they are smaller than 64. A run sees about 40,000 images or crops.
    """
    settings = {"data.name": str(config.name), "data.root": config.location, "run.output_dir": config.run_folder}
    if config.name == "cifar10":
        reasons = {"preset": "colour images", "data.resolution": "size of the images", "data.crops": "small images"}
        return Recommended("rgb-small", settings | {"data.resolution": "32", "data.crops": "null"}, reasons)
    if not found.files:
        preset, settings = ("digits", {}) if config.name == "digits" else ("mnist-vae", settings)
        return Recommended(preset, settings, {"preset": f"made for {config.name if preset == 'digits' else 'MNIST'}"})
    side, grey = found.files.sides[1], set(found.files.modes) <= set(GREY)
    reasons = {"data.channels": "all images are grey" if grey else f"modes {', '.join([*found.files.modes][:4])}"}
    settings["data.channels"] = "1" if grey else "3"
    if config.as_they_are or found.proposed:
        settings["data.channels"] = str(len(found.mean))
        grey = len(found.mean) == 1
        reasons["data.channels"] = "as in the files"
    reasons["preset"] = "one channel" if grey else "several channels"
    if found.value_range:
        settings["data.value_range"] = str(found.value_range)
    if found.proposed:
        reasons["data.value_range"] = f"16-bit files hold {found.proposed[0]:,} to {found.proposed[1]:,}"
    if found.unreadable:
        settings["data.on_bad_image"] = "skip"
        reasons["data.on_bad_image"] = f"{len(found.unreadable):,} files cannot be read"
    names = ("resolution", "fit", "heldout_fraction", "streaming", *with_traits(config, "of_rows"))
    asked = {name: getattr(config, name) for name in names}
    kept = {f"data.{name}": str(value) for name, value in asked.items() if value != getattr(DataConfig(), name)}
    images, typical = found.parts["training"], f"median of the shorter sides: {side:,} pixels"
    epochs = str(math.ceil(2 * EPOCH / images))
    if side >= 128 and "data.fit" not in kept and not grey:
        crops = str(min(100, math.ceil(EPOCH / images)))
        settings |= {"data.resolution": "64", "data.crops": crops, "data.horizontal_flip": "true"}
        reasons |= {"data.resolution": "size of the crops", "data.crops": typical}
        reasons["data.horizontal_flip"] = "photographs may be mirrored"
        if config.streaming:
            settings |= {"data.crops": "random", "run.epochs": epochs}
        reasons = {name: reason for name, reason in reasons.items() if name not in kept}
        return Recommended("rgb-small", settings | kept, reasons)
    settings |= {"data.resolution": "32" if side < 64 else "64", "data.fit": "pad" if side < 32 else "crop"}
    reasons |= {"data.resolution": typical, "run.epochs": f"{images:,} training images"}
    if settings["data.fit"] == "pad":
        reasons["data.fit"] = "smaller images keep their pixels"
    settings |= kept | {"run.epochs": epochs} | ({} if grey else {"data.crops": "null"})
    reasons = {name: reason for name, reason in reasons.items() if name not in kept}
    return Recommended("mnist-vae" if grey else "rgb-small", settings, reasons)
