"""One run, from settings to a trained, measured and pictured model."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    is_torch_version,
    set_seed,
)
from diffusers.training_utils import EMAModel
from filelock import FileLock, Timeout
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .checkpoint import (
    check_fits,
    find_checkpoint,
    naming,
    on_main,
    read_progress,
    remove_half_written,
    restore,
    save_checkpoint,
    surroundings,
    whole,
    whole_folder,
    write_file,
)
from .data import DataConfig, FolderImages, ImageSet, MicroBatch, ReadImages, epoch_batches, load_data, step_noise
from .evaluation import EvaluationConfig, EvaluationReport, evaluate, load_judges
from .hub import HubConfig, write_card
from .images import to_model_range
from .latents import measure_latents
from .models import MLPVAE, VAE, ModelConfig
from .objective import ObjectiveConfig, ObjectiveTerms
from .report import draw_report, report_html

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
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Autocast dtype; null leaves it to `accelerate launch`, and config.yaml states what it was. Weights, optimiser
    and EMA are float32 in any case. In YAML, no needs quotes."""
    ema_decay: float | None = 0.99
    """Decay of the moving average of the weights, which is what is evaluated and saved; null: none."""
    checkpoint_every: int = 10_000
    """Images between two checkpoints, from which the same command continues; there is one at the end, too."""
    keep_checkpoints: int = 2
    """How many are kept, the newest; with one alone, there is nothing to fall back on if a disk damages it."""
    allow_config_change: bool = False
    """Continue the run in output_dir although settings, or the images, are not those that it was begun with."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When loss or gradient are not finite, no step is taken and the batch is written to output_dir. stop: with an
    error. skip: go on, and count; 20 in a row stop the run."""
    deterministic: bool = False
    """Use algorithms alone that repeat bit by bit. On a CPU all do; on a GPU exact resume needs it, and is slower."""
    log_every: int = 1000
    """Images between two records in metrics.jsonl."""
    tracker: Literal["tensorboard"] | None = "tensorboard"
    """Where metrics and pictures are logged besides the files in output_dir; null: nowhere."""

    def __post_init__(self):
        if not self.output_dir:
            raise ValueError("run.output_dir must name a folder, got an empty text")
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
    hub: HubConfig = field(default_factory=HubConfig)

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

    def plain(self) -> dict[str, dict[str, Any]]:
        """All settings as YAML and JSON know them."""
        return _plain(asdict(self))

    def save(self, path: Path) -> None:
        """Write all settings as YAML, which gives the same run again."""
        write_file(path, yaml.safe_dump(self.plain(), sort_keys=False))


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind."""

    output_dir: Path
    """With config.yaml, metrics.jsonl, checkpoints/, model/, evaluation.json, report.html, README.md (the card) and
    pictures/."""
    report: EvaluationReport
    """Of the model in model/, on the held-out images."""
    parameters: int
    """Number of trained values."""
    latent_shape: tuple[int, ...]
    """Channels, height and width of the latents of one image."""
    load_line: str
    """Python that loads the model."""
    memory: int | None = None
    """Bytes: the most that a GPU, or the process, has held; None when the run had finished before."""
    train_images: int | None = None
    """How many there are in the set; None likewise."""
    images_per_second: float | None = None
    """Of training steps, all processes together; None when there was only one to take, or none."""


class Interrupted(BaseException):
    """A signal asked the run to stop: its state is on the disk, and the same command continues it. As a
    KeyboardInterrupt, it is no Exception, so that nobody takes it for an error in what was being done.
    """


def train(config: TrainConfig, memory_limit: int | None = None) -> RunResult | None:
    """Train, evaluate and save as `config` says, on the processes that `accelerate launch` started; continue the run
    that `run.output_dir` holds.

    Returns the result on the main process, None on the others. `memory_limit` is that of `load_data`.

    Raises:
        Interrupted: after SIGTERM, SIGINT or SIGUSR1.
        FileExistsError: when `run.output_dir` holds a run with other settings.
        FloatingPointError: when loss, gradient or result are not finite; before the step is taken if that shows there.
        OSError: naming what cannot be read or written.
        ValueError: when config and launcher do not fit each other, or images cannot be read.
    """
    run = config.run
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # then several processes are told apart only when it is said
        mixed_precision=run.mixed_precision,
        log_with=run.tracker,
        project_dir=run.output_dir,
        # the others wait while the main process reads images first, or draws
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    _check_launch(accelerator, run)
    _use_all_cores(accelerator)
    config = replace(config, run=replace(run, mixed_precision=accelerator.mixed_precision))
    with _Signals() as signals, _only_run_in(Path(run.output_dir), accelerator):
        try:
            return _train(config, accelerator, signals, memory_limit)
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()


def _train(
    config: TrainConfig, accelerator: Accelerator, signals: _Signals, memory_limit: int | None
) -> RunResult | None:
    run, output_dir = config.run, Path(config.run.output_dir)
    checkpoint, finished = on_main(accelerator, lambda: _find_run(config))
    if finished:
        return _finished_result(config) if accelerator.is_main_process else None
    if checkpoint and accelerator.is_main_process:
        logger.info("continuing from %s", checkpoint)
    with accelerator.local_main_process_first():
        train_images, heldout_images = load_data(config.data, accelerator.is_local_main_process, memory_limit)
    load_judges(config.evaluation, config.data.channels, config.data.size)  # which are missed now, not after days
    on_main(accelerator, lambda: _begin(config, checkpoint, train_images, heldout_images))

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
    latent_shape = config.model.latent_shape(config.data.size)
    total_images = min(run.epochs * len(train_images), run.max_images or sys.maxsize)
    if accelerator.num_processes > 1:
        # DistributedDataParallel orders its buckets by its first backward. Without this one, which leaves no trace, the
        # first step of a resumed run would sum the gradients of three or more processes in another order.
        blank = torch.zeros(1, config.data.channels, *config.data.size, device=accelerator.device)
        accelerator.backward(model(blank, sample_posterior=True).sample.sum())
        optimizer.zero_grad()
    set_seed(run.seed, device_specific=True)  # for whatever draws without a generator of its own
    step = images_seen = skipped = skipped_in_a_row = 0
    changes: list[str] = []
    interval, epoch_terms, step_terms = (_RunningTerms(accelerator) for _ in range(3))
    if checkpoint:
        restore(checkpoint, accelerator, plain_model, optimizer.optimizer, ema)
        saved, sums = _progress(checkpoint, accelerator)
        progress = {name: saved[name] for name in ("epoch", "step", "images_seen")}
        step, images_seen = progress["step"], progress["images_seen"]
        skipped, skipped_in_a_row, changes = saved["skipped"], saved["skipped_in_a_row"], saved["changes"]
        interval.put(sums["interval"])
        epoch_terms.put(sums["epoch"])
    log = _Log(accelerator, output_dir, images_seen)
    bad_images = _BadImages(output_dir / "bad_images.txt")
    if accelerator.is_main_process:
        bad_images.add((*train_images.errors, *heldout_images.errors), warn=False)

    if accelerator.is_main_process:
        logger.info("%s", _summary(config, accelerator, plain_model, len(train_images), len(heldout_images)))
    next_log, next_evaluation, next_checkpoint = (
        (images_seen // every + 1) * every
        for every in (run.log_every, config.evaluation.every or sys.maxsize, run.checkpoint_every)
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
    with logging_redirect_tqdm(), bar:
        while images_seen < total_images:
            epoch, start = divmod(images_seen, len(train_images))
            epoch_end = min((epoch + 1) * len(train_images), total_images)
            batches = partial(
                epoch_batches,
                len(train_images),
                run.batch_size,
                run.seed,
                epoch,
                accelerator.process_index,
                accelerator.num_processes,
                run.gradient_accumulation_steps,
                start,
            )
            loader = iter(_loader(train_images, batches(), config.data, run.seed))
            model.train()
            for micro_batches in batches():
                began = time.monotonic()
                learning_rate = config.optimizer.learning_rate_at(images_seen, total_images)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                start = images_seen - epoch * len(train_images)
                noise = step_noise(latent_shape, micro_batches[0].count, run.seed, epoch, start, accelerator.device)
                seen: list[_Seen] = []
                for micro_step, micro_batch in enumerate(micro_batches, 1):
                    read = next(loader).checked()
                    bad_images.add(read.errors)
                    share = micro_batch.share * len(read.kept) / len(micro_batch.indices)
                    if not read.kept:  # every process must take part in the step
                        read = ReadImages(read.pixels.new_zeros(1, *read.pixels.shape[1:]), [0])
                    images = to_model_range(read.pixels.to(accelerator.device))
                    own_noise = noise[[micro_batch.first + place for place in read.kept]]
                    with nullcontext() if micro_step == len(micro_batches) else accelerator.no_sync(model):
                        reconstructions, posterior = model(
                            images, return_dict=False, return_posterior=True, noise=own_noise
                        )
                        terms = objective(images, reconstructions, posterior)
                        # Gradients are averaged over processes, so that this sums to the mean over the step's images.
                        accelerator.backward(terms.loss * share * accelerator.num_processes)
                    if share:
                        step_terms.add(_sums(terms))
                        indices = [micro_batch.indices[place] for place in read.kept]
                        seen.append(_Seen(micro_batch.count, indices, read, own_noise, terms))
                grad_norm = accelerator.clip_grad_norm_(
                    model.parameters(), config.optimizer.max_grad_norm or float("inf")
                )
                bad, stop = _agree(accelerator, step_terms.sums, grad_norm, signals.asked())
                # A gradient in float16 may overflow: the scaler then skips the step and lowers its scale; below 1 it
                # will not recover.
                overflow = bad == ["gradient"] and accelerator.scaler and accelerator.scaler.get_scale() >= 1
                if bad and not overflow:
                    message = _not_finite(config, accelerator, step + 1, skipped, bad, seen, train_images)
                    if run.on_nonfinite == "stop" or skipped_in_a_row + 1 >= SKIPS_IN_A_ROW:
                        kept = f"The newest checkpoint is {checkpoint}. " if checkpoint else ""
                        raise FloatingPointError(f"training stopped before step {message}. {kept}{STABLER}")
                    if accelerator.is_main_process:
                        logger.warning("skipped step %s", message)
                    if accelerator.scaler:
                        accelerator.scaler.update()
                    skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
                else:
                    optimizer.step()
                    if ema and not optimizer.step_was_skipped:
                        ema.step(plain_model.parameters())
                    interval.add(step_terms.sums)
                    epoch_terms.add(step_terms.sums)
                    skipped_in_a_row = 0
                optimizer.zero_grad()
                step_terms.sums.zero_()

                if warm:
                    timed_images += micro_batches[0].count
                    timed_seconds += time.monotonic() - began
                warm = True
                step += 1
                images_seen = min(images_seen + run.batch_size, (epoch + 1) * len(train_images))
                bar.update(min(images_seen, total_images) - bar.n)
                interval.show(bar)
                progress = {"epoch": epoch + 1, "step": step, "images_seen": images_seen}
                counts = progress | ({"skipped": skipped} if skipped else {})
                if images_seen >= next_log or images_seen >= total_images:
                    norm = grad_norm.item() if grad_norm.isfinite() else None  # of a step that was skipped
                    means = _means(interval.take())
                    log.write("train", counts | means | {"learning_rate": learning_rate, "grad_norm": norm})
                    next_log = (images_seen // run.log_every + 1) * run.log_every
                if images_seen >= epoch_end:
                    means = _means(epoch_terms.take())
                    log.write("epoch", counts | means)
                    if accelerator.is_main_process:
                        text = "  ".join(f"{name} {value:.4f}" for name, value in means.items() if value is not None)
                        logger.info("epoch %d: %s", epoch + 1, text)
                if images_seen >= next_evaluation and images_seen < total_images:
                    averaged = _model_to_keep(config, accelerator, plain_model, ema)
                    _evaluate(config, accelerator, averaged, heldout_images, log, progress)
                    del averaged
                    next_evaluation = (images_seen // config.evaluation.every + 1) * config.evaluation.every
                if images_seen >= next_checkpoint or images_seen >= total_images or stop:
                    checkpoint = save_checkpoint(
                        output_dir / "checkpoints",
                        accelerator,
                        plain_model,
                        optimizer.optimizer,
                        ema,
                        progress | {"skipped": skipped, "skipped_in_a_row": skipped_in_a_row, "changes": changes},
                        {"interval": interval.sums.tolist(), "epoch": epoch_terms.sums.tolist()},
                        [output_dir / "config.yaml", output_dir / "data.json", log.path],
                        run.keep_checkpoints,
                    )
                    next_checkpoint = (images_seen // run.checkpoint_every + 1) * run.checkpoint_every
                if stop:
                    raise Interrupted(
                        f"asked to stop ({signals.reason or 'as another process was'}) after {images_seen:,} of "
                        f"{total_images:,} images; saved as {checkpoint}. The same command continues"
                    )
                if images_seen >= epoch_end:
                    break

    signals.wait = False  # all that follows can be done again from the checkpoint
    averaged = _model_to_keep(config, accelerator, plain_model, ema)
    if images_seen >= total_images + run.batch_size and accelerator.is_main_process:
        logger.warning("%d images were seen already, more than the %d that are asked for", images_seen, total_images)
    report = _finish(config, accelerator, averaged, train_images, heldout_images, log, progress)
    bad_images.add((*train_images.errors, *heldout_images.errors), warn=False)
    if not accelerator.is_main_process:
        return None
    if skipped:
        logger.warning("%d steps were skipped, since loss or gradient were not finite", skipped)
    if bad_images.known:
        logger.warning("%d files could not be read and were left out: %s", len(bad_images.known), bad_images.path)
    return replace(
        _result(config, report, plain_model),
        memory=_peak_memory(accelerator.device),
        train_images=len(train_images),
        images_per_second=timed_images / timed_seconds if timed_images else None,
    )


def dry_run(config: TrainConfig) -> tuple[RunResult, bool, float | None] | None:
    """Every phase of the run `config` once, on two batches, in a folder that is deleted again: training, a checkpoint,
    evaluation, pictures, saving, and the second batch again from the checkpoint.

    Returns, on the main process, the result, whether the resumed run gave the same weights bit by bit, and the
    seconds that all of the training would take, without evaluation.
    """
    PartialState(cpu=not torch.accelerator.is_available())
    _find_run(config)  # which refuses what the run would refuse
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(broadcast_object_list([scratch])[0]) / "run"
        few = replace(
            config,
            run=replace(
                config.run,
                output_dir=str(folder),
                epochs=2,  # of sets of less than a batch
                max_images=2 * config.run.batch_size,
                checkpoint_every=1,
                keep_checkpoints=2,
                allow_config_change=False,
            ),
            evaluation=replace(config.evaluation, max_images=config.evaluation.batch_size, every=1),
        )
        try:
            result = train(few, memory_limit=0)  # what two batches need is read on demand
            weights = folder / "model" / "diffusion_pytorch_model.safetensors"
            if result:
                before = load_file(weights)
                (folder / "evaluation.json").unlink()
                shutil.rmtree(max((folder / "checkpoints").glob("images-*")))
            broadcast_object_list([None])
            again = train(few, memory_limit=0)
        except Interrupted as interruption:
            raise Interrupted("the dry run was asked to stop; nothing was kept") from interruption
        if not (result and again):
            return None
        same = all(torch.equal(before[name], value) for name, value in load_file(weights).items())
        total = min(config.run.epochs * result.train_images, config.run.max_images or sys.maxsize)
        return result, same, total / result.images_per_second if result.images_per_second else None


class _Signals:
    """What SIGTERM, SIGINT and SIGUSR1, which clusters and spot machines send, ask for while it is entered.

    The first is noted if `wait` is set, else raises Interrupted; the second ends the process at once.
    """

    def __init__(self):
        self.wait, self.reason = False, ""
        self.parent = os.getppid()
        try:
            command = " ".join(psutil.Process(self.parent).cmdline())
        except psutil.Error:
            command = ""
        # `accelerate launch` with one process passes no signal on: it is gone, and the run would go on without it
        self.launched = any(launcher in command for launcher in ("accelerate", "torchrun", "torch.distributed"))

    def __enter__(self) -> _Signals:
        self.previous = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
            self.previous = {number: signal.signal(number, self._note) for number in self.numbers()}
        return self

    @staticmethod
    def numbers() -> list[int]:
        return [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.reason = signal.Signals(number).name
        for other in self.previous:
            signal.signal(other, signal.SIG_DFL)
        if not self.wait:
            raise Interrupted(f"asked to stop ({self.reason}). The same command continues")
        os.write(2, f"\n{self.reason}: finishing the step and saving; a second signal stops at once\n".encode())

    def asked(self) -> bool:
        """Whether this process is to stop, for the `reason` that is then set."""
        if self.launched and os.getppid() != self.parent:
            self.reason = "the launcher has ended"
        return bool(self.reason)


@contextmanager
def _only_run_in(output_dir: Path, accelerator: Accelerator) -> Iterator[None]:
    """Within, no other run can use the folder."""
    lock = FileLock(output_dir / ".lock")

    def acquire() -> None:
        if output_dir.exists() and not output_dir.is_dir():
            raise NotADirectoryError(f"run.output_dir must be a folder, got the file {output_dir.resolve()}")
        with naming(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                logger.info("%s is in use: waiting, in case it is by what is left of a killed run", output_dir)
                lock.acquire(timeout=15)
        except Timeout as error:
            raise OSError(
                f"another process is training in {output_dir.resolve()}: wait for its end or choose another "
                "run.output_dir"
            ) from error
        except NotImplementedError:
            logger.warning("%s cannot be locked: take care that no two runs use it", output_dir)

    on_main(accelerator, acquire)
    try:
        yield
    finally:
        lock.release()


FREE_SETTINGS = {
    "data.root", "data.num_workers", "data.on_bad_image", "run.output_dir", "run.checkpoint_every",
    "run.keep_checkpoints", "run.allow_config_change", "run.on_nonfinite", "run.tracker",
    "run.gradient_accumulation_steps",
}  # fmt: skip
"""A run may be continued with others of these: they change no result, or, like the number of processes, only the order
in which it is summed."""


RESULTS = ("model", "evaluation.json")
FILES = (
    *RESULTS,
    "README.md",
    "bad_images.txt",
    "data.json",
    "evaluation.csv",
    "report.html",
    "metrics.jsonl",
    "nonfinite",
    "pictures",
    "tensorboard",
)


def _find_run(config: TrainConfig) -> tuple[Path | None, bool]:
    """The newest whole checkpoint in the output_dir, and whether the run is finished. Nothing is changed.

    Raises:
        FileExistsError: when the folder is another run's, or holds what a new run would overwrite.
        ValueError: when there are checkpoints, but none that is whole or of this model.
    """
    output_dir = Path(config.run.output_dir)
    checkpoint, damaged = find_checkpoint(output_dir / "checkpoints")
    for problem in damaged:
        logger.warning("%s; it is passed over", problem)
    config_file = output_dir / "config.yaml"
    if not (checkpoint or config_file.exists()):
        if found := [name for name in FILES if (output_dir / name).exists()]:
            raise FileExistsError(
                f"run.output_dir holds files that a run would overwrite, and no config.yaml that says whose they are: "
                f"{', '.join(found)} in {output_dir.resolve()}. Choose another run.output_dir or move them away"
            )
        return None, False
    if all((output_dir / name).exists() for name in RESULTS) and config_file.exists():
        try:
            EvaluationReport.from_json((output_dir / "evaluation.json").read_text())
            readable = True
        except ValueError as error:
            logger.warning("evaluation.json cannot be read (%s); the end of the run is done again", error)
            readable = False
        if readable and not _differing(config_file, config):
            return checkpoint, True
    _refuse_changes(config, "settings", _differing((checkpoint or output_dir) / "config.yaml", config))
    if checkpoint:
        with torch.device("meta"):
            check_fits(checkpoint, config.model.build(config.data.channels, config.data.size))
        return checkpoint, False
    if found := [name for name in RESULTS if (output_dir / name).exists()]:
        raise FileExistsError(
            f"run.output_dir holds results, {', '.join(found)}, and no checkpoint from which to continue: "
            f"{output_dir.resolve()}. Choose another run.output_dir or move them away"
        )
    return None, False


def _differing(path: Path, config: TrainConfig) -> list[str]:
    """The settings in the YAML file `path` that are not those of `config` and change the result."""
    try:
        stated = _settings(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML, so that it is not known which run the folder holds: {error}") from error
    wanted = _settings(config.plain())
    sections = {
        "data": DataConfig(), "optimizer": OptimizerConfig(), "run": RunConfig(), "evaluation": EvaluationConfig(),
        "hub": HubConfig(),
    }  # fmt: skip
    # of settings that an older version did not have
    defaults = wanted | _settings(_plain({name: asdict(section) for name, section in sections.items()}))
    return [
        f"{name}: {old} -> {new}"
        for name in sorted(wanted.keys() | stated.keys())
        if name not in FREE_SETTINGS
        and not name.startswith("hub.")
        and (old := stated.get(name, defaults.get(name))) != (new := wanted.get(name))
    ]


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values))  # tuples become lists


def _settings(sections: Any) -> dict[str, Any]:
    """By their full names."""
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        return {"config.yaml": sections}
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}


def _refuse_changes(config: TrainConfig, what: str, differing: list[str]) -> None:
    if not differing:
        return
    listed = "\n".join(f"  {line}" for line in differing)
    if not config.run.allow_config_change:
        raise FileExistsError(
            f"run.output_dir holds a run with other {what}: {Path(config.run.output_dir).resolve()}\n{listed}\nChoose "
            "another run.output_dir, or continue that run in spite of it with --run.allow_config_change true"
        )
    logger.warning("continuing with other %s:\n%s", what, listed)


def _begin(config: TrainConfig, checkpoint: Path | None, train_images: ImageSet, heldout_images: ImageSet) -> None:
    """Bring the files in output_dir to where the run begins or goes on."""
    output_dir = Path(config.run.output_dir)
    data = {
        name: {"images": len(part), "fingerprint": part.fingerprint()}
        for name, part in (("training", train_images), ("held-out", heldout_images))
    }
    if checkpoint:
        before = json.loads((checkpoint / "data.json").read_text())
        differing = [
            f"{before[name]['images']} {name} images -> {data[name]['images']}"
            + ", others or changed" * (before[name]["images"] == data[name]["images"])
            for name in data
            if before[name] != data[name]
        ]
        _refuse_changes(config, "images", differing)
    remove_half_written(output_dir / "checkpoints")
    config.save(output_dir / "config.yaml")  # first: it says whose the others are
    with naming(output_dir):
        (output_dir / "pictures").mkdir(exist_ok=True)
        (output_dir / "evaluation.json").unlink(missing_ok=True)  # it says that the run is finished
        if not checkpoint:
            (output_dir / "bad_images.txt").unlink(missing_ok=True)
    write_file(output_dir / "data.json", json.dumps(data, indent=2) + "\n")
    write_file(output_dir / "metrics.jsonl", (checkpoint / "metrics.jsonl").read_text() if checkpoint else "")


def _progress(checkpoint: Path, accelerator: Accelerator) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """How far the run was, and this process's sums; what processes had that are no more is the main process's."""
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
    sums = {name: own.get(name, [0.0] * 4) for name in ("interval", "epoch")}
    if accelerator.is_main_process:
        for process in range(accelerator.num_processes, before["processes"]):
            _, gone = read_progress(checkpoint, process)
            sums = {name: np.add(sums[name], gone[name]).tolist() for name in sums}
    return progress, sums


def _use_all_cores(accelerator: Accelerator) -> None:
    """`accelerate launch` confines every process on a CPU to one thread unless told otherwise."""
    if accelerator.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // accelerator.num_processes))


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


def _summary(
    config: TrainConfig, accelerator: Accelerator, model: VAE | MLPVAE, train_length: int, heldout_length: int
) -> str:
    device_batch_size = config.run.batch_size // (accelerator.num_processes * config.run.gradient_accumulation_steps)
    precision = {"no": "float32"}.get(accelerator.mixed_precision, f"{accelerator.mixed_precision} autocast")
    return (
        f"{'VAE' if isinstance(model, VAE) else 'MLPVAE'} with {model.num_parameters():,} parameters, latents "
        f"{'x'.join(map(str, config.model.latent_shape(config.data.size)))}; {train_length:,} training and "
        f"{heldout_length:,} held-out images of {config.data.name} at {'x'.join(map(str, config.data.size))}; "
        f"{precision} on {accelerator.num_processes} x {accelerator.device}, {device_batch_size} images per forward"
    )


def _model_to_keep(
    config: TrainConfig, accelerator: Accelerator, model: VAE | MLPVAE, ema: EMAModel | None
) -> VAE | MLPVAE:
    """A whole copy of the model on every process, in eval mode, with the averaged weights if there are any."""
    with torch.device("meta"):
        kept = config.model.build(config.data.channels, config.data.size)
    state = model.state_dict()
    if ema:
        state |= {name: p for (name, _), p in zip(model.named_parameters(), ema.shadow_params, strict=True)}
    kept.to_empty(device=accelerator.device)
    kept.load_state_dict({name: whole(tensor) for name, tensor in state.items()})
    return kept.eval().requires_grad_(False)


def _loader(image_set: ImageSet, batches: Iterable[list[MicroBatch]], config: DataConfig, seed: int) -> DataLoader:
    """The images of one micro-batch after the other."""
    return DataLoader(
        image_set,
        batch_sampler=(micro_batch.indices for micro_batches in batches for micro_batch in micro_batches),
        num_workers=config.num_workers if isinstance(image_set, FolderImages) else 0,
        collate_fn=_as_read,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator().manual_seed(seed),  # otherwise every loader takes a number from the global one
    )


def _ignore_signals(worker: int) -> None:
    """What is sent to all processes of a job is answered by those that train, which need images to end their step."""
    for number in _Signals.numbers():
        signal.signal(number, signal.SIG_IGN)


def _as_read(read: ReadImages) -> ReadImages:
    return read  # already a batch; by name, since a lambda does not reach the workers everywhere


@dataclass(frozen=True)
class _Seen:
    """A micro-batch of a step of `count` images and what came of it, for the dump of a step that is not finite."""

    count: int
    indices: list[int]
    read: ReadImages
    noise: torch.Tensor
    terms: ObjectiveTerms


def _sums(terms: ObjectiveTerms) -> torch.Tensor:
    """Loss, distortion, rate, each summed over the images, and their number."""
    count = len(terms.rate)
    loss = terms.loss.detach() * count
    return torch.stack([loss, terms.distortion.detach().sum(), terms.rate.detach().sum(), torch.full_like(loss, count)])


class _RunningTerms:
    """`_sums` of this process since the last `take`."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
        self.sums = torch.zeros(4, dtype=exact, device=accelerator.device)
        self.shown = time.monotonic()

    def add(self, sums: torch.Tensor) -> None:
        self.sums += sums

    def put(self, sums: list[float]) -> None:
        self.sums.copy_(torch.tensor(sums, dtype=torch.float64))

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


