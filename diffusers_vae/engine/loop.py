"""The loop of every run: images in a fixed order, a step, a checkpoint, and on from where it was interrupted."""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, is_torch_version, parse_choice_from_env, set_seed
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..data import MicroBatch, Read, TrainingSet, deal, step_generator
from ..fields import at_home
from ..messages import showable
from ..models import fast_dtype
from ..processes import Interrupted, Signals, gather, ignore_signals, lossy_output, on_main, only_user_of
from ..settings import Settings, begun_with
from ..silence import GROUP_TIMEOUT, PATIENCE, Patience, WorkerWatch, alone, report_progress, watched
from ..storage import make_folder, naming, save_tensors, sync
from ..untrusted import refuse_odd_name
from .checkpoint import Discriminator, read_progress, restore, save_checkpoint, surroundings, whole
from .folder import BadImages, Log, begin, find_run, leaving_out_the_tracker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, and a learning rate that is a pure function of the images seen."""

    learning_rate: float = 2e-3
    """The highest that is reached."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the averages of gradient and squared gradient."""
    weight_decay: float = 0.0
    """Decoupled; with 0, AdamW is Adam."""
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
        if self.weight_decay < 0:
            raise ValueError(f"optimizer.weight_decay must be at least 0, got {self.weight_decay}")
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

    output_dir: str = "runs/digits"
    """Folder of this run. A run that it holds is continued, if it has the same settings."""
    epochs: int = 15
    """Passes over the training images."""
    max_images: int | None = None
    """End with the step that reaches this many images, if that is before the last epoch."""
    seed: int = 0
    """Of the weights, the order of images and the noise in the latents."""
    batch_size: int = 32
    """Images per optimiser step over all processes."""
    gradient_accumulation_steps: int = 1
    """Forwards per optimiser step on each process."""
    gradient_checkpointing: bool = False
    """Compute what the backward needs a second time instead of keeping it: less memory, slower, the same result."""
    mixed_precision: Precision | None = None
    """Autocast dtype. null: what `accelerate launch` asks for; where it asks for none, bf16 for a convolutional
    autoencoder, and on a CPU for a perceptron by 256 images or more per forward, on a device that multiplies it in
    hardware (a CPU with AVX512-BF16 or AMX, a GPU such as NVIDIA's from Ampere on), else no, which is float32. The
    launcher's no cannot be told from its saying nothing, so that float32 has to be asked for here. A run that is
    continued keeps its own. A run's first line and config.yaml state which it is. Weights, optimiser and EMA are
    float32 in any case. In YAML, no needs quotes."""
    compile: bool | None = None
    """Whether torch.compile makes one program of the autoencoder's forward and the objective for each size of batch,
    seconds to minutes at the first step and less when it is kept from a run before; networks of other losses are left
    out. Not for text-to-image, nor with a discriminator or what changes the objective by step: kl_schedule,
    target_rate, free_bits, equivariance, scale optimal. null: where it works, in runs of 10,000 steps or more, on a
    CUDA GPU, and of a perceptron on a CPU; not if deterministic. A run that is continued keeps its own."""
    ema_decay: float | None = 0.99
    """Highest decay per step of the averaged weights, which are evaluated and saved; null: no averaging. The decay
    rises with the step, so that the mean age of the weights is at most about 5 % of the steps so far."""
    checkpoint_every: int = 10_000
    """Images between two checkpoints, from which the same command continues; there is one at the end, too."""
    keep_checkpoints: int = 2
    """How many are kept, the newest; with one alone, there is nothing to fall back on if a disk damages it."""
    allow_config_change: bool = False
    """Continue the run in output_dir although settings, or the images, are not those that it was begun with."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When loss or gradient are not finite, nothing of the step is kept and the batch is written to output_dir. stop:
    with an error. skip: go on, and count; 20 in a row stop the run."""
    deterministic: bool = False
    """Use only algorithms that repeat bit by bit. On a CPU all do. On a GPU, exact resume in float32 needs it, although
    it has not been tried there yet; steps take longer."""
    log_every: int = 1000
    """Images between two records in metrics.jsonl."""
    tracker: Literal["tensorboard"] | None = "tensorboard"
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


