"""Grids of images in one picture."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchvision.utils import make_grid

from .ranges import to_uint8

SIGNATURE = "diffusers_vae"
"""Text near the start of our PNG files, which marks them so that data sets exclude them."""


def shown_channels(channels: int) -> str:
    """Return a description of the channels that `to_pil` shows, for titles; empty for 1 (grey) and 3 (RGB)."""
    if channels in (1, 3):
        return ""
    return "channel 1 of 2 as grey" if channels == 2 else f"channels 1-3 of {channels} as red, green, blue"


def to_pil(images: torch.Tensor, columns: int, scale: int = 1) -> Image.Image:
    """Return one picture of images (B, C, H, W) in [-1, 1] in `columns` with white lines; `scale` enlarges pixels."""
    channels = images.shape[1]
    pixels = to_uint8(images[:, : 3 if channels >= 3 else 1])
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = make_grid(pixels, nrow=columns, padding=2, pad_value=255)
    return Image.fromarray(grid.permute(1, 2, 0).cpu().numpy())


def save_signed(picture: Image.Image, path: Path) -> None:
    """Save a picture as a PNG file that data sets exclude."""
    signature = PngInfo()
    signature.add_text("Software", SIGNATURE)
    picture.save(path, "PNG", pnginfo=signature)