TERMS = ("loss", "distortion", "rate")


def _means(sums: Sequence[float] | np.ndarray) -> dict[str, float | None]:
    """None when every step was skipped."""
    return {name: float(total / sums[3]) if sums[3] else None for name, total in zip(TERMS, sums, strict=False)}


class _Log:
    """metrics.jsonl and the tracker. Records hold nothing that a second run of the same config would not repeat."""

    def __init__(self, accelerator: Accelerator, output_dir: Path, images_seen: int):
        self.accelerator, self.path = accelerator, output_dir / "metrics.jsonl"
        if accelerator.log_with:
            # what an interrupted run had logged after its checkpoint comes again
            accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": images_seen + 1}})

    def write(self, kind: str, values: dict[str, float | None]) -> None:
        if self.accelerator.is_main_process:
            with naming(self.path), self.path.open("a") as file:
                file.write(json.dumps({"kind": kind} | values, allow_nan=False) + "\n")
        named = {
            f"{kind}/{name}": value for name, value in values.items() if name != "images_seen" and value is not None
        }
        with naming(self.path.parent / "tensorboard"):
            self.accelerator.log(named, step=values["images_seen"])

    def show(self, pictures: dict[str, Image.Image], images_seen: int) -> None:
        for tracker in self.accelerator.trackers:
            arrays = {name: np.asarray(picture)[None] for name, picture in pictures.items()}
            with naming(self.path.parent / "tensorboard"):
                tracker.log_images(arrays, step=images_seen, dataformats="NHWC")


