"""One run, from settings to a trained, measured and pictured model."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
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

    learning_rate: float = 1e-3
    """The highest that is reached."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the averages of gradient and squared gradient."""
    weight_decay: float = 0.0
    """Decoupled; with 0, AdamW is Adam."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """After the warm-up; cosine ends at 0 with the last image."""
    warmup_images: int = 0
    """Images over which the learning rate rises linearly from 0."""
    max_grad_norm: float | None = 1.0
    """The gradient is scaled down to this norm; null: never."""

    def __post_init__(self):
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
    epochs: int = 10
    """Passes over the training images."""
    max_images: int | None = None
    """End with the step that reaches this many images, if that is before the last epoch."""
    seed: int = 0
    """Of the weights, the order of images and the noise in the latents."""
    batch_size: int = 64
    """Images per optimiser step over all processes."""
    gradient_accumulation_steps: int = 1
    """Forwards per optimiser step on each process."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Autocast dtype; null leaves it to `accelerate launch`. Weights, optimiser and EMA are float32 in any case. In
    YAML, no needs quotes."""
    ema_decay: float | None = None
    """Decay of the moving average of the weights, which is what is evaluated and saved; null: none."""
    log_every: int = 5000
    """Images between two records in metrics.jsonl."""
    tracker: Literal["tensorboard"] | None = "tensorboard"
    """Where metrics and pictures are logged besides the files in output_dir; null: nowhere."""

    def __post_init__(self):
        for name in ("epochs", "max_images", "batch_size", "gradient_accumulation_steps", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"run.{name} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"run.seed must lie in [0, 2^32), got {self.seed}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"run.ema_decay must lie between 0 and 1 or be null, got {self.ema_decay}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig  # no default: a filled-in one would hold values that another architecture has not
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
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
    """Bytes at the end of the run: the highest that the GPU held, or those of the process."""
    load_line: str
    """Python that loads the model."""


def train(config: TrainConfig) -> RunResult | None:
    """Train, evaluate and save as `config` says, on the processes that `accelerate launch` started.

    Returns the result on the main process, None on the others.

    Raises:
        FileExistsError: when `run.output_dir` holds a run already.
        FloatingPointError: when a gradient is not finite, before the step is taken.
        ValueError: when the batch size cannot be divided among the processes.
    """
    run = config.run
    accelerator = Accelerator(mixed_precision=run.mixed_precision, log_with=run.tracker, project_dir=run.output_dir)
    _use_all_cores(accelerator)
    parts = accelerator.num_processes * run.gradient_accumulation_steps
    if run.batch_size % parts:
        raise ValueError(
            "run.batch_size must be divisible by the number of processes times run.gradient_accumulation_steps, "
            f"{parts}, got {run.batch_size}"
        )
    with accelerator.local_main_process_first():
        train_images, heldout_images = load_data(config.data, progress=accelerator.is_local_main_process)
    if accelerator.is_main_process:
        _begin(config)
    accelerator.wait_for_everyone()

    set_seed(run.seed)
    model = config.model.build(config.data.channels, config.data.size)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=config.optimizer.betas, weight_decay=config.optimizer.weight_decay
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    plain_model = accelerator.unwrap_model(model)
    ema = _ema(plain_model, run.ema_decay) if run.ema_decay else None
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
    interval = _RunningTerms(accelerator)
    with logging_redirect_tqdm(), bar:
        for epoch in range(math.ceil(total_images / len(train_images))):
            model.train()
            epoch_sums = np.zeros(4)
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
                        weight = micro_batch.share * accelerator.num_processes
                        # backward divides by what the launcher may have set
                        accelerator.backward(terms.loss * weight * accelerator.gradient_accumulation_steps)
                    if micro_batch.share:
                        interval.add(terms)
                grad_norm = accelerator.clip_grad_norm_(
                    model.parameters(), config.optimizer.max_grad_norm or float("inf")
                )
                if accelerator.scaler is None and not grad_norm.isfinite():
                    raise FloatingPointError(_not_finite(step, terms, Path(run.output_dir)))
                optimizer.step()
                optimizer.zero_grad()
                if ema:
                    ema.step(plain_model.parameters())

                step += 1
                seen_before, images_seen = (
                    images_seen,
                    min(images_seen + run.batch_size, (epoch + 1) * len(train_images)),
                )
                bar.update(images_seen - seen_before)
                interval.show(bar)
                done = images_seen >= epoch_end
                progress = {"epoch": epoch + 1, "step": step, "images_seen": images_seen}
                if images_seen >= next_log or done:
                    sums = interval.take()
                    epoch_sums += sums
                    norm = grad_norm.item() if grad_norm.isfinite() else None  # float16 skips such a step
                    log.write("train", progress | _means(sums) | {"learning_rate": learning_rate, "grad_norm": norm})
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
            log.write("epoch", progress | (means := _means(epoch_sums)))
            logger.info("epoch %d: %s", epoch + 1, "  ".join(f"{name} {value:.4f}" for name, value in means.items()))

    result = None
    if accelerator.is_main_process:
        with _weights_to_keep(plain_model, ema):
            result = _finish(config, accelerator, plain_model, train_images, heldout_images, log, progress)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def dry_run(config: TrainConfig) -> RunResult | None:
    """Every phase of the run `config` once, in seconds, with two steps and in a folder that is deleted again."""
    with tempfile.TemporaryDirectory() as scratch:
        few = 2 * config.run.batch_size
        return train(
            replace(
                config,
                run=replace(config.run, output_dir=str(Path(scratch) / "run"), max_images=few),
                evaluation=replace(config.evaluation, max_images=8, every=None),
            )
        )


def _use_all_cores(accelerator: Accelerator) -> None:
    """`accelerate launch` confines every process on a CPU to one thread unless told otherwise."""
    if accelerator.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // accelerator.num_processes))


def _begin(config: TrainConfig) -> None:
    output_dir = Path(config.run.output_dir)
    if (output_dir / "config.yaml").exists():
        raise FileExistsError(
            f"run.output_dir holds a run already: {output_dir.resolve()}. Choose another run.output_dir or delete it"
        )
    (output_dir / "pictures").mkdir(parents=True, exist_ok=True)
    config.save(output_dir / "config.yaml")


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


def _ema(model: VAE | MLPVAE, decay: float) -> EMAModel:
    return EMAModel(model.parameters(), decay=decay, use_ema_warmup=True, power=0.75)


@contextmanager
def _weights_to_keep(model: VAE | MLPVAE, ema: EMAModel | None) -> Iterator[None]:
    """Within, the model is in eval mode with the averaged weights, if there are any."""
    model.eval()
    if ema:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
    yield
    if ema:
        ema.restore(model.parameters())


def _loader(images: ImageSet, batches: Iterable[list[MicroBatch]], config: DataConfig) -> DataLoader:
    """uint8 images of one micro-batch after the other."""
    return DataLoader(
        images,
        batch_sampler=(micro_batch.indices for micro_batches in batches for micro_batch in micro_batches),
        num_workers=config.num_workers if isinstance(images, FolderImages) else 0,
        collate_fn=lambda pixels: pixels,
    )


class _RunningTerms:
    """Sums of loss, distortion, rate and number of images since the last `take`."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.sums = torch.zeros(4, device=accelerator.device)
        self.shown = time.monotonic()

    def add(self, terms: ObjectiveTerms) -> None:
        count = len(terms.rate)
        loss = terms.loss.detach() * count
        self.sums += torch.stack(
            [loss, terms.distortion.detach().sum(), terms.rate.detach().sum(), torch.full_like(loss, count)]
        )

    def take(self) -> np.ndarray:
        """The sums over all processes."""
        sums = self.accelerator.reduce(self.sums, "sum").double().cpu().numpy()
        self.sums.zero_()
        return sums

    def show(self, bar: tqdm) -> None:
        """Put this process's means beside the progress bar, once a second: reading them waits for the device."""
        if not bar.disable and time.monotonic() - self.shown > 1 and self.sums[3] > 0:
            self.shown = time.monotonic()
            bar.set_postfix({name: f"{value:.4g}" for name, value in _means(self.sums.tolist()).items()})


