"""Images cropped, padded or resized to the size of a set."""

from __future__ import annotations

import math

import numpy as np
import torch
from torchvision.transforms.v2 import functional as transforms

from .config import DataConfig


def cut(pixels: torch.Tensor, size: tuple[int, int], place: np.ndarray) -> torch.Tensor:
    """The part of an image (C, H, W) of that size, or, when the image is smaller and must be scaled to cover it, what
    then fills it, `place` in [0, 1)^2 of the way from top left to bottom right.
    """
    height, width = pixels.shape[-2:]
    scale = max(1, size[0] / height, size[1] / width)
    rows, columns = min(height, math.ceil(size[0] / scale)), min(width, math.ceil(size[1] / scale))
    top, left = int(place[0] * (height - rows + 1)), int(place[1] * (width - columns + 1))
    return pixels[:, top : top + rows, left : left + columns]


def scale_for(height: int, width: int, config: DataConfig) -> float:
    """By which an image of that size is multiplied; then its centre is cut out, or it is padded."""
    scales = (config.size[0] / height, config.size[1] / width)
    return max(scales) if config.fit == "crop" else min(1.0, *scales)


def scaled_size(height: int, width: int, config: DataConfig) -> tuple[int, int]:
    """Return height and width of an image after `scale_for`, at least 1 each."""
    scale = scale_for(height, width, config)
    return max(1, round(height * scale)), max(1, round(width * scale))


def resized(pixels: torch.Tensor, config: DataConfig) -> torch.Tensor:
    """Scale an image (C, H, W), then crop or pad it to the size of the set."""
    height, width = pixels.shape[-2:]
    if (height, width) == config.size:
        return pixels
    scale = scale_for(height, width, config)
    # what will be cut off anyway must not be enlarged first: a strip of 1x100000 pixels would take gigabytes
    needed = [math.ceil(4 * side / scale) for side in config.size]
    if height > needed[0] or width > needed[1]:
        pixels = transforms.center_crop(pixels, [min(height, needed[0]), min(width, needed[1])])
        height, width = pixels.shape[-2:]
    if scale != 1:
        size = list(scaled_size(height, width, config))
        pixels = transforms.resize(pixels, size, transforms.InterpolationMode.BICUBIC, antialias=True)
        if pixels.is_floating_point():
            pixels = pixels.clamp(0, 1)  # it overshoots at edges
    return transforms.center_crop(pixels, list(config.size))  # pads with 0 where the image is smaller
