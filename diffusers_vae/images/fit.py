"""Fitting of images to one size: crop, pad, resize."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torchvision.transforms.v2 import functional as transforms


@dataclass(frozen=True)
class Fit:
    """Crops, pads or resizes images of any size to one size."""

    size: tuple[int, int]
    """Height and width of the result."""
    pad: bool = False
    """Whether to scale large images down and pad with 0, instead of scaling to cover the size and cropping the
    centre."""
    crops: tuple[tuple[float, float], ...] = ()
    """Positions of crops at the original resolution, in [0, 1)^2 from top left to bottom right."""

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return crops (B, C, height, width) of an image (C, H, W) or, without crops, the whole image with B = 1."""
        if not self.crops:
            return self.resize(pixels)[None]
        return torch.stack([self.resize(self.cut(pixels, *position)) for position in self.crops])

    def cut(self, pixels: torch.Tensor, down: float, right: float) -> torch.Tensor:
        """Return a crop of an image (C, H, W) at a position in [0, 1)^2; a smaller image is enlarged to fill it."""
        height, width = pixels.shape[-2:]
        scale = max(1, self.size[0] / height, self.size[1] / width)
        rows, columns = min(height, math.ceil(self.size[0] / scale)), min(width, math.ceil(self.size[1] / scale))
        top, left = int(down * (height - rows + 1)), int(right * (width - columns + 1))
        return pixels[:, top : top + rows, left : left + columns]

    def scale(self, height: int, width: int) -> float:
        """Return the scale factor that is applied to an image of this size before cropping or padding."""
        scales = (self.size[0] / height, self.size[1] / width)
        return min(1.0, *scales) if self.pad else max(scales)

    def scaled_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of an image after scaling, at least 1 each."""
        scale = self.scale(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))

    def resize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Scale images (..., C, H, W) by bicubic interpolation with antialiasing, then crop or pad them to the size."""
        height, width = pixels.shape[-2:]
        if (height, width) == self.size:
            return pixels
        scale = self.scale(height, width)
        # crop before enlarging: a strip of 1x100000 pixels would otherwise take gigabytes
        needed = [math.ceil(4 * side / scale) for side in self.size]
        if height > needed[0] or width > needed[1]:
            pixels = transforms.center_crop(pixels, [min(height, needed[0]), min(width, needed[1])])
            height, width = pixels.shape[-2:]
        if scale != 1:
            size = list(self.scaled_size(height, width))
            pixels = transforms.resize(pixels, size, transforms.InterpolationMode.BICUBIC, antialias=True)
            if pixels.is_floating_point():
                pixels = pixels.clamp(0, 1)  # bicubic interpolation overshoots at edges
        return transforms.center_crop(pixels, list(self.size))  # also pads smaller images with 0
