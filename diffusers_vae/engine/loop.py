"""The training loop: images in a fixed order, logs and checkpoints when they are due."""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..data import TrainingSet, step_generator
from ..processes import Interrupted, gather
from ..silence import alone, report_progress
from .folder import Log, Run
from .launch import SharedCores
from .reading import reader, rows_of, steps_from
from .state import TrainState
from .step import Step
from .terms import PendingSteps, RunningTerms, SeenBatch, StepFlags, StepStatistics, finite, report_not_finite, sums_of
from .whole_step import whole_step

logger = logging.getLogger(__name__)

SKIPS_IN_A_ROW = 20
"""Number of consecutive non-finite steps after which a run that skips them stops."""


class Every:
    """An event that is due whenever the images seen reach a multiple of `images`; never if that is None."""

    def __init__(self, images: int | None, images_seen: int):
        self.images = images or sys.maxsize
        self.advance(images_seen)

    def advance(self, images_seen: int) -> None:
        """Record that the event took place after `images_seen` images."""
        self.next = (images_seen // self.images + 1) * self.images


def fit(
    state: TrainState,
    step: Step,
    train_set: TrainingSet,
    run: Run[Any, Any],
    log: Log,
    workers: int = 0,
    measure_every: int | None = None,
) -> Generator[dict[str, int]]:
    """Train from the progress of `state` to the end of the run, save checkpoints, and yield when a measurement is due.

    Args:
        state: state of the run; it is updated in place.
        step: computes the losses.
        train_set: images in a fixed order.
        run: folder and settings of the run.
        log: records of the training.
        workers: number of processes that read images; 0: this process reads them.
        measure_every: number of images between two measurements.

    Yields:
        Numbers of epochs begun, steps taken and images seen, whenever a measurement is due before the end. The caller
        must not change the state, and must close the iterator if it does not exhaust it.

    Raises:
        FloatingPointError: if loss, gradient or weights are not finite, before any result of that step is written.
        Interrupted: after a checkpoint, if a process was asked to stop.
        OSError: naming what cannot be read or written.
        ValueError: if images cannot be read.
    """
    config, accelerator = run.config, state.accelerator
    settings = config.run
    checkpoint = run.checkpoint
    total_images = settings.total_images(len(train_set))
    logging_due, measuring_due, saving_due = (
        Every(images, state.images_seen) for images in (settings.log_every, measure_every, settings.checkpoint_every)
    )
    whole = whole_step(settings, state, step, config.optimizer.max_grad_norm)
    cores = SharedCores(accelerator.device.type == "cpu" and not settings.deterministic)
    step_terms, pending = RunningTerms(accelerator, step.terms), PendingSteps()
    bar = tqdm(
        total=total_images,
        initial=min(state.images_seen, total_images),
        unit="img",
        disable=not accelerator.is_local_main_process,
        dynamic_ncols=True,
    )
    run.launch.signals.wait = True  # the loop asks after every step
    steps = steps_from(train_set, settings, accelerator, state.images_seen, total_images)
    reading = reader(train_set, steps, workers, settings.seed, accelerator.device, run.launch.patience)
    with logging_redirect_tqdm(), bar, reading as (steps, read_next):
        state.model.train()
        for epoch, start, micro_batches in steps:
            report_progress(f"step {state.step + 1}")
            count = micro_batches[0].count
            reached = state.images_seen + count
            run.speed.begin_step()
            epoch_end = min((epoch + 1) * len(train_set), total_images)
            learning_rate = config.optimizer.learning_rate_at(state.images_seen, total_images)
            state.begin_step(learning_rate)
            readings = step.begin(state.images_seen, total_images, learning_rate)
            inputs = step.random_inputs(count, step_generator(settings.seed, epoch, start, accelerator.device))
            seen: list[SeenBatch] = []
            statistics, terms, taken = StepStatistics(), None, None
            for micro_step, micro_batch in enumerate(micro_batches, 1):
                with alone(f"reading for step {state.step + 1}"):
                    read = read_next(micro_batch)
                run.bad_images.judge(read, len(micro_batch.indices))
                share = micro_batch.share * len(read.kept) / len(micro_batch.indices)
                if not read.kept:  # every process must take part in the step
                    read = read.blank()
                rows = rows_of(micro_batch, read)
                own_inputs = {name: values[rows] for name, values in inputs.items()}
                batch = step.batch(read, own_inputs)
                if whole and whole.takes(len(read.kept)):
                    taken = whole(batch)
                if taken:
                    terms = taken[0]
                else:
                    with state.synchronised(micro_step == len(micro_batches)):
                        terms = state.backward(step(state.model, batch), share)
                statistics.add(terms.statistics, share)
                if share:
                    step_terms.add(sums_of(terms, len(read.kept)))
                    seen.append(SeenBatch(micro_batch, read, own_inputs, terms))
            assert terms, "every process has a micro-batch of each step"
            judged = terms.discriminator_loss is not None
            norms = taken[1] if taken else state.clip(config.optimizer.max_grad_norm, judged)
            asked = run.launch.signals.asked()
            # The check of a step is read one step later, so that the device does not wait; only a step that writes
            # something, or on which the next depends, is checked at once.
            at_once = reached >= min(logging_due.next, measuring_due.next, saving_due.next, epoch_end) or (
                settings.on_nonfinite == "skip" or statistics.sums or state.discriminator or accelerator.scaler
            )
            stop = asked and accelerator.num_processes == 1
            flags = StepFlags(accelerator, step_terms, norms, asked, state.step + 1, seen)
            flags, bad, empty, asked = pending.check(flags, bool(at_once or stop))
            stop = stop or asked
            if empty:
                raise ValueError(
                    f"training stopped: no image of step {flags.step} can be read. {run.bad_images.advice}"
                )
            if bad and not state.is_float16_overflow(bad):
                message = report_not_finite(train_set, run.output_dir, flags, state.skipped, bad)
                if settings.on_nonfinite == "stop" or state.skipped_in_a_row + 1 >= SKIPS_IN_A_ROW:
                    message += f". The newest checkpoint is {checkpoint}" if checkpoint else ""
                    raise FloatingPointError(f"training stopped before step {message}. {step.advice}")
                if run.main:
                    logger.warning("skipped step %s", message)
                state.skip_step()
            else:
                if taken or state.take_step(judged):
                    step.end(statistics.means(accelerator), count)
                state.interval.add(step_terms.sums)
                state.epoch_terms.add(step_terms.sums)
                state.skipped_in_a_row = 0
            state.zero_grad()
            step_terms.sums.zero_()

            run.speed.end_step(count)
            state.changes += cores.adjusted()
            state.epoch, state.step, state.images_seen = epoch + 1, state.step + 1, reached
            bar.update(min(reached, total_images) - bar.n)
            state.interval.show(bar)
            counts = state.progress() | ({"skipped": state.skipped} if state.skipped else {})
            if reached >= logging_due.next or reached >= total_images:
                readings |= {name: value.item() for name, value in terms.readings.items()}
                readings |= {"learning_rate": learning_rate, "grad_norm": finite(norms["gradient"])}
                log.write("train", counts | state.interval.take() | readings)
                logging_due.advance(reached)
            if reached >= epoch_end:
                _log_epoch(epoch + 1, counts, state.epoch_terms.take(), log, run.main)
            if measuring_due.next <= reached < total_images:
                report_progress(f"the evaluation after step {state.step}")
                yield state.progress()
                measuring_due.advance(reached)
                stop = stop or (accelerator.num_processes == 1 and run.launch.signals.asked())
            if reached >= saving_due.next or reached >= total_images or stop:
                checkpoint = _save(state, step, run, log)
                saving_due.advance(reached)
            if stop:
                raise _interrupted(run, reached, total_images, checkpoint)
    if any(gather(run.launch.signals.asked())):
        raise _interrupted(run, state.images_seen, total_images, checkpoint)
    run.launch.signals.wait = False  # all that follows can be done again from the checkpoint
    report_progress("the end of the run")
    if state.images_seen >= total_images + settings.batch_size and run.main:
        logger.warning(
            "%d images were seen already, more than the %d that are asked for", state.images_seen, total_images
        )


def _interrupted(run: Run[Any, Any], images_seen: int, total_images: int, checkpoint: Path | None) -> Interrupted:
    reason = run.launch.signals.reason or "as another process was"
    return Interrupted(
        f"asked to stop ({reason}) after {images_seen:,} of {total_images:,} images; saved as {checkpoint}. The same "
        "command continues"
    )


def _log_epoch(epoch: int, counts: dict[str, int], means: dict[str, float | None], log: Log, main: bool) -> None:
    log.write("epoch", counts | means)
    if main:
        text = "  ".join(f"{name} {value:.4f}" for name, value in means.items() if value is not None)
        logger.info("epoch %d: %s", epoch, text)


def _save(state: TrainState, step: Step, run: Run[Any, Any], log: Log) -> Path:
    report_progress(f"saving after step {state.step}")
    if run.main:
        log.restore()
    copies = [run.output_dir / "config.yaml", run.output_dir / "data.json", log.path]
    checkpoint = state.save(run.output_dir / "checkpoints", step.state(), copies, run.config.run.keep_checkpoints)
    log.saved(checkpoint)
    return checkpoint
