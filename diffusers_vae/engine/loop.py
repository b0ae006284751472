"""The loop of every run: images in a fixed order, a step, a checkpoint, and on from where it was interrupted."""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..data import step_generator
from ..messages import showable
from ..processes import Interrupted, Signals, lossy_output, on_main, only_user_of
from ..settings import begun_with
from ..silence import PATIENCE, Patience, alone, report_progress, watched
from .checkpoint import read_progress, restore, save_checkpoint, surroundings, whole
from .folder import BadImages, Log, begin, find_run, leaving_out_the_tracker
from .launch import launch_summary, new_accelerator, peak_memory
from .reading import reader, rows_of, steps_from
from .step import RunResult, Task
from .terms import RunningTerms, SeenBatch, StepFlags, StepStatistics, report_not_finite, sum_gradients, sums_of

logger = logging.getLogger(__name__)


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
        accelerator = new_accelerator(task)
        task.config = replace(task.config, run=replace(run, mixed_precision=accelerator.mixed_precision))
        with only_user_of(Path(run.output_dir), "training in", "run.output_dir"):
            try:
                return _run(task, accelerator, signals, finish, patience)
            finally:
                with leaving_out_the_tracker(accelerator):
                    for tracker in accelerator.trackers:
                        tracker.finish()


def _run(task: Task, accelerator: Accelerator, signals: Signals, finish: bool, patience: Patience) -> RunResult | None:
    config = task.config
    run, output_dir = config.run, Path(config.run.output_dir)
    checkpoint, result = on_main(partial(find_task_run, task))
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
    interval, epoch_terms, step_terms = (RunningTerms(accelerator, task.terms) for _ in range(3))
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
        logger.info("%s; %s", task.summary(plain_model), launch_summary(accelerator, run))
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
    steps = partial(steps_from, train_set, run, accelerator, images_seen, total_images)
    reading = reader(train_set, steps(), task.workers, run.seed, accelerator.device, patience)
    with logging_redirect_tqdm(), bar, reading as read_next:
        model.train()
        pending: list[StepFlags] = []
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
            seen: list[SeenBatch] = []
            statistics = StepStatistics()
            for micro_step, micro_batch in enumerate(micro_batches, 1):
                with alone(f"reading for step {step + 1}"):
                    read = read_next(micro_batch)
                bad_images.judge(read, len(micro_batch.indices))
                share = micro_batch.share * len(read.kept) / len(micro_batch.indices)
                if not read.kept:  # every process must take part in the step
                    read = read.blank()
                rows = rows_of(micro_batch, read)
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
                    step_terms.add(sums_of(terms, len(read.kept)))
                    indices = [micro_batch.indices[place] for place in read.kept]
                    seen.append(SeenBatch(micro_batch.count, indices, read, own_draws, terms))
            grad_norm = _clip(accelerator, model, trained, config.optimizer.max_grad_norm)
            norms = {"gradient": grad_norm}
            if discriminator and terms.pair:
                sum_gradients(accelerator, discriminator.module)
                norms["discriminator's gradient"] = nn.utils.clip_grad_norm_(
                    discriminator.module.parameters(), config.optimizer.max_grad_norm or float("inf")
                )
            asked_here = signals.asked()
            pending.append(StepFlags(accelerator, step_terms, norms, asked_here, step + 1, seen))
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
                message = report_not_finite(task, accelerator, checked, skipped, bad)
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
        memory=peak_memory(accelerator.device),
        train_images=task.images,
        images_per_second=timed_images / timed_seconds if timed_images else None,
    )


def find_task_run(task: Task) -> tuple[Path | None, RunResult | None]:
    """Return the checkpoint and the result that `run.output_dir` holds, as `find_run` does."""
    return find_run(task.config, task.finished, task.build if task.builds_at_once else None)


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


SKIPS_IN_A_ROW = 20
