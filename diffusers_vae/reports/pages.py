"""Pages of images with labels, and matplotlib figures as pictures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..images.grid import shown_channels, to_pil

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# matplotlib and scikit-learn are imported on use, so that `--help` and `import *` need not wait for them
DPI = 120
PAGE_WIDTH = 1056  # pixels: 16 images of 64 with lines between them


def new_figure(width: float, height: float) -> Figure:
    """Return an empty matplotlib figure, `width` x `height` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    layout: Any = figure.get_layout_engine()
    layout.set(w_pad=0.12, h_pad=0.12)  # inches
    FigureCanvasAgg(figure)
    return figure


def render(figure: Figure) -> Image.Image:
    """Return a matplotlib figure as an RGB picture."""
    canvas: Any = figure.canvas
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def titled(
    picture: Image.Image, title: str, row_labels: Sequence[str] = (), column_labels: Sequence[str] = ()
) -> Image.Image:
    """Return `picture`, unscaled, below a title, with one label per row beside it and one per column above it."""
    font, small, margin = ImageFont.load_default(18), ImageFont.load_default(14), 12
    lines = [line for label in row_labels for line in label.splitlines()]
    left = margin + max((round(small.getlength(line)) + 8 for line in lines), default=0)
    letters = 0.95 * picture.width * len(title) / font.getlength(title)
    title = "\n".join(textwrap.wrap(title, max(36, int(letters))))
    _, _, title_width, title_height = ImageDraw.Draw(picture).multiline_textbbox((0, 0), title, font)
    width = left + max(picture.width, round(title_width)) + margin
    top = 2 * margin + round(title_height) + (20 if column_labels else 0)
    sheet = Image.new("RGB", (width, top + picture.height + margin), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((left, margin), title, "black", font)
    for row, label in enumerate(row_labels):
        anchor_point = (left - 8, top + (row + 0.5) * picture.height / len(row_labels))
        draw.multiline_text(anchor_point, label, "black", small, anchor="rm", align="right")
    for column, label in enumerate(column_labels):
        room = picture.width / len(column_labels)
        while len(label) > 4 and small.getlength(label) > room:  # the end of a path identifies it
            label = "..." + label.removeprefix("...")[1:]
        anchor_point = (left + (column + 0.5) * room, top - 4)
        draw.text(anchor_point, label, "black", small, anchor="ms")
    sheet.paste(picture, (left, top))
    return sheet


def page(
    images: torch.Tensor,
    columns: int,
    title: str,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    side: int = 64,
) -> Image.Image:
    """Return images (B, C, H, W) in [-1, 1] in a titled grid. Small images are enlarged to `side` pixels, and a grid
    wider than a page is scaled down, which the title states.
    """
    height, width = images.shape[-2:]
    smaller = math.ceil(columns * width / PAGE_WIDTH)
    if smaller > 1:
        images = torch.nn.functional.avg_pool2d(images.float(), smaller)
    notes = [shown_channels(images.shape[1]), f"each side at 1/{smaller} of its size" if smaller > 1 else ""]
    title = "; ".join([title, *filter(None, notes)])
    return titled(to_pil(images, columns, max(1, side // max(height, width))), title, row_labels, column_labels)


def columns_for(width: int) -> int:
    """Return the number of images of `width` pixels that fit side by side on a page."""
    return max(1, min(16, PAGE_WIDTH // max(width, 64)))


def rows_for(height: int) -> int:
    """Return the number of rows of original, reconstruction and difference, of `height` pixels each, on a page."""
    return max(2, min(4, 2400 // (3 * height)))


def steps_for(width: int) -> int:
    """Return the number of images on a path through the latents: odd, so that one is in the middle."""
    return max(5, min(11, (columns_for(width) - 1) // 2 * 2 + 1))


def contact_sheet(images: torch.Tensor, name: str) -> Image.Image:
    """Return a page of the images (B, C, H, W) in [-1, 1] of a set with this name."""
    return page(images, min(len(images), columns_for(images.shape[-1])), f"{name}: as seen in training")
