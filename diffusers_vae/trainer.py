"""One run, from settings to a trained, measured and pictured model."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .data import DataConfig, FolderImages, ImageSet, MicroBatch, epoch_batches, load_data
from .evaluation import EvaluationConfig, EvaluationReport, evaluate
from .images import to_model_range
from .latents import measure_latents
from .models import MLPVAE, VAE, ModelConfig
from .objective import ObjectiveConfig, ObjectiveTerms
from .pictures import draw_all

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
    """The gradient is scaled down to this norm; null: never."""

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


@dataclass(frozen=True)
class RunConfig:
    """How long, how many at a time, and where to."""

    output_dir: str = "runs/digits"
    """Folder of this run; it must not hold another one."""
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
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Autocast dtype; null leaves it to `accelerate launch`, and config.yaml states what it was. Weights, optimiser
    and EMA are float32 in any case. In YAML, no needs quotes."""
    ema_decay: float | None = 0.99
    """Decay of the moving average of the weights, which is what is evaluated and saved; null: none."""
    log_every: int = 1000
    """Images between two records in metrics.jsonl."""
    tracker: Literal["tensorboard"] | None = "tensorboard"
    """Where metrics and pictures are logged besides the files in output_dir; null: nowhere."""

    def __post_init__(self):
        for name in ("epochs", "max_images", "batch_size", "gradient_accumulation_steps", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"run.{name} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"run.seed must lie in [0, 2^31), got {self.seed}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"run.ema_decay must lie between 0 and 1 or be null, got {self.ema_decay}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a run. Model and objective have no default here, since filled-in settings of one architecture or
    likelihood do not fit another.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self):
        height, width = self.data.size
        ratio = self.model.spatial_compression_ratio
        if height % ratio or width % ratio:
            raise ValueError(
                f"data.resolution must be divisible by {ratio}, by which model.block_out_channels makes the latents "
                f"smaller, got {height}x{width}"
            )
        if self.objective.likelihood == "bernoulli" and self.model.architecture != "mlp":
            raise ValueError(
                "objective.likelihood bernoulli needs a decoder that gives probabilities, which the mlp architecture "
                f"does and {self.model.architecture}, whose output is unbounded, does not; use gaussian or laplace"
            )

    def save(self, path: Path) -> None:
        """Write all settings as YAML, which gives the same run again."""
        path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(self))), sort_keys=False))


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind."""

    output_dir: Path
    """With config.yaml, metrics.jsonl, model/, evaluation.json and pictures/."""
    report: EvaluationReport
    """Of the model in model/, on the held-out images."""
    parameters: int
    """Number of trained values."""
    latent_shape: tuple[int, ...]
    """Channels, height and width of the latents of one image."""
    memory: int
    """Bytes: the most that a GPU held during the run, or what the process holds at its end."""
    load_line: str
    """Python that loads the model."""


def train(config: TrainConfig) -> RunResult | None:
    """Train, evaluate and save as `config` says, on the processes that `accelerate launch` started.

    Returns the result on the main process, None on the others.

    Raises:
        FileExistsError: when `run.output_dir` holds a run already.
        FloatingPointError: when loss, gradient or result are not finite; before the step is taken if that shows there.
        ValueError: when config and launcher do not fit each other.
    """
    run = config.run
    _check_is_free(run.output_dir)
    accelerator = Accelerator(
        mixed_precision=run.mixed_precision,
        log_with=run.tracker,
        project_dir=run.output_dir,
        # the main process measures and draws while the others wait
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )
    _check_launch(accelerator, run)
    _use_all_cores(accelerator)
    with accelerator.local_main_process_first():
        train_images, heldout_images = load_data(config.data, progress=accelerator.is_local_main_process)
    if accelerator.is_main_process:
        (Path(run.output_dir) / "pictures").mkdir(parents=True, exist_ok=True)
        stated = replace(config, run=replace(run, mixed_precision=accelerator.mixed_precision))
        stated.save(Path(run.output_dir) / "config.yaml")
    accelerator.wait_for_everyone()

    set_seed(run.seed)
    model = config.model.build(config.data.channels, config.data.size)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=config.optimizer.betas, weight_decay=config.optimizer.weight_decay
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    plain_model = accelerator.unwrap_model(model)
    ema = None
    if run.ema_decay:  # the decay rises as 1 - (1 + step)^-0.75, so that short runs do not keep their first weights
        ema = EMAModel(plain_model.parameters(), decay=run.ema_decay, use_ema_warmup=True, power=0.75)
    objective = config.objective.build()
    total_images = min(run.epochs * len(train_images), run.max_images or sys.maxsize)
    if run.tracker:
        accelerator.init_trackers("tensorboard")
    log = _Log(accelerator, Path(run.output_dir))
    set_seed(run.seed, device_specific=True)  # every process draws its own noise in the latents

    if accelerator.is_main_process:
        logger.info("%s", _summary(config, accelerator, plain_model, len(train_images), len(heldout_images)))
    bar = tqdm(total=total_images, unit="img", disable=not accelerator.is_local_main_process, dynamic_ncols=True)
    step = images_seen = 0
    next_log, next_evaluation = run.log_every, config.evaluation.every or sys.maxsize
    interval, epoch_terms = _RunningTerms(accelerator), _RunningTerms(accelerator)
    with logging_redirect_tqdm(), bar:
        for epoch in range(math.ceil(total_images / len(train_images))):
            model.train()
            batches = partial(
                epoch_batches,
                len(train_images),
                run.batch_size,
                run.seed,
                epoch,
                accelerator.process_index,
                accelerator.num_processes,
                run.gradient_accumulation_steps,
            )
            loader = iter(_loader(train_images, batches(), config.data))
            epoch_end = min((epoch + 1) * len(train_images), total_images)
            for micro_batches in batches():
                learning_rate = config.optimizer.learning_rate_at(images_seen, total_images)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                for micro_step, micro_batch in enumerate(micro_batches, 1):
                    images = to_model_range(next(loader).to(accelerator.device))
                    with nullcontext() if micro_step == len(micro_batches) else accelerator.no_sync(model):
                        reconstructions, posterior = model(
                            images, sample_posterior=True, return_dict=False, return_posterior=True
                        )
                        terms = objective(images, reconstructions, posterior)
                        # Gradients are averaged over processes, so that this sums to the mean over the step's images.
                        accelerator.backward(terms.loss * micro_batch.share * accelerator.num_processes)
                    if micro_batch.share:
                        sums = _sums(terms)
                        interval.add(sums)
                        epoch_terms.add(sums)
                grad_norm = accelerator.clip_grad_norm_(
                    model.parameters(), config.optimizer.max_grad_norm or float("inf")
                )
                # The gradient is the same on all processes. In float16 it may overflow: the scaler then skips the step
                # and lowers its scale; below 1 it will not recover.
                if not (grad_norm + interval.sums.sum()).isfinite() and (
                    accelerator.scaler is None
                    or not interval.sums.isfinite().all()
                    or accelerator.scaler.get_scale() < 1
                ):
                    raise FloatingPointError(_not_finite(step, interval.sums, run.output_dir))
                optimizer.step()
                optimizer.zero_grad()
                if ema and not optimizer.step_was_skipped:
                    ema.step(plain_model.parameters())

                step += 1
                images_seen = min(images_seen + run.batch_size, (epoch + 1) * len(train_images))
                bar.update(min(images_seen, total_images) - bar.n)
                interval.show(bar)
                done = images_seen >= epoch_end
                progress = {"epoch": epoch + 1, "step": step, "images_seen": images_seen}
                if images_seen >= next_log or images_seen >= total_images:
                    norm = grad_norm.item() if grad_norm.isfinite() else None  # of a step that was skipped
                    means = _means(interval.take())
                    log.write("train", progress | means | {"learning_rate": learning_rate, "grad_norm": norm})
                    next_log = (images_seen // run.log_every + 1) * run.log_every
                if images_seen >= next_evaluation and images_seen < total_images:
                    if accelerator.is_main_process:
                        with _weights_to_keep(plain_model, ema):
                            _evaluate(config, plain_model, heldout_images, log, progress)
                    accelerator.wait_for_everyone()
                    model.train()
                    next_evaluation = (images_seen // config.evaluation.every + 1) * config.evaluation.every
                if done:
                    break
            means = _means(epoch_terms.take())
            log.write("epoch", progress | means)
            if accelerator.is_main_process:
                text = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
                logger.info("epoch %d: %s", epoch + 1, text)

    result = None
    if accelerator.is_main_process:
        with _weights_to_keep(plain_model, ema):
            result = _finish(config, accelerator, plain_model, train_images, heldout_images, log, progress)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def dry_run(config: TrainConfig) -> RunResult | None:
    """Every phase of the run `config` once, with all images read, two steps, and a folder that is deleted again."""
    _check_is_free(config.run.output_dir)
    with tempfile.TemporaryDirectory() as scratch:
        few = 2 * config.run.batch_size
        return train(
            replace(
                config,
                run=replace(config.run, output_dir=str(Path(scratch) / "run"), max_images=few),
                evaluation=replace(config.evaluation, max_images=config.evaluation.batch_size, every=few // 2),
            )
        )


def _use_all_cores(accelerator: Accelerator) -> None:
    """`accelerate launch` confines every process on a CPU to one thread unless told otherwise."""
    if accelerator.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // accelerator.num_processes))


def _check_is_free(output_dir: str) -> None:
    if (Path(output_dir) / "config.yaml").exists():
        state = "a finished" if (Path(output_dir) / "model").exists() else "an unfinished"
        raise FileExistsError(
            f"run.output_dir holds {state} run already: {Path(output_dir).resolve()}. Choose another run.output_dir or "
            "delete it"
        )


def _check_launch(accelerator: Accelerator, run: RunConfig) -> None:
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


def _summary(
    config: TrainConfig, accelerator: Accelerator, model: VAE | MLPVAE, train_length: int, heldout_length: int
) -> str:
    device_batch_size = config.run.batch_size // (accelerator.num_processes * config.run.gradient_accumulation_steps)
    precision = {"no": "float32"}.get(accelerator.mixed_precision, f"{accelerator.mixed_precision} autocast")
    return (
        f"{type(model).__name__} with {model.num_parameters():,} parameters, latents "
        f"{'x'.join(map(str, config.model.latent_shape(config.data.size)))}; {train_length:,} training and "
        f"{heldout_length:,} held-out images of {config.data.name} at {'x'.join(map(str, config.data.size))}; "
        f"{precision} on {accelerator.num_processes} x {accelerator.device}, {device_batch_size} images per forward"
    )


@contextmanager
def _weights_to_keep(model: VAE | MLPVAE, ema: EMAModel | None) -> Iterator[None]:
    """Within, the model is in eval mode with the averaged weights, if there are any."""
    model.eval()
    if ema:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
    try:
        yield
    finally:
        if ema:
            ema.restore(model.parameters())


def _loader(image_set: ImageSet, batches: Iterable[list[MicroBatch]], config: DataConfig) -> DataLoader:
    """uint8 images of one micro-batch after the other."""
    return DataLoader(
        image_set,
        batch_sampler=(micro_batch.indices for micro_batches in batches for micro_batch in micro_batches),
        num_workers=config.num_workers if isinstance(image_set, FolderImages) else 0,
        collate_fn=_as_read,
    )


def _as_read(pixels: torch.Tensor) -> torch.Tensor:
    return pixels  # already a batch; by name, since a lambda does not reach the workers everywhere


def _sums(terms: ObjectiveTerms) -> torch.Tensor:
    """Loss, distortion, rate, each summed over the images, and their number."""
    count = len(terms.rate)
    loss = terms.loss.detach() * count
    return torch.stack([loss, terms.distortion.detach().sum(), terms.rate.detach().sum(), torch.full_like(loss, count)])


class _RunningTerms:
    """`_sums` since the last `take`."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
        self.sums = torch.zeros(4, dtype=exact, device=accelerator.device)
        self.shown = time.monotonic()

    def add(self, sums: torch.Tensor) -> None:
        self.sums += sums

    def take(self) -> np.ndarray:
        """The sums over all processes."""
        sums = self.accelerator.reduce(self.sums, "sum").cpu().double().numpy()
        self.sums.zero_()
        return sums

    def show(self, bar: tqdm) -> None:
        """Put this process's means beside the progress bar, once a second: reading them waits for the device."""
        if not bar.disable and time.monotonic() - self.shown > 1 and self.sums[3] > 0:
            self.shown = time.monotonic()
            bar.set_postfix({name: f"{value:.4g}" for name, value in _means(self.sums.tolist()).items()})


