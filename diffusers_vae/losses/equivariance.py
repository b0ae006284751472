"""Equivariance of latents under scaling and rotation of images: EQ-VAE, Kouzelis et al. 2025.

An encoder whose latents rotate and scale with the images has smoother latents, which are easier to diffuse. It is
trained by the implicit form of the paper's regularisation: the transformed latents are decoded, and the reconstruction
is compared with the images, transformed in the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

SMALLEST = 0.25  # smallest scale of the latents' sides, as in the paper's experiments
LOWER_RESOLUTION = 0.25
"""Probability that a step without a transformation scales its images down before the encoder, as in the published code
(`p_prior_s`), so that the decoder also sees such latents from the encoder."""
DRAWS = 4


@dataclass(frozen=True)
class Transformation:
    """Bilinear scaling of latents to `size` (height, width), and of images to `ratio` times that, followed by
    counterclockwise quarter turns.
    """

    size: tuple[int, int]
    quarter_turns: int
    ratio: int

    def latents(self, latents: torch.Tensor) -> torch.Tensor:
        return self._apply(latents, self.size)

    def images(self, images: torch.Tensor) -> torch.Tensor:
        return self._apply(images, (self.size[0] * self.ratio, self.size[1] * self.ratio))

    def _apply(self, tensor: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        if tuple(tensor.shape[-2:]) != size:
            tensor = functional.interpolate(tensor, size=size, mode="bilinear", align_corners=False)
        return tensor.rot90(self.quarter_turns, (-2, -1))


def smallest(latent_size: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of the smallest latents that a transformation makes from `latent_size`."""
    return _with_height(math.ceil(latent_size[0] * SMALLEST), latent_size)


def draw(
    chances: torch.Tensor, probability: float, latent_size: tuple[int, int], ratio: int
) -> tuple[Transformation | None, Transformation | None]:
    """Return transformations of a step's images before the encoder and of its latents of `latent_size` before the
    decoder, from `DRAWS` numbers `chances` in [0, 1). `probability` applies to the second, 0.5 in the paper; `ratio` is
    image height / latent height.
    """
    which, side, turns, lower = chances.tolist()
    least = smallest(latent_size)[0]
    if (which >= probability and lower >= LOWER_RESOLUTION) or latent_size[0] <= least:
        return None, None
    height = least + int(side * (latent_size[0] - least))  # whole numbers, so that images and latents agree
    size = _with_height(height, latent_size)
    if which < probability:
        return None, Transformation(size, 1 + int(turns * 3), ratio)
    return Transformation(size, 0, ratio), None


def _with_height(height: int, latent_size: tuple[int, int]) -> tuple[int, int]:
    return height, max(1, round(latent_size[1] * height / latent_size[0]))
