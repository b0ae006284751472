"""Terms of steps: summed over micro-batches and processes, and checked for non-finite values."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from ..data import MicroBatch, Read, TrainingSet
from ..processes import gather, process_share
from ..storage import make_folder, naming, save_tensors, sync
from .checkpoint import whole
from .step import StepTerms


@dataclass(frozen=True)
class SeenBatch:
    """A micro-batch and its losses, for the dump of a step that is not finite."""

    batch: MicroBatch
    read: Read
    inputs: dict[str, torch.Tensor]
    terms: StepTerms

    @property
    def indices(self) -> list[int]:
        """Indices of the images that could be read."""
        return [self.batch.indices[position] for position in self.read.kept]


def sums_of(terms: StepTerms, count: int) -> torch.Tensor:
    """Return the loss and the other terms, each summed over the images, and the number of images."""
    loss = terms.loss.detach() * count
    per_image = [values.detach().sum() for values in terms.per_image.values()]
    return torch.stack([loss, *per_image, torch.full_like(loss, count)])


def summed(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """Return the sum over all processes, on all of them."""
    return cast(torch.Tensor, accelerator.reduce(values, "sum"))


class RunningTerms:
    """Accumulated `sums_of` of this process since the last `take`."""

    def __init__(self, accelerator: Accelerator, terms: tuple[str, ...]):
        self.accelerator, self.names = accelerator, ("loss", *terms)
        exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
        self.sums = torch.zeros(len(self.names) + 1, dtype=exact, device=accelerator.device)
        self.shown = time.monotonic()

    def add(self, sums: torch.Tensor) -> None:
        self.sums += sums

    def put(self, sums: list[float]) -> None:
        self.sums.copy_(torch.tensor(sums, dtype=torch.float64))

    def take(self) -> dict[str, float | None]:
        """Return the means over all processes, and reset the sums."""
        sums = summed(self.accelerator, self.sums).cpu().double().numpy()
        self.sums.zero_()
        return self._means(sums)

    def show(self, bar: tqdm[Any]) -> None:
        """Show this process's means beside the progress bar, at most once a second, because reading them waits for the
        device.
        """
        if not bar.disable and time.monotonic() - self.shown > 1 and self.sums[-1] > 0:
            self.shown = time.monotonic()
            bar.set_postfix({name: f"{value:.4g}" for name, value in self._means(self.sums.tolist()).items()})

    def _means(self, sums: Sequence[float] | np.ndarray) -> dict[str, float | None]:
        """Return the means by name; None if every step was skipped."""
        return {
            name: float(total / sums[-1]) if sums[-1] else None
            for name, total in zip(self.names, sums[:-1], strict=True)
        }


class StepStatistics:
    """Sums of the statistics of a step's micro-batches, weighted by their shares."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.share = 0.0

    def add(self, statistics: dict[str, torch.Tensor], share: float) -> None:
        for name, value in statistics.items():
            exact = torch.float32 if value.device.type == "mps" else torch.float64
            self.sums[name] = self.sums.get(name, 0) + value.detach().to(exact) * share
        self.share += share

    def means(self, accelerator: Accelerator) -> dict[str, torch.Tensor]:
        """Return the means over the images of the step, on all processes."""
        if not self.sums:
            return {}
        first = next(iter(self.sums.values()))
        flat = torch.cat([*(value.flatten() for value in self.sums.values()), first.new_tensor([self.share])])
        *values, share = summed(accelerator, flat).split([*(v.numel() for v in self.sums.values()), 1])
        return {
            name: (value / share).view(self.sums[name].shape) for name, value in zip(self.sums, values, strict=True)
        }


def sum_gradients(accelerator: Accelerator, module: nn.Module) -> None:
    """Replace the gradients of each process, which are of its share of the loss, by their sum over processes."""
    if accelerator.num_processes > 1:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        flat = summed(accelerator, torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))


