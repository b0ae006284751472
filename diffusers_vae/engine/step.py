"""What the loop asks of a task, and what a step of it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run leaves behind."""

    output_dir: Path
    """With config.yaml, metrics.jsonl, checkpoints/, pictures/, evaluation.json and what was trained."""
    parameters: int
    """Number of trained values."""
    latent_shape: tuple[int, ...]
    """Channels, height and width of the latents of one image."""
    saved: str
    """Folder below output_dir with what was trained: model or pipeline."""
    load_line: str
    """Python that loads it."""
    memory: int | None = None
    """Peak memory of the GPU or the process in bytes; None if the run was already finished."""
    train_images: int | None = None
    """Number of training images; None if the run was already finished."""
    images_per_second: float | None = None
    """Images per second of the training steps, over all processes; None if fewer than two steps were taken."""


class Discriminator(NamedTuple):
    """A second module, which learns to tell images from reconstructions: small, and whole on every process."""

    module: nn.Module
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class StepTerms:
    """The losses of a micro-batch."""

    loss: torch.Tensor
    """Scalar, the mean over the images: the objective, as it is logged."""
    per_image: dict[str, torch.Tensor]
    """Logged terms, each (B,); they lead to the image when the loss is not finite."""
    statistics: dict[str, torch.Tensor] = field(default_factory=dict)
    """Means over the images, of any shape, that `Step.end` gets as means over the whole step."""
    readings: dict[str, torch.Tensor] = field(default_factory=dict)
    """Scalars logged beside those of `Step.begin`, the same in all micro-batches of a step."""
    network_loss: torch.Tensor | None = None
    """Scalar: the weighted perceptual and adversarial terms, which are differentiated with `loss`; without their
    weights, they are logged in `per_image`."""
    judge: Callable[[], StepTerms] | None = None
    """Returns these terms with `discriminator_loss`; called after the backward of `total_loss`, whose graph it then
    need not keep in memory."""
    discriminator_loss: torch.Tensor | None = None
    """Scalar, the mean over the images, with gradients of the discriminator alone."""

    @property
    def total_loss(self) -> torch.Tensor:
        """Scalar: what is differentiated."""
        return self.loss if self.network_loss is None else self.loss + self.network_loss


@dataclass(frozen=True)
class Program:
    """The properties of a task that decide how its steps can run."""

    values: int
    """Values of the widest feature map of a step: images times height times width times channels."""
    changes: str = ""
    """Settings that make one step a different program than the step before; empty if there are none."""
    compiles: tuple[str, ...] = ()
    """Types of devices on which compiling makes its steps faster."""


class Step(Protocol):
    """What the loop asks of a task."""

    terms: tuple[str, ...]
    """Names of `StepTerms.per_image`."""
    advice: str
    """How to make training more stable."""
    program: Program
    """What decides how the step can run."""

    def begin(self, images_seen: int, total_images: int, learning_rate: float) -> dict[str, float]:
        """Set schedules for the step that begins after `images_seen` images; return what is logged of them."""
        ...

    def random_inputs(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Sample all random inputs of a step of `count` images, (count, ...) each, on the generator's device."""
        ...

    def batch(self, read: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return all tensors that the losses of a micro-batch are computed from, on the device. `read` is what the
        training set gave, `inputs` are its rows of `random_inputs`.
        """
        ...

    def __call__(self, model: Any, batch: dict[str, torch.Tensor]) -> StepTerms:
        """Compute the losses of a micro-batch by one call of the model's `forward`. Where steps are captured as a CUDA
        graph, this is called for the capture alone.
        """
        ...

    def end(self, statistics: dict[str, torch.Tensor], images: int) -> None:
        """Update what depends on earlier steps from the means of `StepTerms.statistics` over the step's `images`, the
        same on all processes. Skipped steps are left out.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Return as JSON what was learned from steps, besides weights."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Restore `state` from a checkpoint."""
        ...
