"""The interface between the training loop and a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Result of a finished run."""

    output_dir: Path
    """Folder with config.yaml, metrics.jsonl, checkpoints/, pictures/, evaluation.json and the trained model."""
    parameters: int
    """Number of trained values."""
    latent_shape: tuple[int, ...]
    """Channels, height and width of the latents of one image."""
    saved: str
    """Subfolder of output_dir with the trained model or pipeline."""
    load_line: str
    """Python code that loads the trained model."""
    memory: int | None = None
    """Peak memory of the GPU or the process in bytes; None if the run was already finished."""
    train_images: int | None = None
    """Number of training images; None if the run was already finished."""
    images_per_second: float | None = None
    """Images per second of the training steps, over all processes; None if fewer than two steps were taken."""


class Discriminator(NamedTuple):
    """Discriminator and its optimizer. It is small, and complete on every process."""

    module: nn.Module
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class StepTerms:
    """The losses of a micro-batch."""

    loss: torch.Tensor
    """Objective, a scalar: the mean over the images, as it is logged."""
    per_image: dict[str, torch.Tensor]
    """Logged terms, each (B,). They identify the image if the loss is not finite."""
    statistics: dict[str, torch.Tensor] = field(default_factory=dict)
    """Means over the images, of any shape. `Step.end` receives their means over the whole step."""
    readings: dict[str, torch.Tensor] = field(default_factory=dict)
    """Scalars logged beside those of `Step.begin`; equal in all micro-batches of a step."""
    network_loss: torch.Tensor | None = None
    """Weighted perceptual and adversarial terms, a scalar that is differentiated with `loss`. `per_image` logs them
    without their weights."""
    judge: Callable[[], StepTerms] | None = None
    """Returns these terms with `discriminator_loss`. It is called after the backward pass of `total_loss`, so that
    memory holds one graph at a time."""
    discriminator_loss: torch.Tensor | None = None
    """Loss of the discriminator, a scalar: the mean over the images."""

    @property
    def total_loss(self) -> torch.Tensor:
        """Sum of the terms that are differentiated, a scalar."""
        return self.loss if self.network_loss is None else self.loss + self.network_loss


@dataclass(frozen=True)
class Program:
    """Properties of a task that decide how its steps can run."""

    values: int
    """Number of values in the widest feature map of a step: images x height x width x channels."""
    changes: str = ""
    """Settings that make one step a different program than the step before; empty if there are none."""
    compiles: tuple[str, ...] = ()
    """Device types on which compiled steps are faster."""


class Step(Protocol):
    """Interface of a task to the training loop."""

    terms: tuple[str, ...]
    """Names of `StepTerms.per_image`."""
    advice: str
    """How to make training more stable."""
    program: Program
    """Properties that decide how the step can run."""

    def begin(self, images_seen: int, total_images: int, learning_rate: float) -> dict[str, float]:
        """Set schedules for the step that begins after `images_seen` images; return the values to log."""
        ...

    def random_inputs(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Sample all random inputs of a step of `count` images, (count, ...) each, on the generator's device."""
        ...

    def batch(self, read: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return all inputs of the losses of a micro-batch, on the device. `read` comes from the training set; `inputs`
        are the rows of `random_inputs` for its images.
        """
        ...

    def __call__(self, model: Any, batch: dict[str, torch.Tensor]) -> StepTerms:
        """Compute the losses of a micro-batch by one call of the model's `forward`. If a step is one program, this is
        called only while the program is made.
        """
        ...

    def end(self, statistics: dict[str, torch.Tensor], images: int) -> None:
        """Update what later steps depend on from the means of `StepTerms.statistics` over the step's `images`, which
        are equal on all processes. It is not called for skipped steps.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Return, as JSON, what later steps depend on besides the weights."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the result of `state` from a checkpoint."""
        ...