def _means(sums) -> dict[str, float]:
    return {name: float(total / sums[3]) for name, total in zip(("loss", "distortion", "rate"), sums, strict=False)}


class _Log:
    """metrics.jsonl and the tracker. Records hold nothing that a second run of the same config would not repeat."""

    def __init__(self, accelerator: Accelerator, output_dir: Path):
        self.accelerator, self.path = accelerator, output_dir / "metrics.jsonl"

    def write(self, kind: str, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"kind": kind} | values) + "\n")
        named = {
            f"{kind}/{name}": value for name, value in values.items() if name != "images_seen" and value is not None
        }
        self.accelerator.log(named, step=values["images_seen"])

    def show(self, pictures: dict[str, Image.Image], images_seen: int) -> None:
        for tracker in self.accelerator.trackers:
            arrays = {name: np.asarray(picture)[None] for name, picture in pictures.items()}
            tracker.log_images(arrays, step=images_seen, dataformats="NHWC")


def _not_finite(step: int, terms: ObjectiveTerms, output_dir: Path) -> str:
    values = {"loss": terms.loss, "distortion": terms.distortion, "rate": terms.rate}
    bad = [name for name, value in values.items() if not value.isfinite().all()]
    return (
        f"training stopped before step {step + 1}: {' and '.join(bad) or 'the gradient'} is not finite. Metrics up to "
        f"here are in {output_dir}. A lower optimizer.learning_rate, a longer optimizer.warmup_images, a "
        "optimizer.max_grad_norm or a larger objective.scale make training more stable"
    )


def _evaluate(
    config: TrainConfig, model: VAE | MLPVAE, images: ImageSet, log: _Log, progress: dict[str, int]
) -> EvaluationReport:
    """Measure and picture `model`; writes evaluation.json and pictures/."""
    output_dir = Path(config.run.output_dir)
    report = evaluate(model, images, config.objective.build(), config.evaluation)
    report.save(output_dir / "evaluation.json")
    numbers = {name: value for name, value in asdict(report).items() if isinstance(value, float)}
    log.write("evaluation", progress | numbers)
    pictures = draw_all(
        model, images, output_dir / "metrics.jsonl", config.evaluation.batch_size, config.evaluation.seed
    )
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
    """Measure the latents, save the model, and only then what could still fail: evaluation and pictures."""
    output_dir = Path(config.run.output_dir)
    statistics = measure_latents(model, train_images, config.evaluation.batch_size, config.evaluation.max_images)
    model.register_to_config(scaling_factor=statistics.scaling_factor, shift_factor=statistics.mean)
    model.save_pretrained(output_dir / "model")
    report = _evaluate(config, model, heldout_images, log, progress)
    package, name = ("diffusers", "AutoencoderKL") if isinstance(model, VAE) else ("diffusers_vae", "MLPVAE")
    cuda = accelerator.device.type == "cuda"
    return RunResult(
        output_dir=output_dir,
        report=report,
        parameters=model.num_parameters(),
        latent_shape=config.model.latent_shape(config.data.size),
        memory=torch.cuda.max_memory_allocated() if cuda else psutil.Process().memory_info().rss,
        load_line=f'from {package} import {name}; vae = {name}.from_pretrained("{output_dir / "model"}")',
    )