class _BadImages:
    """The files that were left out since they could not be read, each listed once."""

    def __init__(self, path: Path):
        self.path = path
        self.known = set(path.read_text().splitlines()) if path.exists() else set()

    def add(self, errors: Iterable[str], warn: bool = True) -> None:
        for error in errors:
            line = " ".join(error.split())
            if line in self.known:
                continue
            self.known.add(line)
            if warn:
                logger.warning("%s; left out", line)
            with naming(self.path), self.path.open("a") as file:
                file.write(line + "\n")


def _agree(
    accelerator: Accelerator, sums: torch.Tensor, grad_norm: torch.Tensor, asked: bool
) -> tuple[list[str], bool]:
    """Which terms of the step are not finite on any process, and whether any was asked to stop."""
    finite = torch.cat([sums[:3], whole(grad_norm).to(sums).view(1)]).isfinite()
    if accelerator.num_processes == 1:
        flags = [not ok for ok in finite.tolist()] + [asked]
    else:
        both = torch.cat([~finite, torch.tensor([asked], device=finite.device)])
        flags = accelerator.reduce(both.int(), "sum").tolist()
    return [name for name, flag in zip((*TERMS, "gradient"), flags, strict=False) if flag], bool(flags[4])


SKIPS_IN_A_ROW = 20
MAX_DUMPS = 10


