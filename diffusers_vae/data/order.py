"""Order of images: a pure function of (seed, epoch), distributed over processes and micro-steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch


@dataclass(frozen=True)
class MicroBatch:
    """Images of one forward on one process."""

    indices: list[int]
    """Indices into the data set, never empty."""
    first: int
    """Index of the first of these images in its optimiser step's batch, where they are contiguous."""
    count: int
    """Number of images in the optimiser step's batch, over all processes and micro-steps."""
    share: float
    """Share of these images in their optimiser step's batch; all shares of a step sum to 1."""
    seed: int = 0
    """Seed of the run."""
    epoch: int = 0
    """Epoch, from 0, which determines with the seed the random changes of an image."""


Batches = Iterator[np.ndarray]
"""Indices of the images of each optimiser step of an epoch."""


class Read(Protocol):
    """Images or latents of a training set that could be read."""

    @property
    def kept(self) -> Sequence[int]:
        """Return the positions, in the requested indices, of what was read."""
        ...

    @property
    def errors(self) -> tuple[str, ...]:
        """Return why the others could not be read, with their names."""
        ...

    def checked(self) -> Read:
        """Return this; ValueError if `errors` must stop the run."""
        ...

    def blank(self) -> Read:
        """Return one image as a substitute for none."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what was read, by name."""
        ...


class TrainingSet(Protocol):
    """Training set that is read in batches, every image once per epoch."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Read: ...

    def name(self, index: int) -> str: ...

    def batches(self, batch_size: int, seed: int, epoch: int, start: int) -> Batches:
        """Return the batches of an epoch after its first `start` images: a pure function of the arguments."""
        return shuffled(len(self), batch_size, seed, epoch, start)

    def read_batch(self, batch: MicroBatch) -> Read:
        """Read the images of a micro-batch, with the random changes of its epoch."""
        return self.read(batch.indices)


def shuffled(length: int, batch_size: int, seed: int, epoch: int, start: int) -> Batches:
    """Return batches of `length` images in random order; the last one holds the remainder."""
    order = np.random.default_rng([seed, epoch]).permutation(length)
    return (order[begin : begin + batch_size] for begin in range(start, length, batch_size))


def streamed(
    counts: np.ndarray,
    lanes: tuple[int, int],
    buffer: int,
    batch_size: int,
    seed: int,
    epoch: int,
    start: int,
) -> Batches:
    """Yield batches of images in contiguous blocks of `counts` (K,) images, in an order that needs few blocks at a
    time, nearly all by one worker of one process only.

    The blocks are put in random order and divided into `lanes[0]` times `lanes[1]` segments of equal length. Each of
    `lanes[0]` parts of a batch comes from a different segment, and so does each of `lanes[1]` consecutive batches. A
    process, which has the same part of each batch, and its workers, which take batches in turn, therefore use different
    segments. In a segment, images are shuffled among `buffer` over all segments.

    Raises:
        ValueError: If `start` lies within a batch: the images seen then depend on the earlier batch size.
    """
    length, (parts, phases) = int(counts.sum()), lanes
    if start % batch_size:
        raise ValueError(
            f"the order of a stream depends on run.batch_size, and {start} images of this epoch were seen, which "
            f"{batch_size} does not divide: continue with the run.batch_size that the run was begun with"
        )
    order = np.random.default_rng([seed, epoch]).permutation(len(counts))
    ends = counts[order].cumsum()
    firsts = (counts.cumsum() - counts)[order]  # index of the first image of each block
    cuts = [batch_size * part // parts for part in range(parts + 1)]
    whole, rest = divmod(length, batch_size)
    sizes = np.zeros((parts, phases), dtype=np.int64)
    for part, (low, high) in enumerate(pairwise(cuts)):
        for phase in range(phases):
            sizes[part, phase] = len(range(phase, whole, phases)) * (high - low)
        sizes[part, whole % phases] += max(0, min(high, rest) - low)
    begins = (sizes.cumsum() - sizes.ravel()).reshape(sizes.shape)
    window = max(1, buffer // (parts * phases))
    mixed: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    def segment(part: int, phase: int, low: int, high: int) -> np.ndarray:
        """Return positions, in the concatenated blocks, of the images `low` to `high` of a segment."""
        found = []
        for number in range(low // window, (high - 1) // window + 1):
            begin = number * window
            if mixed.get((part, phase), (None,))[0] != number:
                count = min(window, int(sizes[part, phase]) - begin)
                rng = np.random.default_rng([seed, epoch, part, phase, number])
                mixed[part, phase] = number, rng.permutation(count)
            found.append(begin + mixed[part, phase][1][max(low - begin, 0) : high - begin])
        return begins[part, phase] + np.concatenate(found)

    for step in range(start // batch_size, whole + (rest > 0)):
        phase, earlier = step % phases, step // phases
        size = batch_size if step < whole else rest
        positions = np.concatenate(
            [
                segment(part, phase, earlier * (high - low), earlier * (high - low) + min(high, size) - low)
                for part, (low, high) in enumerate(pairwise(cuts))
                if low < min(high, size)
            ]
        )
        blocks = ends.searchsorted(positions, side="right")
        yield firsts[blocks] + positions - (ends[blocks] - counts[order[blocks]])


def deal(
    batches: Batches, seed: int, epoch: int, rank: int = 0, processes: int = 1, micro_steps: int = 1
) -> Iterator[list[MicroBatch]]:
    """Yield a list of `micro_steps` micro-batches per optimiser step, for process `rank` of `processes`.

    The images of an optimiser step do not depend on `processes` or `micro_steps`. A process that is left without images
    in a small batch repeats one with share 0, because every process must take part.
    """
    for batch in batches:
        size, larger = divmod(len(batch), processes * micro_steps)  # the first parts have one more image
        ends = [part * size + min(part, larger) for part in range(processes * micro_steps + 1)]
        yield [
            MicroBatch(batch[first:end].tolist(), first, len(batch), (end - first) / len(batch), seed, epoch)
            if end > first
            else MicroBatch([int(batch[0])], 0, len(batch), 0.0, seed, epoch)
            for first, end in list(pairwise(ends))[rank::processes]
        ]


def step_generator(seed: int, epoch: int, start: int, device: torch.device) -> torch.Generator:
    """Return the generator on `device` for one optimiser step's batch, which follows `start` images of its epoch.

    Every process samples for the whole batch and uses the rows of its images, so that an image's noise depends neither
    on the number of processes nor on where a run was interrupted.
    """
    state = np.random.SeedSequence([seed, epoch, start]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]) >> 1)
