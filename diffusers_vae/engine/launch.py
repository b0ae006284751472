"""The processes that `accelerate launch` started: their Accelerator, precision, threads and signals."""

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

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """A process that `accelerate launch` started, with all of its group."""

    accelerator: Accelerator
    signals: Signals
    patience: Patience


@contextmanager
def launched(
    run: RunConfig, fast_in_bfloat16: Callable[[torch.device], bool], patience: Patience = PATIENCE
) -> Generator[Launch]:
    """Set up the processes that `accelerate launch` started, and watch them and signals within. From now on this
    process computes with 0 in the place of denormal numbers.

    Args:
        run: settings of the run.
        fast_in_bfloat16: whether autocast makes its steps faster on a device that multiplies bfloat16 in hardware.
        patience: how long a process may be silent before all end with an error, as `silence.watched` says.

    Raises:
        Interrupted: after SIGTERM, SIGINT, SIGUSR1 or SIGHUP.
        TimeoutError: when other processes have not started.
        ValueError: when settings and launcher do not fit each other.
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
    _forget_other_precision(precision)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # then several processes are told apart only when it is said
        mixed_precision=precision,
        log_with=run.tracker,
        project_dir=run.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=GROUP_TIMEOUT)],
    )
    _check_launch(accelerator, run)
    _use_all_cores(accelerator)
    return accelerator


def _forget_other_precision(precision: str) -> None:
    """Let this process use another precision than the run before: Accelerate, as of 1.14, would refuse it."""
    state: Any = AcceleratorState
    if state._shared_state.get("_mixed_precision") not in (None, precision):
        state._reset_state()


def _precision(run: RunConfig, fast_in_bfloat16: Callable[[torch.device], bool]) -> str:
    """What config or launcher ask for, or the run was begun with; else bf16 where that is fast."""
    if run.mixed_precision:
        return run.mixed_precision
    if (asked := parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")) != "no":  # which is not told from nothing
        return asked
    if (begun := begun_with(run.output_dir, "run", "mixed_precision")) in get_args(Precision):
        return begun
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return "bf16" if fast_in_bfloat16(device) and fast_dtype(device) == torch.bfloat16 else "no"


def _use_all_cores(accelerator: Accelerator) -> None:
    """`accelerate launch` and torchrun confine every process on a CPU to one thread unless told otherwise. Without a
    launcher, a user has said so.
    """
    launched = not {"ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE"}.isdisjoint(os.environ)
    if launched and accelerator.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes)
        torch.set_num_threads(max(1, (cores or 1) // sharing))


class SharedCores:
    """Lowers the number of threads of this process where other processes use its cores.

    A thread that waits for its core keeps all others of a convolution waiting, and what they wait in is a loop: two
    runs at once on two cores, of two threads each, are 18 times as slow as one run alone, of one thread each 1.5 times.
    The number is never raised again, since every change rounds the steps that follow differently.

    Args:
        wanted: whether to do anything; False where nothing may change what a run computes.
        window: seconds of the main thread between two looks.
        tasks: folder with the `schedstat` of each thread; another system than Linux has none, and nothing is done.
    """

    FREE = 0.25
    """Cores that may be missing, on average: others use any machine now and then."""

    def __init__(self, wanted: bool, window: float = 10.0, tasks: Path = Path("/proc/self/task")):
        self.wanted, self.window, self.tasks = wanted, window, tasks
        self.looked = time.monotonic()
        self.times = self._read()

    def adjusted(self) -> list[str]:
        """Return the change in words, if there was one."""
        threads = torch.get_num_threads()
        if not self.wanted or threads == 1 or time.monotonic() - self.looked < self.window:
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
            "other processes use %.1f of the cores of this one: it goes on with %d instead of %d threads, which rounds "
            "sums differently. Give each of several runs its own cores, as `taskset -c 0 accelerate launch ...` does",
            missing,
            fewer,
            threads,
        )
        return [f"threads {threads} -> {fewer}"]

    def _read(self) -> dict[str, tuple[int, int]]:
        """Nanoseconds that each thread has run, and waited for a core."""
        times = {}
        for file in self.tasks.glob("*/schedstat"):
            with suppress(OSError, ValueError):  # the thread has ended
                run, waited, _ = map(int, file.read_text().split())
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
    """Bytes: the most that was held on the GPU, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Speed:
    """Time that training steps take, without the first, which sets much up."""

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
        """Return the mean over the steps; None if there was only the first."""
        return self.images / self.seconds if self.images else None
