"""Set-up of the processes of a run: Accelerator, precision, threads and signals."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, is_torch_version, parse_choice_from_env

from ..models import fast_dtype
from ..processes import Signals, lossy_output
from ..settings import begun_with
from ..silence import GROUP_TIMEOUT, PATIENCE, Patience, watched
from .config import Precision, RunConfig
from .trackers import check_installed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """This process and its group, as `accelerate launch` started them."""

    accelerator: Accelerator
    signals: Signals
    patience: Patience


@contextmanager
def launched(
    run: RunConfig, fast_in_bfloat16: Callable[[torch.device], bool], patience: Patience = PATIENCE
) -> Generator[Launch]:
    """Set up the processes of a run, and watch them and their signals within the context. From now on, this process
    flushes denormal numbers to 0.

    Args:
        run: settings of the run.
        fast_in_bfloat16: returns whether autocast makes steps faster on a device that multiplies bfloat16 in hardware.
        patience: time limits for silent processes, see `silence.watched`.

    Raises:
        Interrupted: after SIGTERM, SIGINT, SIGUSR1 or SIGHUP.
        TimeoutError: if other processes have not started.
        ValueError: if settings and launcher contradict each other.
    """
    # Averages of gradients that have become 0 decay to denormal numbers, which double the time of an optimizer step on
    # a CPU. Threads inherit this from the one that starts them, so it comes first.
    torch.set_flush_denormal(True)
    before = torch.are_deterministic_algorithms_enabled()
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        with lossy_output(), Signals() as signals, watched(patience):
            yield Launch(_new_accelerator(run, _precision(run, fast_in_bfloat16)), signals, patience)
    finally:
        torch.use_deterministic_algorithms(before)


def _new_accelerator(run: RunConfig, precision: str) -> Accelerator:
    check_installed(run.trackers)
    _forget_other_precision(precision)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # without it, Accelerate does not start several processes on a CPU
        mixed_precision=precision,
        log_with=[*run.trackers] or None,
        project_dir=run.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=GROUP_TIMEOUT)],
    )
    _check_launch(accelerator, run)
    _use_all_cores(accelerator)
    return accelerator


def _forget_other_precision(precision: str) -> None:
    """Allow another precision than an earlier run in this process used, which Accelerate (as of 1.14) refuses."""
    state: Any = AcceleratorState
    if state._shared_state.get("_mixed_precision") not in (None, precision):
        state._reset_state()


def _precision(run: RunConfig, fast_in_bfloat16: Callable[[torch.device], bool]) -> str:
    """Return the precision of the config, the launcher or the begun run, in this order, else bf16 where it is fast."""
    if run.mixed_precision:
        return run.mixed_precision
    if (asked := parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")) != "no":  # the same as no request
        return asked
    if (begun := begun_with(run.output_dir, "run", "mixed_precision")) in get_args(Precision):
        return begun
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return "bf16" if fast_in_bfloat16(device) and fast_dtype(device) == torch.bfloat16 else "no"


def _use_all_cores(accelerator: Accelerator) -> None:
    """Use all cores where a launcher set OMP_NUM_THREADS to 1, as `accelerate launch` and torchrun do by default.
    Without a launcher, the value is the user's and holds.
    """
    launched = not {"ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE"}.isdisjoint(os.environ)
    if launched and accelerator.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes)
        torch.set_num_threads(max(1, (cores or 1) // sharing))


class SharedCores:
    """Lowers the number of threads of this process if other processes use its cores.

    All threads of a convolution spin until the last one is done. Two runs at once on two cores are therefore 18 times
    as slow as one run alone with two threads each, but only 1.5 times as slow with one thread each. The number is never
    raised again, because every change alters the rounding of later steps.

    Args:
        wanted: whether to change the number of threads; False if nothing may alter the rounding.
        window: seconds between two measurements.
        tasks: folder with the `schedstat` of each thread; systems other than Linux have none, and nothing is changed.
    """

    FREE = 0.25
    """Number of missing cores, on average, that is tolerated."""
    FIRST_STEPS = 10
    """Number of first calls that change nothing: first steps set much up, and a dry run must repeat itself."""

    def __init__(self, wanted: bool, window: float = 10.0, tasks: Path = Path("/proc/self/task")):
        self.wanted, self.window, self.tasks = wanted, window, tasks
        self.calls = 0
        self.looked = time.monotonic()
        self.times = self._read()

    def adjusted(self) -> list[str]:
        """Measure, and return the change in words; an empty list if there was none."""
        self.calls += 1
        threads = torch.get_num_threads()
        first = self.calls <= self.FIRST_STEPS
        if not self.wanted or first or threads == 1 or time.monotonic() - self.looked < self.window:
            return []
        before, self.times, self.looked = self.times, self._read(), time.monotonic()
        took = {
            task: [now - then for now, then in zip(times, before[task], strict=True)]
            for task, times in self.times.items()
            if task in before
        }
        main = sum(took.get(str(os.getpid()), ()))
        missing = sum(waited for _, waited in took.values()) / main if main else 0.0
        fewer = max(1, threads - math.ceil(missing - self.FREE))
        if fewer >= threads:
            return []
        torch.set_num_threads(fewer)
        logger.warning(
            "other processes use %.1f of this run's cores: continuing with %d instead of %d threads, which changes "
            "rounding. To run several trainings at once, give each its own cores, as with taskset (docs/runs.md)",
            missing,
            fewer,
            threads,
        )
        return [f"threads {threads} -> {fewer}"]

    def _read(self) -> dict[str, tuple[int, int]]:
        """Return the nanoseconds for which each thread has run and has waited for a core."""
        times = {}
        for file in self.tasks.glob("*/schedstat"):
            with suppress(OSError, ValueError):  # the thread has ended
                run, waited, _ = map(int, file.read_text(encoding="utf-8").split())
                times[file.parent.name] = run, waited
        return times


FSDP2_TORCH = "2.15"  # the first that was seen to give the gradients of one process


def _check_launch(accelerator: Accelerator, run: RunConfig) -> None:
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (
        kind == DistributedType.FSDP and not accelerator.is_fsdp2
    ):
        raise ValueError(
            f"processes must work together by DDP or FSDP2, got {kind.value}"
            f"{' version 1' if kind == DistributedType.FSDP else ''}; training/configs/accelerate/ has examples"
        )
    if kind == DistributedType.FSDP and not is_torch_version(">=", FSDP2_TORCH):
        raise ValueError(
            f"FSDP2 needs torch {FSDP2_TORCH} or later, got {torch.__version__}: 2.7.1 loses gradients of some "
            "tensors. Update torch, or let the processes work together by DDP"
        )
    parts = accelerator.num_processes * run.gradient_accumulation_steps
    if run.batch_size % parts:
        raise ValueError(
            "run.batch_size must be divisible by the number of processes times run.gradient_accumulation_steps, "
            f"{parts}, got {run.batch_size}"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            "gradient accumulation is set by run.gradient_accumulation_steps, not by the launcher, got "
            f"{accelerator.gradient_accumulation_steps} there"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed precision on a CPU must be bf16 or no, got fp16")


def launch_summary(accelerator: Accelerator, run: RunConfig) -> str:
    """Describe precision, processes and images per forward in a few words."""
    device_batch_size = run.batch_size // (accelerator.num_processes * run.gradient_accumulation_steps)
    precision = {"no": "float32"}.get(accelerator.mixed_precision, f"{accelerator.mixed_precision} autocast")
    return f"{precision} on {accelerator.num_processes} x {accelerator.device}, {device_batch_size} images per forward"


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Speed:
    """Throughput of the training steps, without the first, which includes set-up."""

    def __init__(self):
        self.images, self.seconds, self.warm = 0, 0.0, False

    def begin_step(self) -> None:
        """Start the clock."""
        self.began = time.monotonic()

    def end_step(self, images: int) -> None:
        """Count the images of a step."""
        if self.warm:
            self.images, self.seconds = self.images + images, self.seconds + time.monotonic() - self.began
        self.warm = True

    def images_per_second(self) -> float | None:
        """Return the mean over the steps; None after the first step only."""
        return self.images / self.seconds if self.images else None
