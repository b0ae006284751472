"""Image files of any number of channels and any depth: read as arrays, and written as files of the same kind."""

from __future__ import annotations

import importlib
import io
import lzma
import math
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image

from ..untrusted import check_pixels, count_pages, open_image, open_regular, read_without_text, unreadable
from .files import Content, Header, one_large
from .fit import Fit
from .ranges import ValueRange

NPY_HEADER = 2**14
"""Maximum bytes of an NPY header: NumPy itself refuses more than 10,000."""
TILE = 2**26
"""Maximum bytes of a TIFF tile that is larger than the image."""
WRITTEN = ("NPY", "PNG", "TIFF")
"""Formats that `write_values` writes; other formats become PNG."""
PHOTOMETRICS = ("MINISBLACK", "MINISWHITE", "RGB", "SEPARATED")
"""Photometric interpretations of a TIFF that are read. In others, values encode something else."""
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda values: values[:, :, ::-1],
    3: lambda values: values[:, ::-1, ::-1],
    4: lambda values: values[:, ::-1],
    5: lambda values: values.swapaxes(1, 2),
    6: lambda values: np.rot90(values, -1, (1, 2)),
    7: lambda values: values[:, ::-1, ::-1].swapaxes(1, 2),
    8: lambda values: np.rot90(values, 1, (1, 2)),
}
"""Functions that rotate an image (C, H, W) upright, by EXIF orientation (EXIF 2.32, 4.6.5)."""


@dataclass(frozen=True)
class FileKind:
    """Format, dtype and layout of the values in an image file."""

    format: str
    """NPY, PNG, TIFF, or Pillow's name of another format."""
    dtype: str
    """NumPy's name with byte order: |u1, <u2, >f4, ..."""
    channels: int
    height: int
    width: int
    """Height and width of the upright image."""
    layout: str
    """Axis order: HW for one channel, CHW or HWC. A TIFF may hold each channel in a page."""
    photometric: str | None = None
    """Photometric interpretation of a TIFF."""
    extrasamples: tuple[str, ...] = ()
    """Meaning of extra channels of a TIFF."""
    pages: int = 1
    """Frames of an animation, counted up to 100. Only the first is read."""

    @property
    def mode(self) -> str:
        """Return channels and dtype for display, such as 5x uint16."""
        return f"{self.channels}x {np.dtype(self.dtype).name}"


Read = tuple[np.ndarray | None, FileKind]


def read_kind(path: str | Path, channels: int, content: Content | None = None) -> FileKind:
    """Return the kind of an image file of `channels` channels. Values are not read, so damage goes unnoticed.

    Raises:
        ImportError: If the package that reads such files is missing.
        ValueError: As `read_values`, for errors that the header reveals.
    """
    return _read(path, channels, content, False)[1]


def read_values(path: str | Path, channels: int, content: Content | None = None) -> tuple[np.ndarray, FileKind]:
    """Return the unconverted values (C, H, W) of an image file in its dtype, rotated upright, and the kind of the file.
    Neither colours nor depth are converted, and no profile or transparent colour is applied.

    NPY: (H, W), or (C, H, W) or (H, W, C) as `channels` implies. TIFF: channels interleaved, in planes or in pages. PNG
    of 8 or 16 bits. BMP, JPEG and WebP, grey or RGB.

    Args:
        path: Path of the file, or its name if `content` opens it.
        channels: Expected number of channels.
        content: Opens a file in an archive.

    Raises:
        ImportError: If the package that reads such files is missing.
        ValueError: Naming the file, if it cannot be read unconverted, is damaged, has another number of channels, or
            claims more than 500,000,000 pixels (or `PIL.Image.MAX_IMAGE_PIXELS` if that was changed).
    """
    values, kind = _read(path, channels, content, True)
    assert values is not None
    return values, kind


def as_they_are(channels: int | None, value_range: ValueRange | None) -> bool:
    """Return whether values in files are used without conversion to 8-bit grey or RGB."""
    return value_range is not None or channels not in (None, 1, 3)


