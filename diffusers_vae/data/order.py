"""The order of images: a pure function of (seed, epoch), dealt out to processes and micro-steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..images import to_model_range
from .sources import ImageSet


@dataclass(frozen=True)
class MicroBatch:
    """What one process puts through the model in one forward."""

    indices: list[int]
    """Into the data set; never empty."""
    share: float
    """What these images are of their optimiser step's batch. The shares of all processes and micro-steps sum to 1."""


def epoch_batches(
    length: int,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    processes: int = 1,
    micro_steps: int = 1,
) -> Iterator[list[MicroBatch]]:
    """One list of `micro_steps` micro-batches per optimiser step, for process `rank`; every image once per epoch.

    The images of an optimiser step do not depend on `processes` or `micro_steps`. The last batch of an epoch holds
    what remains; a process left without images there repeats one with share 0, since every process must take part.

    Args:
        length: number of images in the data set.
        batch_size: images per optimiser step over all processes.
        seed: of the run.
        epoch: from 0.
        rank: this process, from 0.
        processes: how many there are.
        micro_steps: forwards per optimiser step on one process (gradient accumulation).
    """
    order = np.random.default_rng([seed, epoch]).permutation(length)
    for start in range(0, length, batch_size):
        batch = order[start : start + batch_size]
        parts = np.array_split(batch, processes * micro_steps)[rank::processes]
        yield [
            MicroBatch(part.tolist(), len(part) / len(batch)) if len(part) else MicroBatch([int(batch[0])], 0.0)
            for part in parts
        ]


def image_batches(
    image_set: ImageSet, batch_size: int, max_images: int | None, device: torch.device
) -> Iterator[tuple[range, torch.Tensor]]:
    """Indices and images (B, C, H, W) in [-1, 1] on `device`, in the set's own order, at most `max_images` of them."""
    count = len(image_set) if max_images is None else min(max_images, len(image_set))
    for start in range(0, count, batch_size):
        indices = range(start, min(start + batch_size, count))
        yield indices, to_model_range(image_set.__getitems__(indices).to(device))
