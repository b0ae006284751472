"""The order of images: a pure function of (seed, epoch), dealt out to processes and micro-steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import torch

from ..images import to_model_range
from .sources import ImageSet, ReadImages

PARTS = 64
"""Into which a data set is cut to be measured: enough for as many processes."""
AHEAD = 4
"""Batches that are read while one is used."""


@dataclass(frozen=True)
class MicroBatch:
    """What one process puts through the model in one forward."""

    indices: list[int]
    """Into the data set; never empty."""
    first: int
    """Place of the first of these images in its optimiser step's batch, in which they lie side by side."""
    count: int
    """Images in the optimiser step's batch, over all processes and micro-steps."""
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
    start: int = 0,
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
        start: images of this epoch that were seen already: where an interrupted run goes on.
    """
    order = np.random.default_rng([seed, epoch]).permutation(length)
    for begin in range(start, length, batch_size):
        batch = order[begin : begin + batch_size]
        size, larger = divmod(len(batch), processes * micro_steps)  # the first parts have one image more
        ends = [part * size + min(part, larger) for part in range(processes * micro_steps + 1)]
        yield [
            MicroBatch(batch[first:end].tolist(), first, len(batch), (end - first) / len(batch))
            if end > first
            else MicroBatch([int(batch[0])], 0, len(batch), 0.0)
            for first, end in list(pairwise(ends))[rank::processes]
        ]


def step_generator(seed: int, epoch: int, start: int, device: torch.device) -> torch.Generator:
    """For all that is random in one optimiser step's batch, drawn on `device`.

    A pure function of (seed, epoch, start), `start` being the images of the epoch before this batch: every process
    draws for the whole batch and takes the rows of its images, so that an image's noise depends neither on how many
    processes there are nor on where a run was interrupted.
    """
    state = np.random.SeedSequence([seed, epoch, start]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]) >> 1)


def image_batches(
    image_set: ImageSet,
    batch_size: int,
    max_images: int | None,
    device: torch.device,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[tuple[int, list[int], torch.Tensor]]:
    """Part, indices and images (B, C, H, W) in [-1, 1] on `device`, in the set's own order, of the first `max_images`.

    A part is a run of whole batches that one process sees, whatever `processes`: figures of an image, and sums over a
    part, are the same for any number of them. There are at most `PARTS`, so that one sum a part can be kept.

    Raises:
        ValueError: naming the file that cannot be read, unless the set skips such files; then they are left out, and
            join its `errors`.
    """
    count = len(image_set) if max_images is None else min(max_images, len(image_set))
    starts = range(0, count, batch_size)
    cut = np.array_split(starts, min(PARTS, max(1, len(starts))))
    own = [(part, start) for part in range(rank, len(cut), processes) for start in cut[part].tolist()]
    batches = [range(start, min(start + batch_size, count)) for _, start in own]
    for (part, _), (indices, read) in zip(own, read_ahead(image_set, batches), strict=True):
        kept, images = kept_images(image_set, indices, read, device)
        if kept:
            yield part, kept, images


def read_ahead(image_set: ImageSet, batches: Sequence[range]) -> Iterator[tuple[range, ReadImages]]:
    """Batch by batch, indices and what could be read, the next ones by threads while one is used."""
    pool = ThreadPoolExecutor(AHEAD)
    later = iter(batches)
    reading = deque(pool.submit(image_set.__getitems__, batch) for batch in islice(later, AHEAD))
    try:
        for batch in batches:
            yield batch, reading.popleft().result()
            reading += [pool.submit(image_set.__getitems__, next_one) for next_one in islice(later, 1)]
    finally:  # where not all are wanted, none is waited for
        pool.shutdown(wait=False, cancel_futures=True)


def kept_images(
    image_set: ImageSet, indices: Sequence[int], read: ReadImages, device: torch.device
) -> tuple[list[int], torch.Tensor]:
    """Those of the indices whose images could be read, and these, (B, C, H, W) in [-1, 1] on `device`; the others join
    the set's `errors`, or are a ValueError, as the set has it.
    """
    read.checked()
    image_set.errors += tuple(error for error in read.errors if error not in image_set.errors)
    pixels = read.pixels
    if device.type == "cuda" and not pixels.is_cuda:  # whose work so far is not waited for, if memory is pinned
        pixels = pixels.pin_memory()
    return [indices[place] for place in read.kept], to_model_range(pixels.to(device, non_blocking=True))
