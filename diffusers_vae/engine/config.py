"""Settings of every run: length, batches and optimizer."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar, get_args

from ..data import DataConfig
from ..fields import at_home, check, setting
from ..settings import Settings, begun_with
from ..untrusted import refuse_odd_name


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam, with a learning rate that is a pure function of the images seen."""

    learning_rate: float = setting(2e-3, above=0)
    """Peak learning rate."""
    betas: tuple[float, float] = setting((0.9, 0.999), at_least=0, below=1)
    """Decay of the running averages of gradient and squared gradient."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate after the warm-up; cosine falls to 0 at the last image."""
    warmup_images: int = setting(2000, at_least=0)
    """Number of images over which the learning rate rises linearly from 0."""
    max_grad_norm: float | None = setting(1.0, above=0)
    """Norm to which larger gradients are clipped; null: no clipping (docs/objective.md)."""

    def __post_init__(self):
        check("optimizer", self)

    def learning_rate_at(self, images_seen: int, total_images: int) -> float:
        """Return the learning rate of the step that begins after `images_seen` of `total_images` images."""
        if images_seen < self.warmup_images:
            return self.learning_rate * (images_seen + 1) / self.warmup_images
        if self.schedule == "constant":
            return self.learning_rate
        progress = (images_seen - self.warmup_images) / max(1, total_images - self.warmup_images)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def unreached(self, total_images: int) -> list[str]:
        """Return warnings, one sentence each, of what these settings do not reach in a run of `total_images` images."""
        if self.warmup_images <= total_images:
            return []
        reached = self.learning_rate_at(total_images - 1, total_images)
        return [
            f"optimizer.warmup_images must not exceed the {total_images:,} images of the run, got "
            f"{self.warmup_images:,}: the learning rate only rises to about {reached:.2g}, not to "
            f"optimizer.learning_rate {self.learning_rate:g}. Shorten the warm-up, or train longer: raise run.epochs "
            "or run.max_images"
        ]


Precision = Literal["no", "fp16", "bf16"]
StepMode = Literal["auto", "eager", "compiled", "graph"]
TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "swanlab"]


@dataclass(frozen=True)
class RunConfig:
    """Length, batches, precision, checkpoints and logs of a run."""

    output_dir: str = setting("runs/digits", "free", "local")
    """Folder of the run; a run that it already holds is continued, if the settings are the same."""
    epochs: int = setting(8, at_least=1)
    """Number of passes over the training images."""
    max_images: int | None = setting(None, at_least=1)
    """Number of images after which to stop, at the end of the step, if the epochs are not over before."""
    seed: int = setting(0, at_least=0, below=2**31)
    """Seed of the weights, the order of images and the noise in the latents."""
    batch_size: int = setting(16, at_least=1)
    """Number of images per optimiser step, over all processes."""
    gradient_accumulation_steps: int = setting(1, "free", at_least=1)
    """Number of forwards per optimiser step on each process; more take less memory."""
    gradient_checkpointing: bool = setting(False, "free")
    """Recompute activations in the backward pass instead of storing them: less memory, slower, the same result."""
    mixed_precision: Precision | None = setting(None, "kept")
    """Autocast dtype; null: as requested from `accelerate launch`, else bf16 where it is fast (docs/runs.md); in YAML,
    write "no" in quotes."""
    step: StepMode = setting("auto", "kept")
    """How a step runs; eager: kernel by kernel; compiled: by torch.compile; graph: as one CUDA graph; auto: by rule
    (docs/runs.md)."""
    ema_decay: float | None = setting(0.99, at_least=0, below=1)
    """Highest decay per step of the averaged weights, which are evaluated and saved; 0 or null: no averaging
    (docs/objective.md)."""
    checkpoint_every: int = setting(10_000, "free", "local", at_least=1)
    """Number of images between checkpoints, from which the same command continues; the end of the run has one, too."""
    keep_checkpoints: int = setting(2, "free", "local", at_least=1)
    """Number of newest checkpoints to keep; with 1, there is no fallback if a disk damages it."""
    allow_config_change: bool = setting(False, "free", "local")
    """Continue the run in output_dir even if its settings or images have changed."""
    on_nonfinite: Literal["stop", "skip"] = setting("stop", "free", "local")
    """What to do when loss or gradient are not finite; stop: raise an error; skip: leave out the step
    (docs/runs.md)."""
    deterministic: bool = False
    """Use only algorithms that are reproducible bit by bit; slower, and of use only on a GPU (docs/runs.md)."""
    log_every: int = setting(1000, "local", at_least=1)
    """Number of images between records in metrics.jsonl."""
    tracker: TrackerName | tuple[TrackerName, ...] | None = setting("tensorboard", "free", "local")
    """Trackers of metrics and pictures: tensorboard, wandb, trackio, mlflow, comet_ml, aim, clearml, swanlab or a list
    of them; null: none."""

    def __post_init__(self):
        at_home(self, "output_dir")
        if not self.output_dir:
            raise ValueError("run.output_dir must name a folder, got an empty text")
        refuse_odd_name(self.output_dir, "run.output_dir")
        check("run", self)
        if unknown := set(self.trackers) - {*get_args(TrackerName)}:
            choices = ", ".join(get_args(TrackerName))
            raise ValueError(f"run.tracker must be among {choices}, a list of them or null, got {min(unknown)}")
        # the parser may return a list of one for a name
        alone = self.trackers[0] if len(self.trackers) == 1 else None
        object.__setattr__(self, "tracker", alone or tuple(self.trackers) or None)

    @property
    def trackers(self) -> list[str]:
        """Names of the trackers, each once."""
        return list(dict.fromkeys([self.tracker] if isinstance(self.tracker, str) else self.tracker or ()))

    def total_images(self, train_images: int) -> int:
        """Number of images that the run trains on, with repetition, given a training set of `train_images` images."""
        return min(self.epochs * train_images, self.max_images or sys.maxsize)


class RunSettings(Settings):
    """Sections that the settings of every run have."""

    data: DataConfig
    optimizer: OptimizerConfig
    run: RunConfig


S = TypeVar("S", bound=RunSettings)


def kept_channels(config: S) -> S:
    """Return the settings with the data.channels that the run in output_dir was begun with, unless they are set."""
    if config.data.channels is not None or (begun := begun_with(config.run.output_dir, "data", "channels")) is None:
        return config
    return replace(config, data=replace(config.data, channels=begun))


def few_steps(run: RunConfig, folder: Path) -> RunConfig:
    """Return the settings of a run of two batches in `folder`, with a checkpoint after each."""
    return replace(
        run,
        output_dir=str(folder),
        epochs=2,  # of sets of less than a batch
        max_images=2 * run.batch_size,
        checkpoint_every=1,
        keep_checkpoints=2,
        allow_config_change=False,
        tracker="tensorboard" if "tensorboard" in run.trackers else None,  # which logs to `folder` alone
    )