def run_task(task: Task, finish: bool = True, patience: Patience = PATIENCE) -> RunResult | None:
    """Train, evaluate and save what `task` says, on the processes that `accelerate launch` started; continue the run
    that `run.output_dir` holds. From now on this process computes with 0 in the place of denormal numbers.

    Returns the result on the main process, None on the others. Without `finish`, training ends by its last checkpoint,
    nothing is evaluated or saved, and all get None. A process that falls silent is waited for with `patience`; then
    all end with an error, as `silence.watched` says.

    Raises:
        Interrupted: after SIGTERM, SIGINT, SIGUSR1 or SIGHUP.
        FileExistsError: when `run.output_dir` holds a run with other settings.
        FloatingPointError: when loss, gradient or result are not finite; before anything of such a step is written.
        OSError: naming what cannot be read or written; TimeoutError, when processes have not started or a worker that
            reads is silent.
        ValueError: when config and launcher do not fit each other, or images cannot be read.
    """
    run = task.config.run
    # Averages of gradients that have become 0 fade into denormal numbers, by which a CPU takes twice as long for a step
    # of the optimiser. Threads inherit this from the one that starts them, so it comes first.
    torch.set_flush_denormal(True)
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with lossy_output(), Signals() as signals, watched(patience):
        accelerator = _accelerator(task)
        task.config = replace(task.config, run=replace(run, mixed_precision=accelerator.mixed_precision))
        with only_user_of(Path(run.output_dir), "training in", "run.output_dir"):
            try:
                return _run(task, accelerator, signals, finish, patience)
            finally:
                with leaving_out_the_tracker(accelerator):
                    for tracker in accelerator.trackers:
                        tracker.finish()


def _accelerator(task: Task) -> Accelerator:
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