def _means(sums: Sequence[float] | np.ndarray) -> dict[str, float]:
    return {name: float(total / sums[3]) for name, total in zip(("loss", "distortion", "rate"), sums, strict=False)}


class _Log:
    """metrics.jsonl and the tracker. Records hold nothing that a second run of the same config would not repeat."""

    def __init__(self, accelerator: Accelerator, output_dir: Path):
        self.accelerator, self.path = accelerator, output_dir / "metrics.jsonl"

    def write(self, kind: str, values: dict[str, float | None]) -> None:
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"kind": kind} | values, allow_nan=False) + "\n")
        named = {
            f"{kind}/{name}": value for name, value in values.items() if name != "images_seen" and value is not None
        }
        self.accelerator.log(named, step=values["images_seen"])

    def show(self, pictures: dict[str, Image.Image], images_seen: int) -> None:
        for tracker in self.accelerator.trackers:
            arrays = {name: np.asarray(picture)[None] for name, picture in pictures.items()}
            tracker.log_images(arrays, step=images_seen, dataformats="NHWC")


def _not_finite(step: int, sums: torch.Tensor, output_dir: str) -> str:
    names = ("loss", "distortion", "rate")
    bad = [name for name, value in zip(names, sums, strict=False) if not value.isfinite()]
    bad = bad or ["gradient, or a term on another process"]
    return (
        f"training stopped before step {step + 1}, not finite: {', '.join(bad)}. Metrics up to here are in "
        f"{output_dir}. {STABLER}"
    )