def raw_header(path: str | Path, channels: int, value_range: ValueRange | None, content: Content | None) -> Header:
    """Read the header of an image file whose values are read unconverted, with a mode such as 5x uint16; ValueError
    naming the file if that is impossible.
    """
    kind = read_kind(path, channels, content)
    if value_range is None and kind.dtype != np.dtype(np.uint8).str:
        raise ValueError(
            f"cannot read the image {path}: data.value_range, [low, high], must state the range of values that are "
            f"not 8-bit, got {np.dtype(kind.dtype).name}; `diffusers-vae data` reports the values in use"
        )
    return Header(kind.format, kind.mode, kind.height, kind.width, kind.pages)


def read_raw(
    path: str | Path, channels: int, value_range: ValueRange | None, fit: Fit, content: Content | None
) -> torch.Tensor:
    """Return the result of `fit` for the unconverted values of an image file, (B, C, height, width): uint8 or, with a
    value_range, float32 in [0, 1]. ValueError naming the file if it cannot be read unconverted or holds values out of
    range.
    """
    header = raw_header(path, channels, value_range, content)
    with one_large(header.height, header.width):
        values, _ = read_values(path, channels, content)
        try:
            return fit(torch.from_numpy(values) if value_range is None else value_range.to_unit(values))
        except ValueError as error:
            raise ValueError(f"cannot read the image {path}: {error}") from error


def write_values(path: str | Path, values: np.ndarray, kind: FileKind) -> None:
    """Write values (C, H, W) to a file of this kind: dtype, layout and format, or PNG if the format is not in
    `WRITTEN`. ImportError if the package for such files is missing.
    """
    values = values.astype(np.dtype(kind.dtype), casting="equiv")
    laid = values[0] if kind.layout == "HW" else np.moveaxis(values, 0, -1) if kind.layout == "HWC" else values
    laid = np.ascontiguousarray(laid)
    if kind.format == "NPY":
        with open(path, "wb") as file:  # np.save would add a suffix to a path
            np.save(file, laid, allow_pickle=False)
    elif kind.format == "TIFF":
        planes = {"CHW": "separate", "HWC": "contig"}.get(kind.layout)
        photometric, extra = (kind.photometric or "minisblack").lower(), kind.extrasamples or None
        _package("tifffile").imwrite(
            path, laid, photometric=photometric, planarconfig=planes, extrasamples=extra, metadata=None
        )
    else:
        bits = 8 * values.dtype.itemsize
        writer = _package("png").Writer(
            kind.width, kind.height, greyscale=kind.channels < 3, alpha=kind.channels in (2, 4), bitdepth=bits
        )
        with open(path, "wb") as file:
            writer.write(file, laid.reshape(kind.height, -1))


