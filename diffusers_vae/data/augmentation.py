"""Random changes of training images by torchvision's transforms: mirroring, colours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torchvision.transforms import v2

from .config import DataConfig


class Augmentation:
    """Transforms of `data.horizontal_flip`, `data.vertical_flip` and `data.color_jitter`, sampled for each image and
    epoch: a pure function of (seed, epoch, index).
    """

    def __init__(self, config: DataConfig):
        steps = [v2.RandomHorizontalFlip()] * config.horizontal_flip + [v2.RandomVerticalFlip()] * config.vertical_flip
        steps += [v2.ColorJitter(*config.color_jitter)] if config.color_jitter else []
        self.transform = v2.Compose(steps)

    @staticmethod
    def of(config: DataConfig) -> Augmentation | None:
        """Return the transforms of `config`, or None if it has none."""
        asked = config.horizontal_flip or config.vertical_flip or config.color_jitter
        return Augmentation(config) if asked else None

    def __call__(self, pixels: torch.Tensor, seed: int, epoch: int, indices: Sequence[int]) -> torch.Tensor:
        """Return the images (B, C, H, W) at these indices, each transformed."""
        before, changed = torch.get_rng_state(), []  # torchvision uses the global generator, and others may too
        try:
            for image, index in zip(pixels, indices, strict=True):
                state = np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)
                torch.default_generator.manual_seed(int(state[0]) >> 1)
                changed.append(self.transform(image))
        finally:
            torch.set_rng_state(before)
        return torch.stack(changed)