class StepFlags:
    """Flags of a step: which terms are not finite on any process, whether no process has an image, and whether any was
    asked to stop. They are copied from the device without waiting for it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        step_terms: RunningTerms,
        norms: dict[str, torch.Tensor],
        asked: bool,
        step: int,
        seen: list[SeenBatch],
    ):
        self.names, self.asked, self.step, self.seen = (*step_terms.names, *norms), asked, step, seen
        sums = step_terms.sums
        flags = ~torch.cat([sums[:-1], *(whole(norm).to(sums).view(1) for norm in norms.values())]).isfinite()
        flags = torch.cat([flags, sums[-1:] > 0])
        if accelerator.num_processes > 1:
            both = torch.cat([flags, torch.full([1], asked, device=flags.device)])
            flags = summed(accelerator, both.int())
        self.done = None
        if flags.is_cuda:
            flags, self.done = flags.to("cpu", non_blocking=True), torch.cuda.Event()
            self.done.record()
        self.flags = flags

    def read(self) -> tuple[list[str], bool, bool]:
        """Wait for the flags. Return the names of the terms that are not finite, whether there is no image, and whether
        to stop.
        """
        if self.done:
            self.done.synchronize()
        flags = [*self.flags.tolist(), self.asked]
        bad = [name for name, flag in zip(self.names, flags, strict=False) if flag]
        images, asked = flags[len(self.names) : len(self.names) + 2]
        return bad, not images, bool(asked)


@dataclass
class PendingSteps:
    """Steps whose flags have not been read yet."""

    flags: list[StepFlags] = field(default_factory=list)

    def check(self, newest: StepFlags, at_once: bool) -> tuple[StepFlags, list[str], bool, bool]:
        """Add the newest step. Return a step and its `StepFlags.read`: the first step that is not finite or has no
        image, otherwise the newest one, or the one before unless `at_once`.
        """
        self.flags.append(newest)
        checked, bad, empty, stop = newest, [], False, False
        while self.flags and not (bad or empty) and (at_once or len(self.flags) > 1):
            checked = self.flags.pop(0)
            bad, empty, asked = checked.read()
            stop = stop or asked
        return checked, bad, empty, stop


MAX_DUMPS = 10


def finite(value: torch.Tensor) -> float | None:
    """Return the scalar as a number; None if it is not finite."""
    return value.item() if value.isfinite() else None


def report_not_finite(
    train_set: TrainingSet, output_dir: Path, checked: StepFlags, skipped: int, bad: list[str]
) -> str:
    """Write the batch of the step to output_dir, on all processes, and return a description of the fault."""
    step, seen = checked.step, checked.seen
    rank, _ = process_share()
    culprits = [
        train_set.name(index)
        for part in seen
        for index, total in zip(part.indices, torch.stack([*part.terms.per_image.values()]).sum(0), strict=True)
        if not total.isfinite()
    ]
    folder = output_dir / "nonfinite"
    path = folder / f"step-{step:09d}-process-{rank}.safetensors"
    where = f"not written, as {MAX_DUMPS} were"
    if seen and skipped < MAX_DUMPS:
        parts = [
            {"indices": torch.tensor(part.indices)} | part.read.tensors() | part.inputs | part.terms.per_image
            for part in seen
        ]
        tensors = {name: torch.cat([part[name].detach().cpu() for part in parts]) for name in parts[0]}
        try:
            with naming(path):
                make_folder(folder)
                save_tensors(path, tensors)
                sync(path)
            where = f"in {path}"
        except OSError as error:  # the first fault must be reported all the same
            where = f"not written: {error}"
    found = gather((culprits, where))
    culprits = [name for names, _ in found for name in names]
    paths = [where for names, where in found if names] or [where for _, where in found]
    shown = ", ".join(culprits[:3]) + " ..." * (len(culprits) > 3)
    which = f", in {len(culprits)} of {seen[0].batch.count} images: {shown}" if culprits and seen else ""
    return f"{step}, not finite: {', '.join(bad)}{which}. Its images are {', '.join(paths)}"
