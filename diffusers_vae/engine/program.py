"""Execution modes of a step (eager, compiled, one CUDA graph) and the measured rules that choose between them."""

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
"""Largest number of values in the widest feature maps of a step for which a GPU waits for kernel launches."""
STEPS_TO_COMPILE = {"cpu": 4_000, "cuda": 20_000}
"""Number of steps from which torch.compile saves more time than it takes: 6 s on a CPU, or 3 s with its cache; 10 to
40 s on a GPU."""
LARGE_STEPS_TO_COMPILE = 3_000
"""The same for large steps on a GPU: a compiled f8 step at 256x256 takes 116 ms instead of 138."""


def obstacle_to_graph(run: RunConfig, program: Program, accelerator: Accelerator) -> str:
    """Return why steps cannot be captured as a CUDA graph, phrased to follow "needs"; an empty string if they can."""
    if accelerator.device.type != "cuda":
        return f"a CUDA GPU, got {accelerator.device.type}"
    return _obstacle_to_one_program(run, program, accelerator)


def _obstacle_to_one_program(run: RunConfig, program: Program, accelerator: Accelerator) -> str:
    """Return why losses, gradients and updates cannot be one program, phrased to follow "needs"."""
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
    """Return the settings with a definite `run.step`: the one that is set, else the one that the run was begun with,
    else the one by rule for a training set of `images` images.

    Raises:
        ValueError: if the requested `run.step` is not possible.
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
    """Describe in a few words how steps run."""
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
    """Return `function` compiled for each batch size. If compilation fails, log a warning and call `function` itself.

    A program with a dynamic batch size would replace the first one during the run and round differently, so that the
    result would depend on where a run was interrupted.
    """
    from torch._dynamo import config, exc  # takes a second to import

    config.recompile_limit = 64
    program = torch.compile(function, dynamic=False)

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal program
        try:
            return program(*args, **kwargs)
        except (exc.TorchDynamoException, RuntimeError) as error:
            if program is function:
                raise
            logger.warning("torch.compile failed, so the run continues with eager steps: %s", first_line(error))
            program = function
            return function(*args, **kwargs)

    return run


def first_line(error: BaseException) -> str:
    """Return the first line of the original error: a failed capture raises a second one at its end."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).strip().partition("\n")[0]
