"""The processes that `accelerate launch` started: their Accelerator, precision and threads."""

from __future__ import annotations

import os
import sys
from typing import get_args

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, is_torch_version, parse_choice_from_env

from ..models import fast_dtype
from ..settings import begun_with
from ..silence import GROUP_TIMEOUT
from .config import Precision, RunConfig
from .step import Task


def new_accelerator(task: Task) -> Accelerator:
    """The Accelerator of this launch, in the precision of the run."""
    run, precision = task.config.run, _precision(task)
    if AcceleratorState._shared_state.get("_mixed_precision") not in (None, precision):
        AcceleratorState._reset_state()  # of a run before in this process, which Accelerate would hold this one to
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


def _precision(task: Task) -> str:
    """What config or launcher ask for, or the run was begun with; else bf16 where that is fast."""
    run = task.config.run
    if run.mixed_precision:
        return run.mixed_precision
    if (asked := parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")) != "no":  # which is not told from nothing
        return asked
    if (begun := begun_with(run.output_dir, "run", "mixed_precision")) in get_args(Precision):
        return begun
    cpu = torch.device("cpu")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else cpu
    return "bf16" if task.gains_by_bfloat16(device) and fast_dtype(device) == torch.bfloat16 else "no"


def _use_all_cores(accelerator: Accelerator) -> None:
    """`accelerate launch` confines every process on a CPU to one thread unless told otherwise."""
    if accelerator.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(max(1, cores // here))


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
