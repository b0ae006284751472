"""How a step runs: eagerly, compiled, or captured as one CUDA graph; chosen by rules that were measured."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast, get_args

import torch
from accelerate import Accelerator

from ..processes import on_main
from ..settings import begun_with
from .config import RunConfig, StepMode
from .state import TrainState
from .step import Program, Step, StepTerms

logger = logging.getLogger(__name__)

LAUNCH_BOUND = 2**25
"""Values of the widest feature maps of a step up to which a GPU waits for the CPU to launch its kernels."""
STEPS_TO_COMPILE = {"cpu": 10_000, "cuda": 20_000}
"""Steps from which torch.compile saves more time than it takes: 10 to 40 s."""
LARGE_STEPS_TO_COMPILE = 3_000
"""The same on a GPU that need not wait for the CPU: an f8 step at 256x256 takes 22 ms less of 138."""


def obstacle_to_capture(run: RunConfig, program: Program, accelerator: Accelerator) -> str:
    """Return why steps cannot be captured as a CUDA graph, in words that follow "needs"; nothing if they can."""
    if accelerator.device.type != "cuda":
        return f"a CUDA GPU, got {accelerator.device.type}"
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
    obstacle = obstacle_to_capture(run, program, accelerator)
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
        if _compiling_pays(run, program, images, accelerator.device) and _compiler_works(accelerator.device):
            return "compiled"
        return "eager" if obstacle or program.values > LAUNCH_BOUND else "graph"

    return replace(run, step=on_main(choose))


def _compiling_pays(run: RunConfig, program: Program, images: int, device: torch.device) -> bool:
    if program.changes or run.deterministic or device.type not in program.compiles:
        return False
    large = device.type == "cuda" and program.values > LAUNCH_BOUND
    needed = LARGE_STEPS_TO_COMPILE if large else STEPS_TO_COMPILE[device.type]
    return run.total_images(images) / run.batch_size >= needed


def _compiler_works(device: torch.device) -> bool:
    try:
        torch.compile(lambda images: images.exp() + 1)(torch.ones(8, device=device))
    except Exception as error:  # no compiler, no headers, no Triton, too old a GPU: each has an error of its own
        logger.warning("torch.compile does not work here, so the run goes without: %s", _first_line(error))
        return False
    return True


def described(run: RunConfig, program: Program, accelerator: Accelerator) -> str:
    """Say in a few words how steps run."""
    compiled = ["compiled"] * (run.step == "compiled")
    captured = ["one CUDA graph per step"] * captures(run, program, accelerator)
    return ", ".join(compiled + captured) or "eager steps"


def captures(run: RunConfig, program: Program, accelerator: Accelerator) -> bool:
    """Return whether steps are captured, where `run.step` is settled."""
    wanted = run.step == "graph" or (run.step == "compiled" and program.values <= LAUNCH_BOUND)
    return wanted and not obstacle_to_capture(run, program, accelerator)


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
            logger.warning("torch.compile failed, so the run goes on without: %s", _first_line(error))
            program = function
            return function(*args, **kwargs)

    return run


def _first_line(error: BaseException) -> str:
    """Return the first line of the error that came first: when a capture fails, its end raises another one."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).strip().partition("\n")[0]


class CapturedStep:
    """A whole training step of a full batch as one CUDA graph, which the CPU starts by one call: losses, gradients,
    clipping, optimizer and moving average. It is captured at the first call.

    Args:
        state: of the run.
        step: computes the losses.
        max_norm: norm to which larger gradients are clipped; None: none.
        count: images of a full batch.
    """

    WARM_UP = 3
    """Steps before the capture, in which libraries choose algorithms and take memory."""

    def __init__(self, state: TrainState, step: Step, max_norm: float | None, count: int):
        self.state, self.step, self.max_norm, self.count = state, step, max_norm, count
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: dict[str, torch.Tensor] = {}
        self.works = True

    def takes(self, count: int) -> bool:
        """Whether a step on `count` images can be replayed."""
        return self.works and count == self.count

    def __call__(self, tensors: dict[str, torch.Tensor]) -> tuple[StepTerms, dict[str, torch.Tensor]] | None:
        """Take the step on what `Step.batch` gave. Return its terms and the norms of its gradients, or None if nothing
        was done, because it cannot be captured.
        """
        if self.graph is None and not self._capture(tensors):
            return None
        for name, value in tensors.items():
            self.inputs[name].copy_(value, non_blocking=True)
        cast(torch.cuda.CUDAGraph, self.graph).replay()
        self.state.count_average()
        # the next step takes the place of these before they are read
        per_image = {name: value.clone() for name, value in self.terms.per_image.items()}
        return replace(self.terms, per_image=per_image), {name: norm.clone() for name, norm in self.norms.items()}

    def _capture(self, tensors: dict[str, torch.Tensor]) -> bool:
        state = self.state
        self.inputs = {name: value.clone() for name, value in tensors.items()}
        # detached: a clone with a gradient would bind those of the capture to this stream
        before = [tensor.detach().clone() for tensor in self._changed()]
        slots = set(state.optimizer.optimizer.state)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(stream):
                for _ in range(self.WARM_UP):
                    self._take()
            torch.cuda.current_stream().wait_stream(stream)
            self._restore(before, slots)
            with torch.cuda.graph(graph):
                self.terms, self.norms = self._take()
        except Exception as error:
            torch.cuda.synchronize()
            self._restore(before, slots)
            state.zero_grad()
            self.works = False
            logger.warning("the step cannot be captured as a CUDA graph, so it runs eagerly: %s", _first_line(error))
            return False
        self.graph = graph
        return True

    def _take(self) -> tuple[StepTerms, dict[str, torch.Tensor]]:
        state = self.state
        terms = state.backward(self.step(state.model, self.inputs), 1.0)
        norms = state.clip(self.max_norm, judged=False)
        state.update()
        state.zero_grad()
        terms = replace(terms, loss=terms.loss.detach(), per_image={k: v.detach() for k, v in terms.per_image.items()})
        return replace(terms, network_loss=None), norms

    def _changed(self) -> list[torch.Tensor]:
        """All that a step changes, the optimizer's state last."""
        state = self.state
        average = state.ema.shadow_params if state.ema else []
        own = [*state.trained, *average, *state.plain_model.buffers()]
        states = state.optimizer.optimizer.state.values()
        return own + [value for kept in states for value in kept.values() if isinstance(value, torch.Tensor)]

    @torch.no_grad()
    def _restore(self, before: list[torch.Tensor], slots: set[Any]) -> None:
        """Undo the steps of the warm-up; the optimizer's state is 0 where there was none before."""
        optimizer = self.state.optimizer.optimizer
        if not slots:
            for kept in optimizer.state.values():
                for value in kept.values():
                    value.zero_()
        for tensor, value in zip(self._changed(), before, strict=False):
            tensor.copy_(value)
