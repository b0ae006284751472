"""Micro-batches of each step, read ahead by workers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, tee
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from ..data import MicroBatch, Read, TrainingSet, deal
from ..processes import ignore_signals
from ..silence import Patience, WorkerWatch
from .config import RunConfig

Steps = Iterator[tuple[int, int, list[MicroBatch]]]
"""Each optimizer step: the epoch, from 0; images of the epoch before this step; this process's micro-batches."""


def steps_from(
    train_set: TrainingSet, run: RunConfig, accelerator: Accelerator, images_seen: int, total_images: int
) -> Steps:
    """Yield the steps from `images_seen` to `total_images`."""
    while images_seen < total_images:
        epoch, start = divmod(images_seen, len(train_set))
        batches = train_set.batches(run.batch_size, run.seed, epoch, start)
        share = accelerator.process_index, accelerator.num_processes, run.gradient_accumulation_steps
        for micro_batches in deal(batches, run.seed, epoch, *share):
            if images_seen >= total_images:
                return
            yield epoch, images_seen - epoch * len(train_set), micro_batches
            images_seen += micro_batches[0].count


@contextmanager
def reader(
    train_set: TrainingSet, steps: Steps, workers: int, seed: int, device: torch.device, patience: Patience
) -> Generator[tuple[Steps, Callable[[MicroBatch], Read]]]:
    """Yield the steps and a function that reads their micro-batches in turn, while workers read ahead."""
    if not workers:
        yield steps, train_set.read_batch
        return
    steps, ahead = tee(steps)
    loader = DataLoader(
        _ByMicroBatch(train_set),
        batch_sampler=cast(Any, (batch for _, _, micro_batches in ahead for batch in micro_batches)),
        num_workers=workers,
        collate_fn=_as_read,
        worker_init_fn=ignore_signals,
        generator=torch.Generator().manual_seed(seed),  # otherwise every loader takes a number from the global one
        pin_memory=device.type == "cuda",
    )
    reads = iter(loader)
    watch = WorkerWatch(_processes(reads), partial(_names, train_set), patience)
    turns = cycle(range(workers))  # of the workers, in which they are given batches
    try:
        yield steps, lambda micro_batch: watch.wait(next(turns), micro_batch, partial(next, reads))
    finally:  # at its end, Python would send them a signal that they ignore, and wait
        _end_processes(reads)
        watch.close()


def _processes(reads: Any) -> list[BaseProcess]:
    """Return the worker processes of a `DataLoader`'s iterator, by the name that torch 2.7 to 2.15 gives them."""
    return reads._workers


def _end_processes(reads: Any) -> None:
    reads._shutdown_workers()


def _names(train_set: TrainingSet, micro_batch: MicroBatch) -> str:
    first, last = (train_set.name(micro_batch.indices[position]) for position in (0, -1))
    return f"{len(micro_batch.indices)} images, {first} to {last},"


@dataclass(frozen=True)
class _ByMicroBatch(Dataset[Read]):
    """A training set for torch's `DataLoader` whose sampler yields micro-batches."""

    train_set: TrainingSet

    def __len__(self) -> int:
        return len(self.train_set)

    def __getitems__(self, batch: MicroBatch) -> Read:
        return self.train_set.read_batch(batch)


def rows_of(micro_batch: MicroBatch, read: Read) -> slice | list[int]:
    """Return the rows of the step's batch whose images could be read."""
    if len(read.kept) == len(micro_batch.indices):
        return slice(micro_batch.first, micro_batch.first + len(read.kept))
    return [micro_batch.first + position for position in read.kept]


def _as_read(read: Any) -> Read:
    return read  # already a batch; by name, since a lambda does not reach the workers everywhere
