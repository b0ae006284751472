"""Images of a set in batches, in set order, for measuring, encoding and showing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch

from ..images.ranges import to_model_range
from ..silence import alone, report_progress
from .sets import ImageSet, ReadImages

PARTS = 64
"""Number of parts into which a data set is divided for measuring, the maximum number of useful processes."""
AHEAD = 4
"""Number of batches that are read ahead."""


def image_batches(
    image_set: ImageSet,
    batch_size: int,
    max_images: int | None,
    device: torch.device,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[tuple[int, list[int], torch.Tensor]]:
    """Yield part, indices and images (B, C, H, W) in [-1, 1] on `device`, of the first `max_images` in set order.

    A part is a run of whole batches that one process handles: sums over one of the at most `PARTS` parts are the same
    for any number of processes. Unreadable files raise a ValueError, or are added to the set's `errors` if it skips
    them.
    """
    count = len(image_set) if max_images is None else min(max_images, len(image_set))
    starts = range(0, count, batch_size)
    cut = np.array_split(starts, min(PARTS, max(1, len(starts))))
    batches_of = [(part, start) for part in range(rank, len(cut), processes) for start in cut[part].tolist()]
    batches = [range(start, min(start + batch_size, count)) for _, start in batches_of]
    for (part, _), (indices, read) in zip(batches_of, read_ahead(image_set, batches), strict=True):
        kept, images = kept_images(image_set, indices, read, device)
        report_progress()
        if kept:
            yield part, kept, images


def read_ahead(image_set: ImageSet, batches: Sequence[range]) -> Iterator[tuple[range, ReadImages]]:
    """Yield the indices of each batch and the images that could be read; threads read ahead."""
    pool = ThreadPoolExecutor(AHEAD)
    later = iter(batches)
    reading = deque(pool.submit(image_set.read, batch) for batch in islice(later, AHEAD))
    try:
        for batch in batches:
            with alone(f"reading images {batch.start} to {batch.stop - 1}"):
                read = reading.popleft().result()
            yield batch, read
            reading += [pool.submit(image_set.read, next_one) for next_one in islice(later, 1)]
    finally:  # if iteration stops early, do not wait for the others
        pool.shutdown(wait=False, cancel_futures=True)


def kept_images(
    image_set: ImageSet, indices: Sequence[int], read: ReadImages, device: torch.device
) -> tuple[list[int], torch.Tensor]:
    """Return the indices whose images could be read, and these images (B, C, H, W) in [-1, 1] on `device`. Errors of
    others are added to those of the set, or raised.
    """
    read.checked()
    image_set.errors += tuple(error for error in read.errors if error not in image_set.errors)
    pixels = read.pixels
    if device.type == "cuda" and not pixels.is_cuda:  # pinned memory is copied without waiting for earlier work
        pixels = pixels.pin_memory()
    return [indices[position] for position in read.kept], to_model_range(pixels.to(device, non_blocking=True))