STABLER = (
    "More stable are a lower optimizer.learning_rate, a longer optimizer.warmup_images, a lower "
    "optimizer.max_grad_norm or a larger objective.scale"
)


def _evaluate(
    config: TrainConfig, model: VAE | MLPVAE, image_set: ImageSet, log: _Log, progress: dict[str, int]
) -> EvaluationReport:
    """Measure and picture `model`; writes evaluation.json and pictures/."""
    output_dir = Path(config.run.output_dir)
    settings = config.evaluation
    report = evaluate(model, image_set, config.objective.build(), settings)
    numbers = {name: value for name, value in asdict(report).items() if isinstance(value, float)}
    if bad := [name for name, value in numbers.items() if not math.isfinite(value)]:
        raise FloatingPointError(f"training diverged, not finite on held-out images: {', '.join(bad)}. {STABLER}")
    report.save(output_dir / "evaluation.json")
    log.write("evaluation", progress | numbers)
    shown = min(5000, settings.max_images or 5000)
    pictures = draw_all(model, image_set, log.path, settings.batch_size, shown, settings.seed)
    for name, picture in pictures.items():
        picture.save(output_dir / "pictures" / f"{name}.png")
    log.show(pictures, progress["images_seen"])
    return report


def _finish(
    config: TrainConfig,
    accelerator: Accelerator,
    model: VAE | MLPVAE,
    train_images: ImageSet,
    heldout_images: ImageSet,
    log: _Log,
    progress: dict[str, int],
) -> RunResult:
    """Save the model before anything that could fail, then measure: latents, which go into its config, and images."""
    folder = Path(config.run.output_dir) / "model"
    model.save_pretrained(folder)
    statistics = measure_latents(model, train_images, config.evaluation.batch_size, config.evaluation.max_images)
    if not (math.isfinite(statistics.mean) and 0 < statistics.std < math.inf):
        raise FloatingPointError(
            f"training diverged: the latents have mean {statistics.mean} and std {statistics.std}. {STABLER}"
        )
    model.register_to_config(scaling_factor=statistics.scaling_factor, shift_factor=statistics.mean)
    model.save_config(folder)
    report = _evaluate(config, model, heldout_images, log, progress)
    package, name = ("diffusers", "AutoencoderKL") if isinstance(model, VAE) else ("diffusers_vae", "MLPVAE")
    cuda = accelerator.device.type == "cuda"
    return RunResult(
        output_dir=folder.parent,
        report=report,
        parameters=model.num_parameters(),
        latent_shape=config.model.latent_shape(config.data.size),
        memory=torch.cuda.max_memory_allocated() if cuda else psutil.Process().memory_info().rss,
        load_line=f'from {package} import {name}; vae = {name}.from_pretrained("{folder.as_posix()}")',
    )
