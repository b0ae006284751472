"""Images side by side on a page, with texts beside them; a matplotlib figure as a picture."""

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


# matplotlib and scikit-learn are imported where something is drawn: `--help` and `import *` need not wait for them
DPI = 120
PAGE_WIDTH = 1056  # pixels of images side by side: 16 of 64 with lines between them


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
    """Draw a matplotlib figure as an RGB picture."""
    canvas: Any = figure.canvas
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def titled(
    picture: Image.Image, title: str, row_labels: Sequence[str] = (), column_labels: Sequence[str] = ()
) -> Image.Image:
    """`picture`, pixel for pixel, under a title, beside one label per row and under one per column."""
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
        place = (left - 8, top + (row + 0.5) * picture.height / len(row_labels))
        draw.multiline_text(place, label, "black", small, anchor="rm", align="right")
    for column, label in enumerate(column_labels):
        room = picture.width / len(column_labels)
        while len(label) > 4 and small.getlength(label) > room:  # of a path, the end is what tells
            label = "..." + label.removeprefix("...")[1:]
        place = (left + (column + 0.5) * room, top - 4)
        draw.text(place, label, "black", small, anchor="ms")
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
    """Images (B, C, H, W) in [-1, 1] in a titled grid; small ones are enlarged to `side` pixels, and what is wider than
    a page all together is made smaller, which the title says.
    """
    height, width = images.shape[-2:]
    smaller = math.ceil(columns * width / PAGE_WIDTH)
    if smaller > 1:
        images = torch.nn.functional.avg_pool2d(images.float(), smaller)
    notes = [shown_channels(images.shape[1]), f"each side at 1/{smaller} of its size" if smaller > 1 else ""]
    title = "; ".join([title, *filter(None, notes)])
    return titled(to_pil(images, columns, max(1, side // max(height, width))), title, row_labels, column_labels)


def columns_for(width: int) -> int:
    """How many images of `width` pixels go side by side on a page."""
    return max(1, min(16, PAGE_WIDTH // max(width, 64)))


def rows_for(height: int) -> int:
    """How many times original, reconstruction and difference, of `height` pixels each, go below each other."""
    return max(2, min(4, 2400 // (3 * height)))


def steps_for(width: int) -> int:
    """How many images show a way through the latents: an odd number, so that one is in the middle."""
    return max(5, min(11, (columns_for(width) - 1) // 2 * 2 + 1))


def contact_sheet(images: torch.Tensor, name: str) -> Image.Image:
    """The images (B, C, H, W) in [-1, 1] of a set with this name."""
    return page(images, min(len(images), columns_for(images.shape[-1])), f"{name}: as a training sees it")
