"""Whole training steps as one program: a CUDA graph on a GPU, a compiled function on a CPU."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call, grad_and_value
from torch.optim.adamw import adamw

from .config import RunConfig
from .program import captures, compiles_whole_steps, first_line
from .state import TrainState
from .step import Step, StepTerms

logger = logging.getLogger(__name__)


class WholeStep:
    """A training step of a full batch as one program: losses, gradients, clipping, optimizer and moving average. The
    program is made at the first call.

    Args:
        state: state of the run.
        step: computes the losses.
        max_norm: norm to which gradients are clipped; None: no clipping.
        count: number of images of a full batch.
    """

    def __init__(self, state: TrainState, step: Step, max_norm: float | None, count: int):
        self.state, self.step, self.max_norm, self.count = state, step, max_norm, count
        self.works = True

    def takes(self, count: int) -> bool:
        """Return whether a step on `count` images can be this program."""
        return self.works and count == self.count

    def __call__(self, tensors: dict[str, torch.Tensor]) -> tuple[StepTerms, dict[str, torch.Tensor]] | None:
        """Take the step on the result of `Step.batch`. Return its terms and the norms of its gradients, or None if the
        program could not be made; nothing has changed in that case.
        """
        raise NotImplementedError


def whole_step(run: RunConfig, state: TrainState, step: Step, max_norm: float | None) -> WholeStep | None:
    """Return the program of full batches, or None if their steps run part by part. `run.step` must be settled."""
    if captures(run, step.program, state.accelerator):
        return CapturedStep(state, step, max_norm, run.batch_size)
    if compiles_whole_steps(run, step.program, state.accelerator):
        return CompiledStep(state, step, max_norm, run.batch_size)
    return None


class CapturedStep(WholeStep):
    """One CUDA graph, which the CPU launches by one call."""

    WARM_UP = 3
    """Number of steps before the capture, in which libraries choose algorithms and allocate memory."""

    def __init__(self, state: TrainState, step: Step, max_norm: float | None, count: int):
        super().__init__(state, step, max_norm, count)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: dict[str, torch.Tensor] = {}

    def __call__(self, tensors: dict[str, torch.Tensor]) -> tuple[StepTerms, dict[str, torch.Tensor]] | None:
        if self.graph is None and not self._capture(tensors):
            return None
        for name, value in tensors.items():
            self.inputs[name].copy_(value, non_blocking=True)
        cast(torch.cuda.CUDAGraph, self.graph).replay()
        self.state.count_average()
        # the next step overwrites these before they are read
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
            logger.warning("the step cannot be captured as a CUDA graph, so it runs eagerly: %s", first_line(error))
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
        """Return all tensors that a step changes, those of the optimizer last."""
        state = self.state
        average = state.ema.shadow_params if state.ema else []
        changed = [*state.trained, *average, *state.plain_model.buffers()]
        states = state.optimizer.optimizer.state.values()
        return changed + [value for kept in states for value in kept.values() if isinstance(value, torch.Tensor)]

    @torch.no_grad()
    def _restore(self, before: list[torch.Tensor], slots: set[Any]) -> None:
        """Undo the warm-up steps. State that the optimizer did not have before them becomes 0."""
        optimizer = self.state.optimizer.optimizer
        if not slots:
            for kept in optimizer.state.values():
                for value in kept.values():
                    value.zero_()
        for tensor, value in zip(self._changed(), before, strict=False):
            tensor.copy_(value)


class CompiledStep(WholeStep):
    """One function of `torch.compile` on a CPU, which makes the step of an MLP 1.5 times as fast."""

    def __init__(self, state: TrainState, step: Step, max_norm: float | None, count: int):
        super().__init__(state, step, max_norm, count)
        # tensors, since each value of a number would be another program
        self.learning_rate, self.share = torch.zeros(()), torch.zeros(())
        named = state.plain_model.named_parameters()
        self.names = [name for name, parameter in named if parameter.requires_grad]
        self.values = [parameter.detach() for parameter in state.trained]
        averages = zip(state.ema.shadow_params, state.parameters, strict=True) if state.ema else ()
        self.averages = [average for average, parameter in averages if parameter.requires_grad]
        group = state.optimizer.param_groups[0]
        self.betas, self.eps = group["betas"], group["eps"]
        self.program = torch.compile(self._take, dynamic=False)

    def __call__(self, tensors: dict[str, torch.Tensor]) -> tuple[StepTerms, dict[str, torch.Tensor]] | None:
        state, ema = self.state, self.state.ema
        self.learning_rate.fill_(state.optimizer.param_groups[0]["lr"])
        if ema:
            self.share.fill_(1 - ema.get_decay(ema.optimization_step + 1))
        kept = [self._kept(parameter) for parameter in state.trained]
        slots = [[slot[name] for slot in kept] for name in ("exp_avg", "exp_avg_sq", "step")]
        try:
            with torch.no_grad():
                terms, norm = self.program(tensors, *slots)
        except Exception as error:  # no compiler, no headers: each has an error of its own
            self.works = False
            logger.warning("torch.compile failed, so the run continues with eager steps: %s", first_line(error))
            return None
        state.count_average()
        return StepTerms(**terms), {"gradient": norm}

    def _kept(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """Return AdamW's state of the parameter: number of steps, mean and mean square of the gradient; 0 at first."""
        kept = self.state.optimizer.optimizer.state[parameter]
        if not kept:
            kept["step"] = torch.zeros(())
            kept["exp_avg"], kept["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return kept

    def _take(
        self,
        tensors: dict[str, torch.Tensor],
        means: list[torch.Tensor],
        squares: list[torch.Tensor],
        steps: list[torch.Tensor],
    ) -> tuple[dict[str, Any], torch.Tensor]:
        def losses(values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
            def model(*args: Any, **kwargs: Any) -> Any:
                return functional_call(self.state.model, values, args, kwargs)

            terms = self.step(model, tensors)
            return terms.total_loss, {"loss": terms.loss, "per_image": terms.per_image, "readings": terms.readings}

        by_name, (_, terms) = grad_and_value(losses, has_aux=True)(dict(zip(self.names, self.values, strict=True)))
        gradients = list(by_name.values())
        norm = nn.utils.get_total_norm(gradients, foreach=False)
        if self.max_norm:  # as torch.nn.utils.clip_grads_with_norm_
            factor = (self.max_norm / (norm + 1e-6)).clamp(max=1)
            gradients = [gradient * factor for gradient in gradients]
        adamw(
            self.values,
            gradients,
            means,
            squares,
            max_exp_avg_sqs=[],
            state_steps=steps,
            foreach=False,
            capturable=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=self.learning_rate,
            weight_decay=0.0,
            eps=self.eps,
            maximize=False,
        )
        for average, value in zip(self.averages, self.values, strict=False):  # none of either, or one of each
            average.lerp_(value, self.share)
        return terms, norm
