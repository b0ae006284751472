"""How a step runs: eagerly, compiled, or as one CUDA graph; chosen by rules that were measured."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import torch
from accelerate import Accelerator

from ..processes import on_main
from ..settings import begun_with
from .config import RunConfig, StepMode
from .step import Program

logger = logging.getLogger(__name__)

LAUNCH_BOUND = 2**25
"""Values of the widest feature maps of a step up to which a GPU waits for the CPU to launch its kernels."""
STEPS_TO_COMPILE = {"cpu": 4_000, "cuda": 20_000}
"""Steps from which torch.compile saves more time than it takes: on a CPU 6 s, or 3 s from its cache; on a GPU 10 to
40 s."""
LARGE_STEPS_TO_COMPILE = 3_000
"""The same on a GPU that need not wait for the CPU: an f8 step at 256x256 takes 22 ms less of 138."""


def obstacle_to_graph(run: RunConfig, program: Program, accelerator: Accelerator) -> str:
    """Return why steps cannot be captured as a CUDA graph, in words that follow "needs"; nothing if they can."""
    if accelerator.device.type != "cuda":
        return f"a CUDA GPU, got {accelerator.device.type}"
    return _obstacle_to_one_program(run, program, accelerator)


def _obstacle_to_one_program(run: RunConfig, program: Program, accelerator: Accelerator) -> str:
    """Return likewise why losses, gradients and updates cannot be one program."""
    if program.changes:
        return f"steps that are all the same program, got {program.changes}"
    if accelerator.num_processes > 1:
        return f"one process, got {accelerator.num_processes}"
    if accelerator.scaler:
        return "bf16 or float32, got run.mixed_precision fp16"
    asked = {"gradient_accumulation_steps": 1, "gradient_checkpointing": False, "on_nonfinite": "stop"}
    for name, wanted in asked.items():
        if (value := getattr(run, name)) != wanted:
            return f"run.{name} {str(wanted).lower()}, got {str(value).lower()}"
    return ""


def settled(run: RunConfig, program: Program, images: int, accelerator: Accelerator) -> RunConfig:
    """The settings with `run.step` as it is on this machine: what they say, what the run was begun with, or by rule for
    a run on `images` images.

    Raises:
        ValueError: when `run.step` asks for what cannot be.
    """
    obstacle = obstacle_to_graph(run, program, accelerator)
    if run.step == "graph" and obstacle:
        raise ValueError(f"run.step graph needs {obstacle}: set run.step to auto")
    if run.step == "compiled" and program.changes:
        raise ValueError(
            f"run.step compiled needs steps that are all the same program, got {program.changes}: set run.step to auto"
        )
    if run.step != "auto":
        return run

    def choose() -> StepMode:
        begun = begun_with(run.output_dir, "run", "step")
        if begun in get_args(StepMode) and begun != "auto" and not (begun == "graph" and obstacle):
            return begun
        if _compiling_pays(run, program, images, accelerator.device):
            return "compiled"
        return "eager" if obstacle or program.values > LAUNCH_BOUND else "graph"

    return replace(run, step=on_main(choose))


def _compiling_pays(run: RunConfig, program: Program, images: int, device: torch.device) -> bool:
    if program.changes or run.deterministic or device.type not in program.compiles:
        return False
    large = device.type == "cuda" and program.values > LAUNCH_BOUND
    needed = LARGE_STEPS_TO_COMPILE if large else STEPS_TO_COMPILE[device.type]
    return run.total_images(images) / run.batch_size >= needed


def described(run: RunConfig, program: Program, accelerator: Accelerator) -> str:
    """Say in a few words how steps run."""
    if compiles_whole_steps(run, program, accelerator):
        return "each step one compiled program"
    compiled = ["compiled"] * (run.step == "compiled")
    captured = ["one CUDA graph per step"] * captures(run, program, accelerator)
    return ", ".join(compiled + captured) or "eager steps"


def captures(run: RunConfig, program: Program, accelerator: Accelerator) -> bool:
    """Return whether steps are captured, where `run.step` is settled."""
    wanted = run.step == "graph" or (run.step == "compiled" and program.values <= LAUNCH_BOUND)
    return wanted and not obstacle_to_graph(run, program, accelerator)


def compiles_whole_steps(run: RunConfig, program: Program, accelerator: Accelerator) -> bool:
    """Return whether gradients and updates are compiled with the losses, where `run.step` is settled."""
    on_cpu = accelerator.device.type == "cpu" and "cpu" in program.compiles
    return run.step == "compiled" and on_cpu and not _obstacle_to_one_program(run, program, accelerator)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled for each size of batch; where that fails, a warning, and `function` itself.

    One program for all sizes would take over as soon as it is there, and round otherwise, so that a run would depend on
    where it was interrupted.
    """
    from torch._dynamo import config, exc  # which takes a second to import

    config.recompile_limit = 64
    program = torch.compile(function, dynamic=False)

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal program
        try:
            return program(*args, **kwargs)
        except (exc.TorchDynamoException, RuntimeError) as error:
            if program is function:
                raise
            logger.warning("torch.compile failed, so the run goes on without: %s", first_line(error))
            program = function
            return function(*args, **kwargs)

    return run


def first_line(error: BaseException) -> str:
    """Return the first line of the error that came first: when a capture fails, its end raises another one."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).strip().partition("\n")[0]