def _not_finite(
    config: TrainConfig,
    accelerator: Accelerator,
    step: int,
    skipped: int,
    bad: list[str],
    seen: list[_Seen],
    image_set: ImageSet,
) -> str:
    """What is wrong with `step`, in words, after its batch was written to output_dir."""
    culprits = [
        image_set.name(index)
        for part in seen
        for index, distortion, rate in zip(part.indices, part.terms.distortion, part.terms.rate, strict=True)
        if not (distortion + rate).isfinite()
    ]
    folder = Path(config.run.output_dir) / "nonfinite"
    path = folder / f"step-{step:09d}-process-{accelerator.process_index}.safetensors"
    where = f"not written, as {MAX_DUMPS} were"
    if seen and skipped < MAX_DUMPS:
        tensors = {
            "indices": torch.cat([torch.tensor(part.indices) for part in seen]),
            "pixels": torch.cat([part.read.pixels for part in seen]),
            "noise": torch.cat([part.noise.cpu() for part in seen]),
            "distortion": torch.cat([part.terms.distortion.detach().cpu() for part in seen]),
            "rate": torch.cat([part.terms.rate.detach().cpu() for part in seen]),
        }
        try:
            with naming(path):
                folder.mkdir(exist_ok=True)
                save_file(tensors, path)
            where = f"in {path}"
        except OSError as error:  # what went wrong first must be told all the same
            where = f"not written: {error}"
    found = gather_object([(culprits, where)])
    culprits = [name for names, _ in found for name in names]
    paths = [where for names, where in found if names] or [where for _, where in found]
    shown = ", ".join(culprits[:3]) + " ..." * (len(culprits) > 3)
    which = f", in {len(culprits)} of {seen[0].count} images: {shown}" if culprits and seen else ""
    return f"{step}, not finite: {', '.join(bad)}{which}. Its images are {', '.join(paths)}"