def read_npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read an NPY header up to the start of its values. Return shape, whether in Fortran order, and dtype."""
    start = file.tell()
    beginning = io.BytesIO(file.read(NPY_HEADER))  # it states its length, which could be anything
    try:
        version = np.lib.format.read_magic(beginning)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(beginning)
    except Exception as error:  # Python's parser raises many types
        raise ValueError(f"its header is damaged: {error}") from error
    if min(shape, default=0) < 0:
        raise ValueError(f"its header is damaged: the shape is {shape}")
    file.seek(start + beginning.tell())
    return shape, fortran, dtype


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package, kind = {"png": ("pypng", "PNG"), "tifffile": ("tifffile", "TIFF")}[name]
        raise ImportError(
            f"{kind} files of any depth need the package {package}: pip install 'diffusers-vae[train]'"
        ) from error


def _read(path: str | Path, channels: int, content: Content | None, whole: bool) -> Read:
    """Return values and kind of a file. Any error becomes a ValueError naming it, or an OSError of its storage."""

    def read(content: Content) -> Read:
        try:
            with content() as file:
                start = file.read(4)
                file.seek(0)
                values, kind = _READERS.get(start, _read_pillow)(file, channels, whole)
            return values if values is None else np.ascontiguousarray(values), kind
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # decoders raise nearly any error for damaged files
            raise unreadable(path, error) from error

    return read_without_text(read, content or partial(open_regular, path))


def _check(kind: FileKind, channels: int) -> None:
    check_pixels(kind.width, kind.height)
    if not kind.height * kind.width:
        raise ValueError("it has no pixels")
    if kind.channels != channels:
        raise ValueError(
            f"it has {kind.channels} channels, and data.channels, which all files must have, is {channels}"
        )


def _read_npy(file: BinaryIO, channels: int, whole: bool) -> Read:
    shape, _, dtype = read_npy_header(file)
    if dtype.kind not in "biuf":
        raise ValueError(f"values must be real numbers, got {dtype}")
    layouts = [layout for layout, axis in (("CHW", 0), ("HWC", -1)) if len(shape) == 3 and shape[axis] == channels]
    if len(shape) == 2:
        layouts = ["HW"]
    if len(layouts) != 1:
        rule = "the channel axis is ambiguous" if layouts else "no axis has this size"
        raise ValueError(
            f"an array of {channels} channels must be (channels, height, width), (height, width, channels) or, of one, "
            f"(height, width), got {shape}: {rule}"
        )
    sizes = dict(zip(layouts[0], shape, strict=True))
    kind = FileKind("NPY", dtype.str, sizes.get("C", 1), sizes["H"], sizes["W"], layouts[0])
    _check(kind, channels)
    if not whole:
        return None, kind
    stated = file.tell() + math.prod(shape) * dtype.itemsize
    if stated > (size := file.seek(0, io.SEEK_END)):  # before allocating the stated size
        raise ValueError(f"it ends after {size:,} of {stated:,} bytes, truncated")
    file.seek(0)
    return _channels_first(np.lib.format.read_array(file, allow_pickle=False), kind.layout), kind


def _channels_first(values: np.ndarray, layout: str) -> np.ndarray:
    """Return values as (C, H, W) in native byte order."""
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    return values[None] if layout == "HW" else np.moveaxis(values, -1, 0) if layout == "HWC" else values


def _read_tiff(file: BinaryIO, channels: int, whole: bool) -> Read:
    with _package("tifffile").TiffFile(file) as tiff:
        if len(tiff.series) != 1:
            sizes = ", ".join("x".join(map(str, series.shape)) for series in tiff.series[:5])
            raise ValueError(f"the pages of a TIFF must be of one shape and dtype, got {sizes}")
        series, page = tiff.series[0], tiff.pages[0]
        shape, axes = series.shape, series.axes
        stated = ExifTags.Base.PhotometricInterpretation in page.tags
        photometric = getattr(page.photometric, "name", str(page.photometric)) if stated else "MINISBLACK"
        layout = {"YX": "HW", "YXS": "HWC", "SYX": "CHW"}.get(axes, "pages")
        if len(axes) > 3 or not axes.endswith(("YX", "YXS")):
            raise ValueError(
                f"a TIFF must hold one image, its channels interleaved, in planes or pages, got {axes} {shape}"
            )
        if photometric not in PHOTOMETRICS:
            raise ValueError(f"values of {photometric} cannot be read unconverted: convert it to grey, RGB or CMYK")
        sizes = dict(zip("CHW" if layout == "pages" else layout, shape, strict=True))
        if page.dtype is None:
            raise ValueError("its values have a data type that is not supported")
        orientation = int(page.tags.valueof(ExifTags.Base.Orientation, 1))
        height, width = (sizes["W"], sizes["H"]) if orientation > 4 else (sizes["H"], sizes["W"])
        dtype = np.dtype(series.dtype).newbyteorder(tiff.byteorder)
        extra = tuple(sample.name.lower() for sample in page.extrasamples)
        kind = FileKind("TIFF", dtype.str, sizes.get("C", 1), height, width, layout, photometric, extra)
        _check(kind, channels)
        if not whole:
            return None, kind
        for one in series.pages:
            _check_unpacked(tiff.filehandle, one)
        values = _channels_first(series.asarray().reshape(shape), layout)
        return _UPRIGHT.get(orientation, np.asarray)(values), kind


def _check_unpacked(file: Any, page: Any) -> None:
    """Raise ValueError if a strip or tile of a TIFF unpacks to more than its size: tifffile unpacks without a limit.
    Other compression methods need imagecodecs, which stops at the size.
    """
    keyframe = page.keyframe
    stated = math.prod(keyframe.chunks) * keyframe.dtype.itemsize
    if keyframe.compression == 1:
        return
    if stated > max(keyframe.nbytes, TILE):
        raise ValueError(f"its tiles of {stated:,} bytes are larger than its image")
    for data, _ in file.read_segments(page.dataoffsets, page.databytecounts, flat=True):
        if data is not None and _unpacked(data, keyframe.compression, stated + 1) > stated:
            raise ValueError(f"it is damaged: a strip or tile of {stated:,} bytes unpacks to more")


def _unpacked(data: bytes, compression: int, limit: int) -> int:
    """Return the number of bytes that a strip of a TIFF unpacks to, at most `limit`."""
    if compression in (8, 32946, 50013):  # deflate
        return len(zlib.decompressobj().decompress(data, limit))
    if compression == 34925:
        return len(lzma.LZMADecompressor().decompress(data, limit))
    if compression in (34926, 50000) and sys.version_info >= (3, 14):  # earlier, tifffile has no built-in zstd
        return len(importlib.import_module("compression.zstd").ZstdDecompressor().decompress(data, limit))
    at = count = 0
    while compression == 32773 and at < len(data) and count < limit:  # PackBits: TIFF 6.0, section 9
        length = data[at]
        count += length + 1 if length < 128 else 257 - length if length > 128 else 0
        at += length + 2 if length < 128 else 2 if length > 128 else 1
    return count


def _read_pillow(file: BinaryIO, channels: int, whole: bool) -> Read:
    with open_image(file) as image:
        if image.format == "PNG":
            file.seek(24)
            depth, colour = file.read(2)  # in its IHDR: PNG, third edition, 11.2.1
            if depth < 8 or colour == 3:
                held = "indices of a palette" if colour == 3 else f"{depth}-bit values"
                raise ValueError(f"{held} cannot be read unconverted: convert the file to 8 or 16 bits")
            count, dtype = {0: 1, 2: 3, 4: 2, 6: 4}[colour], np.dtype(np.uint16 if depth == 16 else np.uint8)
        elif image.format in ("BMP", "JPEG", "MPO", "WEBP") and image.mode in ("L", "RGB", "RGBA"):
            count, dtype = len(image.mode), np.dtype(np.uint8)
        else:  # Pillow may scale these values
            raise ValueError(
                f"values of {image.format} with the mode {image.mode} cannot be read unconverted: "
                f"convert the file to {', '.join(WRITTEN)}"
            )
        has_exif = image.format != "PNG" or "exif" in image.info  # otherwise Pillow would decode the PNG
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if has_exif else 1
        height, width = image.size if orientation > 4 else image.size[::-1]
        kind = FileKind(image.format, dtype.str, count, height, width, "HW" if count == 1 else "HWC")
        _check(kind, channels)
        if not whole:
            return None, replace(kind, pages=count_pages(image))
        deep = dtype == np.uint16 and count > 1
        if deep:
            file.seek(0)
        laid = _decode_deep_png(file.read(), image.size, count) if deep else np.array(image)
        return _UPRIGHT.get(orientation, np.asarray)(_channels_first(laid, kind.layout)), kind


def _decode_deep_png(content: bytes, size: tuple[int, int], channels: int) -> np.ndarray:
    """Return the values (H, W, C) of a 16-bit PNG. Pillow keeps one byte of each value, so the file is decoded once for
    the upper and once for the lower bytes. Grey with transparency has as many bytes as 8-bit RGBA.
    """
    interlaced, data = content[28], _png_data(content)
    if channels == 2:
        whole = np.array(Image.frombytes("RGBA", size, data, "zip", "RGBA", interlaced))
        return whole.view(">u2")
    mode = "RGB" if channels == 3 else "RGBA"
    upper, lower = (
        np.array(Image.frombytes(mode, size, data, "zip", f"{mode};16{order}", interlaced)) for order in "BL"
    )
    return upper.astype(np.uint16) << 8 | lower


def _png_data(content: bytes) -> bytes:
    """Return the compressed values in a PNG; ValueError if a checksum is wrong."""
    parts, at, name = [], 8, b""
    while name != b"IEND":
        length, name = struct.unpack_from(">I4s", content, at)
        end = at + 8 + length
        if zlib.crc32(content[at + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            raise ValueError(f"it is damaged: the checksum of its chunk {name.decode('latin-1')} is wrong")
        parts += [content[at + 8 : end]] * (name == b"IDAT")
        at = end + 4
    return b"".join(parts)


_READERS = {b"\x93NUM": _read_npy} | dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _read_tiff)
"""Readers by the first four bytes of a file."""
