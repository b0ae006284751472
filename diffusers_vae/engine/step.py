"""What the loop asks of a task, and what a step of it gives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from ..data import Read, TrainingSet
from ..settings import Settings
from .checkpoint import Discriminator
from .config import RunConfig
from .folder import Log


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
    """Bytes: the most that a GPU, or the process, has held; None when the run had finished before."""
    train_images: int | None = None
    """How many there are in the set; None likewise."""
    images_per_second: float | None = None
    """Of training steps, all processes together; None when there was only one to take, or none."""


@dataclass(frozen=True)
class StepTerms:
    """What came of a micro-batch."""

    loss: torch.Tensor
    """Scalar, the mean over its images: the objective, as it is logged."""
    per_image: dict[str, torch.Tensor]
    """Each (B,), for people; they lead to the image when the loss is not finite."""
    statistics: dict[str, torch.Tensor] = field(default_factory=dict)
    """Means over its images of what the task has to know of the whole step, of any shape."""
    readings: dict[str, torch.Tensor] = field(default_factory=dict)
    """Scalars to be logged beside those of `Task.begin_step`, the same in all parts of a step."""
    pair: tuple[torch.Tensor, torch.Tensor] | None = None
    """Images and reconstructions for the discriminator; None while it does not train."""
    discriminator_loss: torch.Tensor | None = None
    """Scalar likewise, of the discriminator."""
    network_loss: torch.Tensor | None = None
    """Scalar: the weighted perceptual and adversarial terms, which are differentiated with `loss`; without their
    weights, they are logged in `per_image`."""

    @property
    def total_loss(self) -> torch.Tensor:
        """Scalar: what is differentiated."""
        return self.loss if self.network_loss is None else self.loss + self.network_loss


class Task(Protocol):
    """What a run trains. The loop knows the order of images, processes and checkpoints, and nothing else of it."""

    config: Settings
    """With the sections `run` and `optimizer`."""
    terms: tuple[str, ...]
    """Names of `StepTerms.per_image`."""
    advice: str
    """What makes training more stable."""
    evaluate_every: int | None
    """Images between two evaluations while training."""
    workers: int
    """Processes that read images."""
    builds_at_once: bool
    """Whether `build` needs no `load` before."""
    train_set: TrainingSet
    """After `load`."""
    images: int
    """After `load`: how many images there are to train on; of a dry run, too, whose set may have fewer."""
    planned: RunConfig | None = None
    """Settings of the run that a dry run tries out; None otherwise."""

    def finished(self) -> RunResult:
        """Return the result of the finished run in output_dir; ValueError naming a file that is missing or damaged."""
        ...

    def load(self, accelerator: Accelerator) -> None:
        """Read what is trained on, on all processes together."""
        ...

    def data(self) -> dict[str, dict[str, Any]]:
        """`images`, `fingerprint` and, if it is known, `contents` of each part of it."""
        ...

    def image_errors(self) -> Iterable[str]:
        """Of images that were left out so far."""
        ...

    def gains_by_bfloat16(self, device: torch.device) -> bool:
        """Whether autocast makes steps faster, if `device` multiplies bfloat16 in hardware; before `load`."""
        return False

    def compiles(self) -> bool:
        """Whether torch.compile pays, where `run.compile` leaves it open; after `load`, on the main process."""
        return False

    def build(self) -> nn.Module:
        """A new model; after `load`, unless it `builds_at_once`."""
        ...

    def blank(self, model: nn.Module, device: torch.device) -> torch.Tensor:
        """A scalar that depends on every parameter by one call of the model's `forward`."""
        ...

    def build_discriminator(self, device: torch.device) -> Discriminator | None:
        """A new one, if the task trains one."""
        return None

    def begin_step(self, images_seen: int, total_images: int, learning_rate: float) -> dict[str, float]:
        """Set what depends on how far the run is; returns what of it is to be logged."""
        return {}

    def draws(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """All that is random in a step of `count` images, (count, ...) each, on the generator's device."""
        ...

    def step(self, model: nn.Module, read: Read, draws: dict[str, torch.Tensor]) -> StepTerms:
        """What is differentiated, by one call of the model's `forward`, for what was read and its rows of the draws."""
        ...

    def discriminate(self, terms: StepTerms) -> StepTerms:
        """The terms with those of the discriminator, for their pair."""
        raise NotImplementedError

    def end_step(self, statistics: dict[str, torch.Tensor], images: int) -> None:
        """Learn from a step that was taken: the means of all `statistics` over its `images`, the same everywhere."""
        return None

    def state(self) -> dict[str, Any]:
        """JSON: what was learned from steps, besides weights."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take the state back from a checkpoint."""
        return None

    def summary(self, model: nn.Module) -> str:
        """One line on model and data, before the first step."""
        ...

    def unreached(self, total_images: int) -> list[str]:
        """Return warnings, one sentence each, of settings that take no or only partial effect in a run of
        `total_images` images.
        """
        ...

    def evaluate(self, model: nn.Module, log: Log, progress: dict[str, int]) -> object:
        """Measure and picture the averaged model, on all processes; FloatingPointError if it is not finite."""
        ...

    def finish(self, model: nn.Module, log: Log, progress: dict[str, int]) -> RunResult:
        """Save the averaged model before anything that could fail, then measure; evaluation.json comes last."""
        ...

    def few(self, folder: Path) -> Task:
        """The same on two batches, with as little as possible around, in `folder`."""
        ...