STABLER = (
    "More stable are a lower optimizer.learning_rate, a longer optimizer.warmup_images, a lower "
    "optimizer.max_grad_norm or a larger objective.scale"
)


def _evaluate(
    config: TrainConfig,
    accelerator: Accelerator,
    model: VAE | MLPVAE,
    image_set: ImageSet,
    log: _Log,
    progress: dict[str, int],
) -> tuple[EvaluationReport, dict[str, Image.Image]]:
    """Measure `model` on all processes, and picture it on the main process."""
    settings = config.evaluation
    name = Path(config.run.output_dir).resolve().name
    bar = accelerator.is_main_process
    report = evaluate(model, image_set, config.objective.build(), settings, config.data, "held-out", name, bar)
    numbers = {key: value for key, value in vars(report).items() if isinstance(value, float)}
    if bad := [name for name, value in numbers.items() if not math.isfinite(value)]:
        raise FloatingPointError(f"training diverged, not finite on held-out images: {', '.join(bad)}. {STABLER}")
    log.write("evaluation", progress | numbers)

    def draw() -> dict[str, Image.Image]:
        pictures = draw_report(model, image_set, log.path, settings, report)
        for name, picture in pictures.items():
            path = log.path.parent / "pictures" / f"{name}.png"
            with naming(path):
                picture.save(path)
        log.show(pictures, progress["images_seen"])
        return pictures

    pictures: dict[str, Image.Image] = {}
    on_main(accelerator, lambda: pictures.update(draw()))
    return report, pictures