def _run(task: Task, accelerator: Accelerator, signals: Signals, finish: bool, patience: Patience) -> RunResult | None:
    config = task.config
    run, output_dir = config.run, Path(config.run.output_dir)
    checkpoint, result = on_main(partial(_find, task))
    if result:
        logger.info("%s holds this run, finished", showable(run.output_dir))
        return result if accelerator.is_main_process else None
    if checkpoint and accelerator.is_main_process:
        logger.info("continuing from %s", showable(checkpoint))
    task.load(accelerator)
    config, train_set = task.config, task.train_set
    if run.compile is None:
        begun = begun_with(run.output_dir, "run", "compile")
        run = replace(run, compile=on_main(lambda: task.compiles() if begun is None else begun))
        config = task.config = replace(config, run=run)
    on_main(lambda: begin(config, checkpoint, task.data(), task.build))

    set_seed(run.seed)
    model = task.build()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        betas=config.optimizer.betas,
        weight_decay=config.optimizer.weight_decay,
        # with a scaler, a fused one hides from Accelerate which steps were left out
        fused=(accelerator.device.type in ("cpu", "cuda") and not accelerator.scaler) or None,
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    plain_model = accelerator.unwrap_model(model)
    parameters = list(plain_model.parameters())  # asking for them takes as long as a small model's step
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    ema = None
    if run.ema_decay:
        # The decay rises as step / (step + 20): the average reaches back over a twentieth of the steps so far, as with
        # the power functions of Karras et al. 2024. A longer one holds weights from a phase of higher learning rates.
        ema = EMAModel(
            parameters,
            decay=run.ema_decay,
            use_ema_warmup=True,
            inv_gamma=20,
            power=1,
            foreach=not accelerator.is_fsdp2,
        )
    total_images = run.total_images(len(train_set))
    if accelerator.num_processes > 1:
        # DistributedDataParallel orders its buckets by its first backward. Without this one, which leaves no trace, the
        # first step of a resumed run would sum the gradients of three or more processes in another order.
        accelerator.backward(task.blank(model, accelerator.device))
        optimizer.zero_grad()
    set_seed(run.seed)  # whatever was drawn since
    discriminator = task.build_discriminator(accelerator.device)
    set_seed(run.seed, device_specific=True)  # for whatever draws without a generator of its own
    step = images_seen = skipped = skipped_in_a_row = 0
    changes: list[str] = []
    interval, epoch_terms, step_terms = (_RunningTerms(accelerator, task.terms) for _ in range(3))
    if checkpoint:
        restore(checkpoint, accelerator, plain_model, optimizer.optimizer, ema, discriminator)
        saved, sums = _progress(checkpoint, accelerator, len(interval.sums))
        progress = {name: saved[name] for name in ("epoch", "step", "images_seen")}
        step, images_seen = progress["step"], progress["images_seen"]
        skipped, skipped_in_a_row, changes = saved["skipped"], saved["skipped_in_a_row"], saved["changes"]
        interval.put(sums["interval"])
        epoch_terms.put(sums["epoch"])
        task.restore(saved.get("task", {}))
    log = Log(accelerator, output_dir, images_seen, checkpoint)
    bad_images = BadImages(output_dir / "bad_images.txt")
    if accelerator.is_main_process:
        bad_images.add(task.image_errors(), warn=False)
        logger.info("%s; %s", task.summary(plain_model), _launch_summary(accelerator, run))
        length = task.planned.total_images(task.images) if task.planned else total_images
        for sentence in [] if checkpoint else task.unreached(length):
            logger.warning("%s", sentence)
    next_log, next_evaluation, next_checkpoint = (
        (images_seen // every + 1) * every
        for every in (run.log_every, task.evaluate_every or sys.maxsize, run.checkpoint_every)
    )
    bar = tqdm(
        total=total_images,
        initial=min(images_seen, total_images),
        unit="img",
        disable=not accelerator.is_local_main_process,
        dynamic_ncols=True,
    )
    warm, timed_images, timed_seconds = False, 0, 0.0  # the first step is left out: it sets much up
    signals.wait = True  # the loop asks after every step
    steps = partial(_steps, train_set, run, accelerator, images_seen, total_images)
    reading = _reading(train_set, steps(), task.workers, run.seed, accelerator.device, patience)
    with logging_redirect_tqdm(), bar, reading as read_next:
        model.train()
        pending: list[_Flags] = []
        for epoch, start, micro_batches in steps():
            began = time.monotonic()
            report_progress(f"step {step + 1}")
            reached = images_seen + micro_batches[0].count
            epoch_end = min((epoch + 1) * len(train_set), total_images)
            learning_rate = config.optimizer.learning_rate_at(images_seen, total_images)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            readings = task.begin_step(images_seen, total_images, learning_rate)
            generator = step_generator(run.seed, epoch, start, accelerator.device)
            draws = task.draws(micro_batches[0].count, generator)
            seen: list[_Seen] = []
            statistics = _Statistics()
            for micro_step, micro_batch in enumerate(micro_batches, 1):
                with alone(f"reading for step {step + 1}"):
                    read = read_next(micro_batch)
                bad_images.judge(read, len(micro_batch.indices))
                share = micro_batch.share * len(read.kept) / len(micro_batch.indices)
                if not read.kept:  # every process must take part in the step
                    read = read.blank()
                rows = _rows(micro_batch, read)
                own_draws = {name: values[rows] for name, values in draws.items()}
                with nullcontext() if micro_step == len(micro_batches) else accelerator.no_sync(model):
                    terms = task.step(model, read, own_draws)
                    # Gradients are averaged over processes, so that this sums to the mean over the step's images.
                    loss = terms.total_loss * share * accelerator.num_processes
                    (accelerator.scaler.scale(loss) if accelerator.scaler else loss).backward()
                if terms.pair:
                    terms = task.discriminate(terms)
                    (terms.discriminator_loss * share).backward()
                statistics.add(terms.statistics, share)
                if share:
                    step_terms.add(_sums(terms, len(read.kept)))
                    indices = [micro_batch.indices[place] for place in read.kept]
                    seen.append(_Seen(micro_batch.count, indices, read, own_draws, terms))
            grad_norm = _clip(accelerator, model, trained, config.optimizer.max_grad_norm)
            norms = {"gradient": grad_norm}
            if discriminator and terms.pair:
                _sum_gradients(accelerator, discriminator.module)
                norms["discriminator's gradient"] = nn.utils.clip_grad_norm_(
                    discriminator.module.parameters(), config.optimizer.max_grad_norm or float("inf")
                )
            asked_here = signals.asked()
            pending.append(_Flags(accelerator, step_terms, norms, asked_here, step + 1, seen))
            # Whether a step is finite is known when the device has done it. Where nothing here depends on that, it is
            # asked a step later, so that the device does not wait for its next step, and before anything is written.
            late = run.on_nonfinite == "stop" and not (statistics.sums or discriminator or accelerator.scaler)
            writes = reached >= min(next_log, next_evaluation, next_checkpoint, epoch_end)
            bad, empty, stop = [], False, accelerator.num_processes == 1 and asked_here
            while pending and not (bad or empty) and (writes or stop or not late or len(pending) > 1):
                checked = pending.pop(0)
                bad, empty, asked = checked.read()
                stop = stop or asked
            if empty:
                raise ValueError(f"training stopped: no image of step {checked.step} can be read. {bad_images.advice}")
            # A gradient in float16 may overflow: the scaler then skips the step and lowers its scale; below 1 it
            # will not recover.
            overflow = bad == ["gradient"] and accelerator.scaler and accelerator.scaler.get_scale() >= 1
            if bad and not overflow:
                message = _not_finite(task, accelerator, checked, skipped, bad)
                if run.on_nonfinite == "stop" or skipped_in_a_row + 1 >= SKIPS_IN_A_ROW:
                    kept = f"The newest checkpoint is {checkpoint}. " if checkpoint else ""
                    raise FloatingPointError(f"training stopped before step {message}. {kept}{task.advice}")
                if accelerator.is_main_process:
                    logger.warning("skipped step %s", message)
                if accelerator.scaler:
                    accelerator.scaler.update()
                skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
            else:
                if not _step(accelerator, optimizer):
                    if ema:
                        ema.step(parameters)
                    if discriminator and terms.pair:
                        discriminator.optimizer.step()
                    task.end_step(statistics.means(accelerator), micro_batches[0].count)
                interval.add(step_terms.sums)
                epoch_terms.add(step_terms.sums)
                skipped_in_a_row = 0
            for parameter in trained:
                parameter.grad = None
            if discriminator:
                discriminator.optimizer.zero_grad()
            step_terms.sums.zero_()

            if warm:
                timed_images += micro_batches[0].count
                timed_seconds += time.monotonic() - began
            warm = True
            step += 1
            images_seen = reached
            bar.update(min(images_seen, total_images) - bar.n)
            interval.show(bar)
            progress = {"epoch": epoch + 1, "step": step, "images_seen": images_seen}
            counts = progress | ({"skipped": skipped} if skipped else {})
            if images_seen >= next_log or images_seen >= total_images:
                norm = grad_norm.item() if grad_norm.isfinite() else None  # of a step that was skipped
                means = interval.take()
                readings |= {name: value.item() for name, value in terms.readings.items()}
                readings |= {"learning_rate": learning_rate, "grad_norm": norm}
                log.write("train", counts | means | readings)
                next_log = (images_seen // run.log_every + 1) * run.log_every
            if images_seen >= epoch_end:
                means = epoch_terms.take()
                log.write("epoch", counts | means)
                if accelerator.is_main_process:
                    text = "  ".join(f"{name} {value:.4f}" for name, value in means.items() if value is not None)
                    logger.info("epoch %d: %s", epoch + 1, text)
            if images_seen >= next_evaluation and images_seen < total_images:
                report_progress(f"the evaluation after step {step}")
                task.evaluate(_model_to_keep(task, accelerator, plain_model, ema), log, progress)
                next_evaluation = (images_seen // task.evaluate_every + 1) * task.evaluate_every
            if images_seen >= next_checkpoint or images_seen >= total_images or stop:
                report_progress(f"saving after step {step}")
                if accelerator.is_main_process:
                    log.restore()
                checkpoint = save_checkpoint(
                    output_dir / "checkpoints",
                    accelerator,
                    plain_model,
                    optimizer.optimizer,
                    ema,
                    discriminator,
                    progress
                    | {"skipped": skipped, "skipped_in_a_row": skipped_in_a_row, "changes": changes}
                    | {"task": task.state()},
                    {"interval": interval.sums.tolist(), "epoch": epoch_terms.sums.tolist()},
                    [output_dir / "config.yaml", output_dir / "data.json", log.path],
                    run.keep_checkpoints,
                )
                log.saved(checkpoint)
                next_checkpoint = (images_seen // run.checkpoint_every + 1) * run.checkpoint_every
            if stop:
                raise Interrupted(
                    f"asked to stop ({signals.reason or 'as another process was'}) after {images_seen:,} of "
                    f"{total_images:,} images; saved as {checkpoint}. The same command continues"
                )

    if not finish:
        return None
    signals.wait = False  # all that follows can be done again from the checkpoint
    report_progress("the end of the run")
    averaged = _model_to_keep(task, accelerator, plain_model, ema)
    if images_seen >= total_images + run.batch_size and accelerator.is_main_process:
        logger.warning("%d images were seen already, more than the %d that are asked for", images_seen, total_images)
    result = task.finish(averaged, log, progress)
    bad_images.add(task.image_errors(), warn=False)
    if not accelerator.is_main_process:
        return None
    if skipped:
        logger.warning("%d steps were skipped, since loss or gradient were not finite", skipped)
    if bad_images.listed:
        path = showable(bad_images.path)
        logger.warning("%d files could not be read and were left out: %s", len(bad_images.listed), path)
    return replace(
        result,
        memory=_peak_memory(accelerator.device),
        train_images=task.images,
        images_per_second=timed_images / timed_seconds if timed_images else None,
    )


def kept_channels(config: Settings) -> Settings:
    """The settings with the data.channels that the run in output_dir was begun with, where they leave that open."""
    if config.data.channels is not None or (begun := begun_with(config.run.output_dir, "data", "channels")) is None:
        return config
    return replace(config, data=replace(config.data, channels=begun))


def _find(task: Task) -> tuple[Path | None, RunResult | None]:
    return find_run(task.config, task.finished, task.build if task.builds_at_once else None)


def dry_run(task: Task) -> tuple[RunResult, bool, float | None] | None:
    """Every phase of the run of `task` once, on two batches, in a folder that is deleted again: training, a checkpoint,
    evaluation, pictures, saving, and the second batch again from the checkpoint.

    Returns, on the main process, the result, whether the resumed run gave the same weights bit by bit, and the
    seconds that all of the training would take, without evaluation.
    """
    PartialState(cpu=not torch.accelerator.is_available())
    run = task.config.run
    _find(task)  # which refuses what the run would refuse
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(on_main(lambda: scratch)) / "run"
        try:
            trial = task.few(folder)
            trial.planned = run
            result = run_task(trial)  # what two batches need is read on demand
            newest = max((folder / "checkpoints").glob("images-*"))
            if result:
                before = _tensors_in(newest)
                (folder / "evaluation.json").unlink()
                shutil.rmtree(newest)
            on_main(lambda: None)  # barrier: nobody resumes before the checkpoint is deleted
            run_task(task.few(folder), finish=False)
        except Interrupted as interruption:
            raise Interrupted("the dry run was asked to stop; nothing was kept") from interruption
        if not result:
            return None
        after = _tensors_in(newest)
        same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        total = run.total_images(result.train_images)
        return result, same, total / result.images_per_second if result.images_per_second else None


def _tensors_in(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    return {
        (path.name, name): tensor
        for path in checkpoint.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


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


def _progress(checkpoint: Path, accelerator: Accelerator, count: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """How far the run was, and this process's `count` sums; the main process takes those of processes that are gone."""
    progress, own = read_progress(checkpoint, accelerator.process_index)
    before, now = progress["surroundings"], surroundings(accelerator)
    differing = [name for name in now if before.get(name) != now[name]]
    progress["changes"] += [f"{name} {before.get(name)} -> {now[name]}" for name in differing]
    if progress["changes"] and accelerator.is_main_process:
        logger.warning(
            "the order of images is the same, and their noise on the same kind of device, but sums are rounded "
            "differently, so that this run is no longer bit-identical to one without interruption: %s",
            ", ".join(progress["changes"]),
        )
    parts = [own]
    if accelerator.is_main_process:
        gone = range(accelerator.num_processes, before["processes"])
        parts += [read_progress(checkpoint, process)[1] for process in gone]
    sums = {}
    for name in ("interval", "epoch"):  # of other terms, when settings were changed, the mean begins anew
        known = [part[name] for part in parts if len(part.get(name, ())) == count]
        sums[name] = np.sum(known, axis=0).tolist() if known else [0.0] * count
    return progress, sums


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


def _launch_summary(accelerator: Accelerator, run: RunConfig) -> str:
    device_batch_size = run.batch_size // (accelerator.num_processes * run.gradient_accumulation_steps)
    precision = {"no": "float32"}.get(accelerator.mixed_precision, f"{accelerator.mixed_precision} autocast")
    return f"{precision} on {accelerator.num_processes} x {accelerator.device}, {device_batch_size} images per forward"


def _model_to_keep(task: Task, accelerator: Accelerator, model: nn.Module, ema: EMAModel | None) -> nn.Module:
    """A whole copy of the model on every process, in eval mode, with the averaged weights if there are any."""
    with torch.device("meta"):
        kept = task.build()
    state = model.state_dict()
    if ema:
        state |= {name: p for (name, _), p in zip(model.named_parameters(), ema.shadow_params, strict=True)}
    kept.to_empty(device=accelerator.device)
    kept.load_state_dict({name: whole(tensor) for name, tensor in state.items()})
    for name, buffer in model.named_buffers():  # those that are not saved, too
        kept.get_buffer(name).copy_(buffer)
    return kept.eval().requires_grad_(False)


def _steps(
    train_set: TrainingSet, run: RunConfig, accelerator: Accelerator, images_seen: int, total_images: int
) -> Iterator[tuple[int, int, list[MicroBatch]]]:
    """Of each step from `images_seen` to `total_images` its epoch, from 0, the images of it before, and this process's
    micro-batches.
    """
    while images_seen < total_images:
        epoch, start = divmod(images_seen, len(train_set))
        batches = train_set.batches(run.batch_size, run.seed, epoch, start)
        place = accelerator.process_index, accelerator.num_processes, run.gradient_accumulation_steps
        for micro_batches in deal(batches, run.seed, epoch, *place):
            if images_seen >= total_images:
                return
            yield epoch, images_seen - epoch * len(train_set), micro_batches
            images_seen += micro_batches[0].count


@contextmanager
def _reading(
    train_set: TrainingSet,
    steps: Iterable[tuple[int, int, list[MicroBatch]]],
    workers: int,
    seed: int,
    device: torch.device,
    patience: Patience,
) -> Iterator[Callable[[MicroBatch], Read]]:
    """A function that reads one micro-batch of the steps after the other; workers read ahead of when it is called."""
    if not workers:
        yield train_set.read
        return
    loader = DataLoader(
        _ByMicroBatch(train_set),
        batch_sampler=(micro_batch for _, _, micro_batches in steps for micro_batch in micro_batches),
        num_workers=workers,
        collate_fn=_as_read,
        worker_init_fn=ignore_signals,
        generator=torch.Generator().manual_seed(seed),  # otherwise every loader takes a number from the global one
        pin_memory=device.type == "cuda",
    )
    reads = iter(loader)
    watch = WorkerWatch(reads._workers, partial(_names, train_set), patience)  # as torch 2.14 calls them
    turns = cycle(range(workers))  # of the workers, in which they are given batches
    try:
        yield lambda micro_batch: watch.wait(next(turns), micro_batch, partial(next, reads))
    finally:  # at its end, Python would send them a signal that they ignore, and wait
        reads._shutdown_workers()
        watch.close()


def _names(train_set: TrainingSet, micro_batch: MicroBatch) -> str:
    first, last = (train_set.name(micro_batch.indices[place]) for place in (0, -1))
    return f"{len(micro_batch.indices)} images, {first} to {last},"


@dataclass(frozen=True)
class _ByMicroBatch:
    """A training set as torch's `DataLoader` reads one, which hands on what the sampler gives."""

    train_set: TrainingSet

    def __len__(self) -> int:
        return len(self.train_set)

    def __getitems__(self, batch: MicroBatch) -> Read:
        return self.train_set.read(batch)


def _rows(micro_batch: MicroBatch, read: Read) -> slice | list[int]:
    """Where in the step's batch the images lie that could be read."""
    if len(read.kept) == len(micro_batch.indices):
        return slice(micro_batch.first, micro_batch.first + len(read.kept))
    return [micro_batch.first + place for place in read.kept]


def _clip(
    accelerator: Accelerator, model: nn.Module, parameters: list[nn.Parameter], max_norm: float | None
) -> torch.Tensor:
    """The norm of the gradient, which is scaled down to `max_norm` if there is one."""
    if accelerator.is_fsdp2:
        return accelerator.clip_grad_norm_(model.parameters(), max_norm or float("inf"))
    accelerator.unscale_gradients()
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _step(accelerator: Accelerator, optimizer: AcceleratedOptimizer) -> bool:
    """Take the step; returns whether the scaler of float16 left it out."""
    if accelerator.scaler:
        optimizer.step()
        return optimizer.step_was_skipped
    optimizer.optimizer.step()  # Accelerate's own looks for packages that could be installed, at every step
    return False


def _as_read(read: Read) -> Read:
    return read  # already a batch; by name, since a lambda does not reach the workers everywhere


@dataclass(frozen=True)
class _Seen:
    """A micro-batch of a step of `count` images and what came of it, for the dump of a step that is not finite."""

    count: int
    indices: list[int]
    read: Read
    draws: dict[str, torch.Tensor]
    terms: StepTerms


def _sums(terms: StepTerms, count: int) -> torch.Tensor:
    """Loss and other terms, each summed over the images, and their number."""
    loss = terms.loss.detach() * count
    per_image = [values.detach().sum() for values in terms.per_image.values()]
    return torch.stack([loss, *per_image, torch.full_like(loss, count)])


class _RunningTerms:
    """`_sums` of this process since the last `take`."""

    def __init__(self, accelerator: Accelerator, terms: tuple[str, ...]):
        self.accelerator, self.names = accelerator, ("loss", *terms)
        exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
        self.sums = torch.zeros(len(self.names) + 1, dtype=exact, device=accelerator.device)
        self.shown = time.monotonic()

    def add(self, sums: torch.Tensor) -> None:
        self.sums += sums

    def put(self, sums: list[float]) -> None:
        self.sums.copy_(torch.tensor(sums, dtype=torch.float64))

    def take(self) -> dict[str, float | None]:
        """The means over all processes."""
        sums = self.accelerator.reduce(self.sums, "sum").cpu().double().numpy()
        self.sums.zero_()
        return self._means(sums)

    def show(self, bar: tqdm) -> None:
        """Put this process's means beside the progress bar, once a second: reading them waits for the device."""
        if not bar.disable and time.monotonic() - self.shown > 1 and self.sums[-1] > 0:
            self.shown = time.monotonic()
            bar.set_postfix({name: f"{value:.4g}" for name, value in self._means(self.sums.tolist()).items()})

    def _means(self, sums: Sequence[float] | np.ndarray) -> dict[str, float | None]:
        """None when every step was skipped."""
        return {
            name: float(total / sums[-1]) if sums[-1] else None
            for name, total in zip(self.names, sums[:-1], strict=True)
        }


class _Statistics:
    """Of the micro-batches of a step, summed by their share of it."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.share = 0.0

    def add(self, statistics: dict[str, torch.Tensor], share: float) -> None:
        for name, value in statistics.items():
            exact = torch.float32 if value.device.type == "mps" else torch.float64
            self.sums[name] = self.sums.get(name, 0) + value.detach().to(exact) * share
        self.share += share

    def means(self, accelerator: Accelerator) -> dict[str, torch.Tensor]:
        """Over the images of the step, on all processes."""
        if not self.sums:
            return {}
        first = next(iter(self.sums.values()))
        flat = torch.cat([*(value.flatten() for value in self.sums.values()), first.new_tensor([self.share])])
        *values, share = accelerator.reduce(flat, "sum").split([*(v.numel() for v in self.sums.values()), 1])
        return {
            name: (value / share).view(self.sums[name].shape) for name, value in zip(self.sums, values, strict=True)
        }


def _sum_gradients(accelerator: Accelerator, module: nn.Module) -> None:
    """Each process has the gradient of its images' share of the loss: their sum takes its place."""
    if accelerator.num_processes > 1:
        gradients = [p.grad for p in module.parameters()]
        flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))


class _Flags:
    """Which terms of a step are not finite on any process, whether none has an image, and whether any was asked to
    stop; on its way from the device, which goes on meanwhile.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        step_terms: _RunningTerms,
        norms: dict[str, torch.Tensor],
        asked: bool,
        step: int,
        seen: list[_Seen],
    ):
        self.names, self.asked, self.step, self.seen = (*step_terms.names, *norms), asked, step, seen
        sums = step_terms.sums
        flags = ~torch.cat([sums[:-1], *(whole(norm).to(sums).view(1) for norm in norms.values())]).isfinite()
        flags = torch.cat([flags, sums[-1:] > 0])
        if accelerator.num_processes > 1:
            both = torch.cat([flags, torch.full([1], asked, device=flags.device)])
            flags = accelerator.reduce(both.int(), "sum")
        self.done = None
        if flags.is_cuda:
            flags, self.done = flags.to("cpu", non_blocking=True), torch.cuda.Event()
            self.done.record()
        self.flags = flags

    def read(self) -> tuple[list[str], bool, bool]:
        """The names of the terms, whether there is no image, and whether to stop; waits until the device has come so
        far.
        """
        if self.done:
            self.done.synchronize()
        flags = [*self.flags.tolist(), self.asked]
        bad = [name for name, flag in zip(self.names, flags, strict=False) if flag]
        images, asked = flags[len(self.names) : len(self.names) + 2]
        return bad, not images, bool(asked)


SKIPS_IN_A_ROW = 20


MAX_DUMPS = 10


def _not_finite(task: Task, accelerator: Accelerator, checked: _Flags, skipped: int, bad: list[str]) -> str:
    """What is wrong with the step, in words, after its batch was written to output_dir."""
    step, seen = checked.step, checked.seen
    culprits = [
        task.train_set.name(index)
        for part in seen
        for index, total in zip(part.indices, sum(part.terms.per_image.values()), strict=True)
        if not total.isfinite()
    ]
    folder = Path(task.config.run.output_dir) / "nonfinite"
    path = folder / f"step-{step:09d}-process-{accelerator.process_index}.safetensors"
    where = f"not written, as {MAX_DUMPS} were"
    if seen and skipped < MAX_DUMPS:
        parts = [
            {"indices": torch.tensor(part.indices)} | part.read.tensors() | part.draws | part.terms.per_image
            for part in seen
        ]
        tensors = {name: torch.cat([part[name].detach().cpu() for part in parts]) for name in parts[0]}
        try:
            with naming(path):
                make_folder(folder)
                save_tensors(path, tensors)
                sync(path)
            where = f"in {path}"
        except OSError as error:  # what went wrong first must be told all the same
            where = f"not written: {error}"
    found = gather((culprits, where))
    culprits = [name for names, _ in found for name in names]
    paths = [where for names, where in found if names] or [where for _, where in found]
    shown = ", ".join(culprits[:3]) + " ..." * (len(culprits) > 3)
    which = f", in {len(culprits)} of {seen[0].count} images: {shown}" if culprits and seen else ""
    return f"{step}, not finite: {', '.join(bad)}{which}. Its images are {', '.join(paths)}"


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that was held on the GPU, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
