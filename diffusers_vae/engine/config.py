"""Settings of any run: its length, its batches, its optimiser."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from ..data import DataConfig
from ..fields import at_home, setting
from ..settings import Settings, begun_with
from ..untrusted import refuse_odd_name


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam, and a learning rate that is a pure function of the images seen."""

    learning_rate: float = 2e-3
    """The highest that is reached."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the averages of gradient and squared gradient."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """After the warm-up; cosine ends at 0 with the last image."""
    warmup_images: int = 2000
    """Images over which the learning rate rises linearly from 0."""
    max_grad_norm: float | None = 1.0
    """Norm to which larger gradients are scaled down; null: never. An autoencoder's loss is a sum in nats, so nearly
    every step is scaled, and the value hardly matters (docs/objective.md)."""

    def __post_init__(self):
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"optimizer.schedule must be constant or cosine, got {self.schedule}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"optimizer.learning_rate must be positive and finite, got {self.learning_rate}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must lie in [0, 1), got {self.betas}")
        if self.warmup_images < 0:
            raise ValueError(f"optimizer.warmup_images must be at least 0, got {self.warmup_images}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"optimizer.max_grad_norm must be positive or null, got {self.max_grad_norm}")

    def learning_rate_at(self, images_seen: int, total_images: int) -> float:
        """The learning rate of the step that begins after `images_seen` of `total_images` images."""
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


@dataclass(frozen=True)
class RunConfig:
    """How long, how many at a time, and where to."""

    output_dir: str = setting("runs/digits", "free")
    """Folder of this run. A run that it holds is continued, if it has the same settings."""
    epochs: int = 15
    """Passes over the training images."""
    max_images: int | None = None
    """End with the step that reaches this many images, if that is before the last epoch."""
    seed: int = 0
    """Of the weights, the order of images and the noise in the latents."""
    batch_size: int = 32
    """Images per optimiser step over all processes."""
    gradient_accumulation_steps: int = setting(1, "free")
    """Forwards per optimiser step on each process."""
    gradient_checkpointing: bool = setting(False, "free")
    """Compute what the backward needs a second time instead of keeping it: less memory, slower, the same result."""
    mixed_precision: Precision | None = setting(None, "kept")
    """Autocast dtype. null: what `accelerate launch` asks for; where it asks for none, bf16 for a convolutional
    autoencoder, and on a CPU for a perceptron by 256 images or more per forward, on a device that multiplies it in
    hardware (a CPU with AVX512-BF16 or AMX, a GPU such as NVIDIA's from Ampere on), else no, which is float32. The
    launcher's no cannot be told from its saying nothing, so that float32 has to be asked for here. A run that is
    continued keeps its own. A run's first line and config.yaml state which it is. Weights, optimiser and EMA are
    float32 in any case. In YAML, no needs quotes."""
    compile: bool | None = setting(None, "kept")
    """Whether torch.compile makes one program of the autoencoder's forward and the objective for each size of batch,
    seconds to minutes at the first step and less when it is kept from a run before; networks of other losses are left
    out. Not for text-to-image, nor with a discriminator or what changes the objective by step: kl_schedule,
    target_rate, free_bits, equivariance, scale optimal. null: where it works, in runs of 10,000 steps or more, on a
    CUDA GPU, and of a perceptron on a CPU; not if deterministic. A run that is continued keeps its own."""
    ema_decay: float | None = 0.99
    """Highest decay per step of the averaged weights, which are evaluated and saved; null: no averaging. The decay
    rises with the step, so that the mean age of the weights is at most about 5 % of the steps so far."""
    checkpoint_every: int = setting(10_000, "free")
    """Images between two checkpoints, from which the same command continues; there is one at the end, too."""
    keep_checkpoints: int = setting(2, "free")
    """How many are kept, the newest; with one alone, there is nothing to fall back on if a disk damages it."""
    allow_config_change: bool = setting(False, "free")
    """Continue the run in output_dir although settings, or the images, are not those that it was begun with."""
    on_nonfinite: Literal["stop", "skip"] = setting("stop", "free")
    """When loss or gradient are not finite, nothing of the step is kept and the batch is written to output_dir. stop:
    with an error. skip: go on, and count; 20 in a row stop the run."""
    deterministic: bool = False
    """Use only algorithms that repeat bit by bit. On a CPU all do. On a GPU, exact resume in float32 needs it, although
    it has not been tried there yet; steps take longer."""
    log_every: int = 1000
    """Images between two records in metrics.jsonl."""
    tracker: Literal["tensorboard"] | None = setting("tensorboard", "free")
    """Where metrics and pictures are logged besides the files in output_dir; null: nowhere."""

    def __post_init__(self):
        at_home(self, "output_dir")
        if not self.output_dir:
            raise ValueError("run.output_dir must name a folder, got an empty text")
        refuse_odd_name(self.output_dir, "run.output_dir")
        for name in (
            "epochs", "max_images", "batch_size", "gradient_accumulation_steps", "checkpoint_every",
            "keep_checkpoints", "log_every",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"run.{name} must be at least 1, got {value}")
        if self.on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"run.on_nonfinite must be stop or skip, got {self.on_nonfinite}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"run.seed must lie in [0, 2^31), got {self.seed}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"run.ema_decay must lie between 0 and 1 or be null, got {self.ema_decay}")

    def total_images(self, train_images: int) -> int:
        """Number of images that the run trains on, with repetition, given a training set of `train_images` images."""
        return min(self.epochs * train_images, self.max_images or sys.maxsize)


class RunSettings(Settings):
    """The sections that the settings of every run have."""

    data: DataConfig
    optimizer: OptimizerConfig
    run: RunConfig


S = TypeVar("S", bound=RunSettings)


def kept_channels(config: S) -> S:
    """The settings with the data.channels that the run in output_dir was begun with, where they leave that open."""
    if config.data.channels is not None or (begun := begun_with(config.run.output_dir, "data", "channels")) is None:
        return config
    return replace(config, data=replace(config.data, channels=begun))


def few_steps(run: RunConfig, folder: Path) -> RunConfig:
    """The run of two batches in `folder`, with a checkpoint after each."""
    return replace(
        run,
        output_dir=str(folder),
        epochs=2,  # of sets of less than a batch
        max_images=2 * run.batch_size,
        checkpoint_every=1,
        keep_checkpoints=2,
        allow_config_change=False,
    )