def _finish(
    config: TrainConfig,
    accelerator: Accelerator,
    model: VAE | MLPVAE,
    train_images: ImageSet,
    heldout_images: ImageSet,
    log: _Log,
    progress: dict[str, int],
) -> EvaluationReport:
    """Save the model before anything that could fail, then measure: latents, which go into its config, and images.
    evaluation.json comes last: it says that the run is finished.
    """
    output_dir = Path(config.run.output_dir)

    def save() -> None:
        with whole_folder(output_dir / "model") as folder:
            model.save_pretrained(folder)

    on_main(accelerator, save)
    batch_size, max_images = config.evaluation.batch_size, config.evaluation.max_images
    statistics = measure_latents(model, train_images, batch_size, max_images, accelerator.is_main_process)
    if not (math.isfinite(statistics.mean) and 0 < statistics.std < math.inf):
        raise FloatingPointError(
            f"training diverged: the latents have mean {statistics.mean} and std {statistics.std}. {STABLER}"
        )
    model.register_to_config(scaling_factor=statistics.scaling_factor, shift_factor=statistics.mean)
    on_main(accelerator, save)
    report, pictures = _evaluate(config, accelerator, model, heldout_images, log, progress)

    def write() -> None:
        evaluation = report.to_json()
        write_file(output_dir / "evaluation.csv", report.per_image.to_csv())
        write_file(output_dir / "report.html", report_html(json.loads(evaluation), pictures, report.model.name))
        write_card(output_dir, config.hub, json.loads(evaluation))
        write_file(output_dir / "evaluation.json", evaluation)

    on_main(accelerator, write)
    return report


def _result(config: TrainConfig, report: EvaluationReport, model: VAE | MLPVAE) -> RunResult:
    folder = Path(config.run.output_dir) / "model"
    package, name = ("diffusers", "AutoencoderKL") if isinstance(model, VAE) else ("diffusers_vae", "MLPVAE")
    return RunResult(
        output_dir=folder.parent,
        report=report,
        parameters=model.num_parameters(),
        latent_shape=config.model.latent_shape(config.data.size),
        load_line=f'from {package} import {name}; vae = {name}.from_pretrained("{folder.as_posix()}")',
    )


def _finished_result(config: TrainConfig) -> RunResult:
    logger.info("%s holds this run, finished", config.run.output_dir)
    with torch.device("meta"):
        model = config.model.build(config.data.channels, config.data.size)
    text = (Path(config.run.output_dir) / "evaluation.json").read_text()
    return _result(config, EvaluationReport.from_json(text), model)


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that was held on the GPU, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
