"""A run of an autoencoder, from settings to a trained, measured and pictured model."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from ..data import ImageSet
from ..engine import dry_run as trial
from ..engine.config import RunConfig, few_steps, kept_channels
from ..engine.folder import Log, check_whole, find_run, opened
from ..engine.launch import launched
from ..engine.loop import fit
from ..engine.state import TrainState
from ..engine.step import RunResult
from ..evaluation.compare import compare
from ..evaluation.evaluate import evaluate
from ..evaluation.figures import missed_target
from ..evaluation.report import EvaluationReport, FineTuning, read_report
from ..hub.card import write_card
from ..hub.run import ADAPTER
from ..images.ranges import ValueRange
from ..latents.statistics import describe_latents, image_set_statistics
from ..losses.objective import MEAN_LOSSES, VAEObjective
from ..messages import quoted, showable
from ..models import LATENT_PARTS, MLPVAE, VAE, load_autoencoder, weights_hash, without_adapters
from ..models.stock import ModelMixin
from ..processes import on_main
from ..reports.html import draw_report, report_html
from ..reports.wording import SETTINGS
from ..silence import PATIENCE, Patience
from ..storage import whole_folder, write_file
from .autoencoder_config import TrainConfig
from .autoencoder_data import Pretrained, RunData, load_run_data
from .autoencoder_step import STABLER, AutoencoderStep, autoencoder_of, blank_output, build_model

logger = logging.getLogger(__name__)


IMAGES_FOR_BFLOAT16 = 256
"""Smallest number of images per forward for which autocast speeds up an MLP (1.3 times on two cores)."""


@dataclass(frozen=True, kw_only=True)
class TrainResult(RunResult):
    """Result of the run of an autoencoder, whose folder also has model/, report.html and README.md (the card)."""

    report: EvaluationReport
    """Evaluation of the model in model/ on the held-out images."""


def train(
    config: TrainConfig,
    memory_limit: int | None = None,
    *,
    finish: bool = True,
    patience: Patience = PATIENCE,
    planned: RunConfig | None = None,
) -> TrainResult | None:
    """Train, evaluate and save an autoencoder on all processes of the launch. A run that `run.output_dir` already holds
    is continued.

    Args:
        config: settings of the run.
        memory_limit: see `load_data`.
        finish: whether to evaluate and save the model; otherwise the run ends with its last checkpoint.
        patience: time limits for silent processes, see `silence.watched`.
        planned: settings of the whole run, if this is a dry run of it.

    Returns:
        The result on the main process, None on the others or without `finish`.

    Raises:
        Interrupted: after SIGTERM, SIGINT, SIGUSR1 or SIGHUP.
        FileExistsError: if `run.output_dir` holds a run with other settings.
        FloatingPointError: if loss, gradient or result are not finite, before any result of that step is written.
        OSError: naming what cannot be read or written; TimeoutError if processes have not started or a worker is
            silent.
        ValueError: if settings and launcher contradict each other, or images cannot be read.
    """
    with (
        launched(config.run, partial(fast_in_bfloat16, config), patience) as launch,
        opened(config, launch, finished, build_model, temporary=planned is not None) as run,
    ):
        accelerator = launch.accelerator
        if run.result:
            return run.result if run.main else None
        data = load_run_data(run.config, accelerator, memory_limit, run.checkpoint)
        config = data.config
        step = AutoencoderStep(config, accelerator, data.verification)
        build = partial(build_model, config, device=accelerator.device)
        run.begin(config, data.fingerprints(), build)
        blank = partial(blank_output, config=config, device=accelerator.device)
        state = TrainState(accelerator, build, config, step.terms, blank, step.discriminator)
        if run.checkpoint:
            step.restore(state.load(run.checkpoint))
        log = Log(accelerator, run.output_dir, state.images_seen, run.checkpoint)
        length = (planned or config.run).total_images(data.images)
        run.announce(summary(state.plain_model, data), step.program, config.unreached(length), data.image_errors())
        with closing(fit(state, step, data.train_set, run, log, data.workers, config.evaluation.every)) as fitting:
            for progress in fitting:
                model = state.averaged()
                measure(_merged(autoencoder_of(model)), step.measured(model), data, log, progress)
        if not finish:
            return None
        result = finish_run(state.averaged(), step, data, log, state.progress())
        return run.complete(result, state.skipped, data.images, data.image_errors())


def dry_run(config: TrainConfig) -> tuple[RunResult, bool, float | None] | None:
    """Go through every phase of a run on two batches: see `engine.dry_run.dry_run`."""

    def try_out(folder: Path, finish: bool) -> TrainResult | None:
        return train(few(config, folder), 0, finish=finish, planned=config.run)

    find = partial(find_run, kept_channels(config), finished, build_model)
    return trial.dry_run(config.run, find, try_out)


def few(config: TrainConfig, folder: Path) -> TrainConfig:
    """Return settings for two batches in `folder`, with a minimal evaluation."""
    evaluation = replace(config.evaluation, max_images=config.evaluation.batch_size, every=None)
    return replace(config, run=few_steps(config.run, folder), evaluation=evaluation)


def finished(config: TrainConfig) -> TrainResult:
    """Return the result of the finished run in output_dir; ValueError naming a file that is missing or damaged."""
    output_dir = Path(config.run.output_dir)
    report = read_report(output_dir / "evaluation.json")
    check_whole(output_dir, ["report.html", "README.md", "evaluation.csv", "metrics.jsonl"])
    pictures = re.findall(r'<figure id="(\w+)">', (output_dir / "report.html").read_text(encoding="utf-8"))
    check_whole(output_dir / "pictures", (f"{name}.png" for name in pictures))
    if config.model.lora_rank:
        check_whole(output_dir / "lora", [ADAPTER])
    try:
        model = load_autoencoder(str(output_dir / "model"))
        stated = ValueRange.load(output_dir / "model")
    except OSError as error:
        raise ValueError(str(error)) from error
    if (found := weights_hash(model)) != (measured := report.model.weights_sha256):
        raise ValueError(
            f"{output_dir / 'model'} must hold the weights that were measured, SHA-256 {measured}, got {found}"
        )
    if stated != config.data.stated_range:
        raise ValueError(f"{output_dir / 'model'} must state data.value_range, got {stated}")
    return _result(config, report, model)


def fast_in_bfloat16(config: TrainConfig, device: torch.device) -> bool:
    """Return whether autocast makes steps faster, if `device` multiplies bfloat16 in hardware."""
    if config.model.architecture == "vae":
        return True
    run = config.run  # an MLP casts its weights in every forward, which costs as much as a small batch gains
    forwards = run.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", 1))
    return device.type == "cpu" and run.batch_size >= IMAGES_FOR_BFLOAT16 * forwards


def summary(model: nn.Module, run_data: RunData) -> str:
    """Describe model and data in one line, before the first step."""
    config = run_data.config
    data, autoencoder = config.data, autoencoder_of(model)
    assert data.channels is not None
    values = data.channels * data.size[0] * data.size[1]
    objective, adversarial = config.objective, config.adversarial
    when = f", after {objective.kl_warmup_images:,} images" if objective.kl_warmup_images else ""
    judged = f"; a discriminator after {adversarial.start_images:,} images" if adversarial.weight else ""
    all_of_them, trained = (autoencoder.num_parameters(only_trainable=only) for only in (False, True))
    per_value = objective.kl_weight_per_value(values)
    means = "" if per_value is None else f" (w = {per_value:.3g} in {MEAN_LOSSES[objective.likelihood]} + w * KL)"
    of = "" if trained == all_of_them else f" ({trained:,} are trained)"
    return (
        f"{type(autoencoder).__qualname__} with {all_of_them:,} parameters{of}, latents "
        f"{'x'.join(map(str, config.model.latent_shape(data.size)))}; {len(run_data.train_set):,} training and "
        f"{len(run_data.heldout):,} held-out images of {showable(data.described)} at "
        f"{'x'.join(map(str, data.size))}; kl_weight {objective.kl_weight:g}{means}{when}{judged}"
    )


def measure(
    model: VAE | MLPVAE,
    objective: VAEObjective,
    data: RunData,
    log: Log,
    progress: dict[str, int],
    change: Callable[[EvaluationReport], FineTuning] | None = None,
) -> tuple[EvaluationReport, dict[str, Image.Image]]:
    """Evaluate the model on the held-out images on all processes, and draw its pictures on the main process.

    Raises:
        FloatingPointError: if a figure is not finite.
    """
    config, settings = data.config, data.config.evaluation
    name, bar = Path(config.run.output_dir).resolve().name, data.accelerator.is_main_process
    report = evaluate(model, data.heldout, objective, settings, config.data, "held-out", name, bar)
    report = replace(report, target_rate=config.objective.target_rate)
    numbers = {key: value for key, value in vars(report).items() if isinstance(value, float) and key not in SETTINGS}
    if bad := [name for name, value in numbers.items() if not math.isfinite(value)]:
        raise FloatingPointError(f"training diverged, not finite on held-out images: {', '.join(bad)}. {STABLER}")
    log.write("evaluation", progress | numbers)
    if change:
        report = replace(report, fine_tuning=change(report))

    def draw() -> dict[str, Image.Image]:
        pictures = draw_report(model, data.heldout, log.path, settings, report)
        log.show(pictures, progress["images_seen"])
        return pictures

    pictures: dict[str, Image.Image] = {}
    on_main(lambda: pictures.update(draw()))
    return report, pictures


def finish_run(
    model: nn.Module, step: AutoencoderStep, data: RunData, log: Log, progress: dict[str, int]
) -> TrainResult:
    """Save the model before anything can fail. Then measure the latents, whose scaling goes into the model's config
    unless the encoder is a published one, and evaluate. evaluation.json is written last and marks the run as finished.
    """
    config, output_dir = data.config, Path(data.config.run.output_dir)
    objective, change = step.measured(model), None
    if data.verification:
        data.verification.finish()
    if config.model.lora_rank:
        on_main(lambda: _save_adapter(autoencoder_of(model), output_dir))
    model = _merged(autoencoder_of(model))

    def save() -> None:
        with whole_folder(output_dir / "model") as folder:
            model.save_pretrained(folder)
            if config.data.stated_range:
                config.data.stated_range.save(folder)

    if config.model.trains_encoder:
        describe_latents(model, None)  # what the config holds is the source's, or a default
    on_main(save)
    if config.model.trains_encoder:
        _measure_latents(model, data)
        on_main(save)
    if data.pretrained:
        base = data.pretrained.model.to(model.device)  # not read again: it may be another by now
        settings = (objective, config.evaluation, config.data, "held-out", data.pretrained.source)
        before = evaluate(base, data.heldout, *settings, data.accelerator.is_main_process)
        change = partial(_fine_tuning, config, data.pretrained, before)
    report, pictures = measure(model, objective, data, log, progress, change)

    def write() -> None:
        evaluation = report.to_json()
        write_file(output_dir / "evaluation.csv", report.measured.to_csv())
        write_file(output_dir / "report.html", report_html(json.loads(evaluation), pictures, report.model.name))
        write_card(output_dir, config.hub, json.loads(evaluation))
        write_file(output_dir / "evaluation.json", evaluation)

    on_main(write)
    missed = missed_target(vars(report))
    if missed and data.accelerator.is_main_process:
        logger.warning("%s", missed)
    return _result(config, report, model)


def _merged(model: VAE | MLPVAE) -> VAE | MLPVAE:
    """Return the model with adapters merged into its weights."""
    return without_adapters(model) if isinstance(model, VAE) else model


def _save_adapter(model: VAE | MLPVAE, output_dir: Path) -> None:
    with whole_folder(output_dir / "lora") as folder:
        model.save_lora_adapter(folder)


def _measure_latents(model: VAE | MLPVAE, data: RunData) -> None:
    """Measure the latents of the training images, and write their scaling into the model's config."""
    settings = data.config.evaluation
    bar = data.accelerator.is_main_process
    assert isinstance(data.train_set, ImageSet), "cached latents need a frozen encoder"
    statistics = image_set_statistics(model, data.train_set, settings.batch_size, settings.max_images, bar)
    try:
        describe_latents(model, statistics)
    except FloatingPointError as error:
        raise FloatingPointError(f"training diverged: {error}. {STABLER}") from error


