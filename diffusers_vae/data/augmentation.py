"""Training images as they are not in the files: mirrored, in other colours, by torchvision's transforms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torchvision.transforms import v2

from .batch import ReadImages
from .config import DataConfig
from .order import MicroBatch


class Augmentation:
    """What `data.horizontal_flip`, `data.vertical_flip` and `data.color_jitter` ask for, of every image in every epoch
    something else: a pure function of (seed, epoch, index).
    """

    def __init__(self, config: DataConfig):
        steps = [v2.RandomHorizontalFlip()] * config.horizontal_flip + [v2.RandomVerticalFlip()] * config.vertical_flip
        steps += [v2.ColorJitter(*config.color_jitter)] if config.color_jitter else []
        self.transform = v2.Compose(steps)

    @staticmethod
    def of(config: DataConfig) -> Augmentation | None:
        """None where nothing is asked for."""
        asked = config.horizontal_flip or config.vertical_flip or config.color_jitter
        return Augmentation(config) if asked else None

    def __call__(self, read: ReadImages, batch: MicroBatch) -> ReadImages:
        """The images of the batch that could be read, each changed."""
        before = torch.get_rng_state()  # of which torchvision draws, and others may, too
        try:
            changed = [
                self._changed(pixels, np.random.SeedSequence([batch.seed, batch.epoch, batch.indices[place]]))
                for place, pixels in zip(read.kept, read.pixels, strict=True)
            ]
        finally:
            torch.set_rng_state(before)
        return replace(read, pixels=torch.stack(changed)) if changed else read

    def _changed(self, pixels: torch.Tensor, seed: np.random.SeedSequence) -> torch.Tensor:
        torch.default_generator.manual_seed(int(seed.generate_state(1, np.uint64)[0]) >> 1)
        return self.transform(pixels)
