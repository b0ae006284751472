"""Image files of 8 bits, read upright as grey or RGB."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps

from ..untrusted import (
    MAX_PIXELS,
    PILLOWS_LIMIT,
    check_pixels,
    count_pages,
    open_image,
    open_regular,
    read_without_text,
    unreadable,
)
from .fit import Fit

BACKGROUND = (255, 255, 255)  # shows through transparent pixels
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
LARGE = 2**24  # pixels; larger images take up to two gigabytes
OVERSIZE = 3
"""A JPEG to be scaled down is decoded at no less than this multiple of the target size. Over 224 photographs, the
lowest PSNR against full decoding was 43.2 dB; a factor of 2 gave 39.8 dB and was little faster."""
Content = Callable[[], BinaryIO]
"""Function that opens an image file in an archive."""
_ONE_LARGE = threading.Lock()


@dataclass(frozen=True)
class Header:
    """Header of an image file, known before any pixel is decoded."""

    format: str
    """Pillow's name of the format: JPEG, PNG, ..."""
    mode: str
    """Pillow's mode of the pixels: L (8-bit grey), RGB, RGBA, P (palette), I;16 (16-bit grey), ...; ends in ;16 if
    Pillow decodes the upper 8 of 16 bits."""
    height: int
    width: int
    """Height and width of the upright image."""
    pages: int = 1
    """Pages of a TIFF or frames of an animation, counted up to 100. Only the first is read."""


def read_header(path: str | Path, content: Content | None = None) -> Header:
    """Read the header of the first frame of an image file. Damaged pixels go unnoticed.

    Raises:
        ValueError: Naming the file, if it is not an image, is too large, or has pixels without a stated range.
    """

    def read(content: Content) -> Header:
        with _opened(path, content) as image:
            has_exif = image.format != "PNG" or "exif" in image.info  # otherwise Pillow would decode the PNG
            turned = has_exif and image.getexif().get(ExifTags.Base.Orientation) in TURNED
            width, height = image.size[::-1] if turned else image.size
            mode = image.mode + _deeper(image)
            return Header(image.format or "?", mode, height, width, count_pages(image))

    return read_without_text(read, content or partial(open_regular, path))


def _deeper(image: Image.Image) -> str:
    """Return ;16 for an image whose 16-bit values Pillow cuts to 8 bits, or an empty string."""
    assert isinstance(image, ImageFile.ImageFile)
    as_it_lies = next((tile.args for tile in image.tile), "")
    mode = as_it_lies if isinstance(as_it_lies, str) else str(next(iter(as_it_lies or ()), ""))
    return ";16" if ";16" in mode and ";16" not in image.mode else ""


def read_image(path: str | Path, channels: int, fit: Fit | None = None, content: Content | None = None) -> torch.Tensor:
    """Read the first frame of an image file upright, as uint8 (channels, H, W) or, through `fit`, (B, channels, height,
    width).

    Transparency is composited over white. Palette, CMYK and Lab images are converted by colour, and 16 bits are scaled
    to 8.

    Args:
        path: Any file that Pillow opens.
        channels: 1 (grey) or 3 (RGB).
        fit: Applied to the pixels before they are returned. Threads decode and fit images of more than `LARGE` pixels
            one at a time. A JPEG of at least 2 `OVERSIZE` times the target size is decoded at a half, quarter or eighth
            of its scale, which is still `OVERSIZE` times the target; not for crops.
        content: Opens a file in an archive; `path` is then its name.

    Raises:
        ValueError: Naming the file, if it cannot be decoded, claims more than 500,000,000 pixels (or
            `PIL.Image.MAX_IMAGE_PIXELS` if that was changed; None for no limit), or has float or 32-bit integer pixels,
            which have no stated range.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels}")
    mode = "L" if channels == 1 else "RGB"

    def read(content: Content) -> torch.Tensor:
        with _opened(path, content) as image:
            reduced = None if fit is None or fit.crops else _reduce(image, fit)
            with one_large(image.height, image.width):
                if reduced:
                    size, box = reduced
                    image = _to_mode(image, mode).resize(size, Image.Resampling.BICUBIC, box)
                ImageOps.exif_transpose(image, in_place=True)
                values = np.array(_to_mode(image, mode))
                pixels = torch.from_numpy(values).view(*values.shape[:2], channels).permute(2, 0, 1)
                return pixels if fit is None else fit(pixels)

    return read_without_text(read, content or partial(open_regular, path))


@contextmanager
def one_large(height: int, width: int) -> Generator[None]:
    """Allow one image of more than `LARGE` pixels to be decoded at a time. It may have `MAX_PIXELS` unless Pillow's
    limit was changed: `check_pixels` sees the same limit from other threads.
    """
    if height * width <= LARGE:
        yield
        return
    with _ONE_LARGE:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS if before == PILLOWS_LIMIT else before
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _reduce(image: Image.Image, fit: Fit) -> tuple[tuple[int, int], tuple[float, float, float, float]] | None:
    """Make Pillow decode a JPEG at a reduced scale if it is large enough. Return the width and height to scale it to,
    and the box of the image in decoded pixels, whose last row and column may lie partly beyond the image.
    """
    if image.format not in ("JPEG", "MPO"):
        return None
    turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
    if turned:
        width, height = fit.scaled_size(image.width, image.height)
    else:
        height, width = fit.scaled_size(image.height, image.width)
    wanted = OVERSIZE * width, OVERSIZE * height
    if image.width < 2 * wanted[0] or image.height < 2 * wanted[1]:
        return None
    # keep the mode: luma differs from grey made of RGB where colours were clipped
    drafted = image.draft(None, wanted)
    return None if drafted is None else ((width, height), drafted[1])


@contextmanager
def _opened(path: str | Path, content: Content) -> Generator[Image.Image]:
    """Yield an opened image. Any error in this context becomes a ValueError naming the file, or an OSError of its
    storage.
    """
    try:
        # given a path, Pillow would wait for a pipe, and map some formats, which crashes if the file is truncated
        with content() as file, open_image(file) as image:
            check_pixels(image.width, image.height)
            if image.mode in ("I", "F"):
                kind = "32-bit integer" if image.mode == "I" else "float"
                raise ValueError(
                    f"{kind} pixels have no stated range; state data.value_range, or convert the file to 8 or 16 bits"
                )
            yield image
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly any error for damaged files
        raise unreadable(path, error) from error


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255 and loses transparency
        values = np.asarray(image)
        grey = (values.astype(np.float64) / 257).round().astype(np.uint8)
        alpha = np.where(values == image.info.get("transparency"), 0, 255).astype(np.uint8)
        image = Image.fromarray(np.stack([grey, alpha], axis=-1))
    if image.mode == "LAB":
        to_rgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        image = ImageCms.applyTransform(image, to_rgb) or image  # None only if changed in place
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image)
    return image if image.mode == mode else image.convert(mode)