def _fine_tuning(
    config: TrainConfig, pretrained: Pretrained, before: EvaluationReport, report: EvaluationReport
) -> FineTuning:
    """Return what the saved model has in common with the published one, and its gain over it.

    Raises:
        ValueError: if the encoder has changed although it was not trained.
    """
    saved = load_autoencoder(str(Path(config.run.output_dir) / "model"))
    hashes = [weights_hash(model, LATENT_PARTS) for model in (pretrained.model, saved)]
    if not config.model.trains_encoder and hashes[0] != hashes[1]:
        raise ValueError(
            f"the encoder was not trained, and must equal the encoder of {pretrained.source}, but it differs: "
            f"SHA-256 {hashes[1]} instead of {hashes[0]}"
        )
    differences = compare(before, report).differences if report.images > 1 else {}
    return FineTuning(
        source=pretrained.source,
        revision=pretrained.revision,
        weights_sha256=pretrained.weights_hash,
        encoder_sha256=hashes[1],
        latents_unchanged=hashes[0] == hashes[1],
        differences={name: [value.mean, *value.interval] for name, value in differences.items()},
        repository=pretrained.repository,
    )


def _result(config: TrainConfig, report: EvaluationReport, autoencoder: ModelMixin) -> TrainResult:
    folder = Path(config.run.output_dir) / "model"
    path = quoted(folder.absolute().as_posix())
    package, name = ("diffusers", "AutoencoderKL") if isinstance(autoencoder, VAE) else ("diffusers_vae", "MLPVAE")
    return TrainResult(
        output_dir=folder.parent,
        saved=folder.name,
        report=report,
        parameters=autoencoder.num_parameters(),
        latent_shape=config.model.latent_shape(config.data.size),
        load_line=f"from {package} import {name}; vae = {name}.from_pretrained({path})",
    )
