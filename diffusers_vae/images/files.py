"""Image files of 8 bits: read upright, as grey or RGB."""

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

BACKGROUND = (255, 255, 255)  # what shows through transparent pixels
TURNED = (5, 6, 7, 8)  # orientations by which height and width change places
LARGE = 2**24  # pixels; what is larger takes up to a gigabyte or two
OVERSIZE = 3
"""A JPEG that is scaled down is decoded at least this many times as large as wanted. The least PSNR between 224
photographs scaled so and those that were decoded whole was 43.2 dB; with 2, 39.8 dB, for little more speed.
"""
Content = Callable[[], BinaryIO]
"""What opens an image file that lies in an archive."""
_ONE_LARGE = threading.Lock()


@dataclass(frozen=True)
class Header:
    """Header of an image file, known before a pixel is decoded."""

    format: str
    """Pillow's name of the format: JPEG, PNG, ..."""
    mode: str
    """Pillow's mode of the pixels: L is 8-bit grey, RGB, RGBA, P a palette, I;16 16-bit grey, ...; with ;16 where
    Pillow decodes the upper 8 of 16 bits."""
    height: int
    width: int
    """Both of the upright image."""
    pages: int = 1
    """Pages of a TIFF or frames of an animation, counted up to 100. Only the first is read."""


def read_header(path: str | Path, content: Content | None = None) -> Header:
    """Read the header of the first frame of an image file; damaged pixels go unnoticed. ValueError naming a file that
    is no image, too large, or of pixels without a stated range.
    """

    def read(content: Content) -> Header:
        with _opened(path, content) as image:
            known = image.format != "PNG" or "exif" in image.info  # to look for more, Pillow decodes a PNG
            turned = known and image.getexif().get(ExifTags.Base.Orientation) in TURNED
            width, height = image.size[::-1] if turned else image.size
            mode = image.mode + _deeper(image)
            return Header(image.format or "?", mode, height, width, count_pages(image))

    return read_without_text(read, content or partial(open_regular, path))


def _deeper(image: Image.Image) -> str:
    """Return ;16 for an image whose 16-bit values Pillow cuts to 8 bits."""
    assert isinstance(image, ImageFile.ImageFile)
    as_it_lies = next((tile.args for tile in image.tile), "")
    mode = as_it_lies if isinstance(as_it_lies, str) else str(next(iter(as_it_lies or ()), ""))
    return ";16" if ";16" in mode and ";16" not in image.mode else ""


def read_image(path: str | Path, channels: int, fit: Fit | None = None, content: Content | None = None) -> torch.Tensor:
    """Read the first frame of an image file upright: uint8 (channels, H, W) or, through `fit`, (B, channels, height,
    width).

    Transparency is composited over white; palette, CMYK and Lab are converted by colour; 16 bits are scaled to 8.

    Args:
        path: any file that Pillow opens.
        channels: 1 (grey) or 3 (RGB).
        fit: applied to the pixels before they are returned. Threads that decode images of more than `LARGE` pixels do
            so one after the other, this included. A JPEG that is 2 `OVERSIZE` times as large as wanted or more is
            decoded at a half, quarter or eighth of its scale, still `OVERSIZE` times as large; not for crops.
        content: opens a file that lies in an archive, `path` being its name then.

    Raises:
        ValueError: naming the file, when it cannot be decoded, claims more than 500,000,000 pixels or, if it was
            changed, `PIL.Image.MAX_IMAGE_PIXELS` (None for no limit), or has float or 32-bit integer pixels, whose
            range nothing states.
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
    """Decode one image of more than `LARGE` pixels at a time, of up to `MAX_PIXELS` unless Pillow's own limit was
    changed: `check_pixels` sees the same limit from other threads.
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
    """Have a JPEG decoded at a reduced scale if it is large enough; return the width and height to scale it to, and the
    box of the image in the decoded pixels: the last row and column may lie beyond it in part.
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
    # not the mode, too: luma is not the same as grey from RGB where colours were clipped
    drafted = image.draft(None, wanted)
    return None if drafted is None else ((width, height), drafted[1])


@contextmanager
def _opened(path: str | Path, content: Content) -> Generator[Image.Image]:
    """Open an image; whatever goes wrong, within too, is a ValueError naming the file, or an OSError of its storage."""
    try:
        # by its path, Pillow would wait for a pipe, and map the file of some formats: if cut, that ends the process
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
    except Exception as error:  # on a damaged file Pillow's decoders raise nearly anything
        raise unreadable(path, error) from error


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255 and loses transparency
        values = np.asarray(image)
        grey = (values.astype(np.float64) / 257).round().astype(np.uint8)
        alpha = np.where(values == image.info.get("transparency"), 0, 255).astype(np.uint8)
        image = Image.fromarray(np.stack([grey, alpha], axis=-1))
    if image.mode == "LAB":
        to_rgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        image = ImageCms.applyTransform(image, to_rgb) or image  # None only where it is changed in place
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image)
    return image if image.mode == mode else image.convert(mode)
