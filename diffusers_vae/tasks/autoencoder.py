"""A run of an autoencoder, from settings to a trained, measured and pictured model."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from ..data import ImageSet, ReadImages, StoredImages, TrainingSet, load_data, refuse_colours
from ..engine.checkpoint import Discriminator
from ..engine.config import few_steps, kept_channels
from ..engine.folder import Log, check_whole
from ..engine.loop import run_task
from ..engine.step import RunResult, StepTerms, Task
from ..evaluation.compare import compare
from ..evaluation.evaluate import evaluate, load_judges
from ..evaluation.figures import missed_target
from ..evaluation.report import EvaluationReport, FineTuning, read_report
from ..hub.card import write_card
from ..hub.run import ADAPTER
from ..images.ranges import ValueRange, to_model_range
from ..latents.dataset import LatentDataset, Verification, matching_latents
from ..latents.statistics import describe_latents, image_set_statistics
from ..losses import equivariance
from ..losses.adversarial import BETAS, Adversary, PatchDiscriminator
from ..losses.objective import MEAN_LOSSES, START_SCALE, VAEObjective
from ..losses.perceptual import PerceptualLoss
from ..losses.training_objective import TrainingObjective
from ..messages import quoted, showable
from ..models import (
    LATENT_PARTS,
    MLPVAE,
    VAE,
    find_repository,
    load_autoencoder,
    speed_up_norms,
    weights_hash,
    without_adapters,
)
from ..models.value_range import check_value_range
from ..processes import on_main, one_first
from ..reports.html import draw_report, report_html
from ..reports.wording import SETTINGS
from ..settings import begun_with
from ..storage import whole_folder, write_file
from .autoencoder_config import TrainConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainResult(RunResult):
    """What the run of an autoencoder leaves behind: model/, report.html and README.md (the card), too."""

    report: EvaluationReport
    """Of the model in model/, on the held-out images."""


def train(config: TrainConfig, memory_limit: int | None = None) -> TrainResult | None:
    """Train, evaluate and save as `config` says, and continue the run in `run.output_dir`: see `run_task`.

    `memory_limit` is that of `load_data`.
    """
    return run_task(AutoencoderTask(config, memory_limit))


STEPS_TO_COMPILE = 10_000
"""From which torch.compile, which takes some 10 to 30 seconds on two cores, saves more time than that."""
IMAGES_FOR_BFLOAT16 = 256
"""In a forward, from which a perceptron gains by autocast: on two cores 1.3 times the images/s, with 128 none."""
STABLER = (
    "To make training more stable, lower optimizer.learning_rate or raise optimizer.warmup_images or objective.scale"
)


class WithScale(nn.Module):
    """An autoencoder and the learned scale of its likelihood as one module: gradients are synchronised by one call of
    `forward`.
    """

    FASTER = 10.0
    """Adam moves every parameter by about the learning rate a step: by that, a scale would need 700 steps to halve."""

    def __init__(self, autoencoder: VAE | MLPVAE):
        super().__init__()
        self.autoencoder = autoencoder
        self.slow_log_scale = nn.Parameter(torch.full([1], math.log(START_SCALE) / self.FASTER))  # FSDP2: no scalar

    @property
    def log_scale(self) -> torch.Tensor:
        """The natural logarithm of the scale, a scalar."""
        return self.FASTER * self.slow_log_scale[0]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """What the autoencoder gives, and log_scale."""
        return (*self.autoencoder(*args, **kwargs), self.log_scale)


@dataclass(frozen=True)
class _Encoded(ReadImages):
    """Images with the moments of their posteriors, (B, 2 C, h, w)."""

    moments: torch.Tensor | None = None

    def blank(self) -> _Encoded:
        return _Encoded(**vars(super().blank()), moments=self.moments.new_zeros(1, *self.moments.shape[1:]))

    def tensors(self) -> dict[str, torch.Tensor]:
        return super().tensors() | {"moments": self.moments}


class EncodedImages(TrainingSet):
    """Images with latents that were encoded before: what a decoder alone is trained on."""

    def __init__(self, images: ImageSet, latents: LatentDataset):
        self.images, self.latents = images, latents
        self.rows = {index: row for row, index in enumerate(latents.indices.tolist())}

    @property
    def errors(self) -> tuple[str, ...]:
        return self.images.errors

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        return self.images.fingerprint()

    def contents(self) -> str | None:
        return self.images.contents()

    def __getitems__(self, indices: Sequence[int]) -> _Encoded:
        read = self.images.__getitems__(indices)
        found = [row for row, place in enumerate(read.kept) if indices[place] in self.rows]  # another read them once
        kept, pixels = [read.kept[row] for row in found], read.pixels[found]
        moments = self.latents.moments([self.rows[indices[place]] for place in kept])
        return _Encoded(pixels, kept, read.errors, read.stop, read.unreachable, moments)

    def name(self, index: int) -> str:
        return self.images.name(index)


def _autoencoder(model: nn.Module) -> VAE | MLPVAE:
    return model.autoencoder if isinstance(model, WithScale) else model


def _saved(model: nn.Module) -> VAE | MLPVAE:
    """What the run leaves behind of what it trains: adapters are merged into the weights."""
    autoencoder = _autoencoder(model)
    return without_adapters(autoencoder) if isinstance(autoencoder, VAE) else autoencoder


class AutoencoderTask(Task):
    """Training of a KL autoencoder, for the loop."""

    advice = STABLER
    builds_at_once = True

    def __init__(self, config: TrainConfig, memory_limit: int | None = None):
        self.config, self.memory_limit = kept_channels(config), memory_limit
        self.objective = TrainingObjective(config.objective)
        self.evaluate_every = config.evaluation.every
        self.perceptual: PerceptualLoss | None = None
        self.adversary: Adversary | None = None
        self.terms = ("distortion", "rate")
        self.terms += ("perceptual",) if config.objective.perceptual else ()
        self.terms += ("generator", "discriminator") if config.adversarial.weight else ()

    def finished(self) -> TrainResult:
        output_dir = Path(self.config.run.output_dir)
        report = read_report(output_dir / "evaluation.json")
        check_whole(output_dir, ["report.html", "README.md", "evaluation.csv", "metrics.jsonl"])
        pictures = re.findall(r'<figure id="(\w+)">', (output_dir / "report.html").read_text(encoding="utf-8"))
        check_whole(output_dir / "pictures", (f"{name}.png" for name in pictures))
        if self.config.model.lora_rank:
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
        if stated != (self.config.data.value_range and ValueRange(*self.config.data.value_range)):
            raise ValueError(f"{output_dir / 'model'} must state data.value_range, got {stated}")
        return self._result(report, model)

    def load(self, accelerator: Accelerator) -> None:
        config = self.config
        forwards = accelerator.num_processes * config.run.gradient_accumulation_steps
        if forwards % config.objective.transformations:
            raise ValueError(
                "the number of processes times run.gradient_accumulation_steps must be a multiple of "
                f"objective.transformations, {config.objective.transformations}, since the images of a forward share a "
                f"transformation, got {accelerator.num_processes} x {config.run.gradient_accumulation_steps}"
            )
        if config.data.streaming and config.data.lanes is None:
            begun = on_main(lambda: begun_with(config.run.output_dir, "data", "lanes"))
            lanes = tuple(begun or (forwards, max(1, config.data.num_workers)))
            config = self.config = replace(config, data=replace(config.data, lanes=lanes))
        if config.data.streaming and accelerator.is_main_process:
            self._warn_of_another_order()
        with one_first(accelerator.is_local_main_process, "reading the data set"):
            self.train_set, self.heldout = load_data(config.data, accelerator.is_local_main_process, self.memory_limit)
        if accelerator.is_main_process:
            logger.info("%s", showable(self.train_set.files))
        if config.data.channels is None and config.model.pretrained:
            refuse_colours(self.train_set, config.data, config.model.pretrained)
        config = self.config = replace(config, data=replace(config.data, channels=self.train_set.channels))
        load_judges(config.evaluation, config.data.channels, config.data.size)  # are missed now, not after days
        on_demand = isinstance(self.train_set, StoredImages) or self.train_set.augmentation
        self.workers = config.data.num_workers if on_demand else 0
        if not on_demand and accelerator.device.type == "cuda":
            free = torch.cuda.mem_get_info(accelerator.device)[0]
            if self.train_set.pixels.nbytes <= free / 8:  # a step then copies nothing but its indices
                self.train_set = self.train_set.to(accelerator.device)
        if config.model.pretrained:
            self._load_for_fine_tuning()
        self.accelerator, self.images = accelerator, len(self.train_set)
        if accelerator.is_fsdp2 and config.adversarial.weight and config.adversarial.adaptive:
            raise ValueError(
                "adversarial.adaptive needs the decoder's last layer whole on every process, which FSDP2 cuts up; let "
                "the processes work together by DDP, or set it to false"
            )
        if config.objective.perceptual:
            self.perceptual = PerceptualLoss(config.objective.perceptual)
            self.perceptual.check(config.smallest_size)
            self.perceptual.to(accelerator.device)

    def _warn_of_another_order(self) -> None:
        """Where `run.allow_config_change` lets a stream go on with settings that decide its order."""
        data, run = self.config.data, self.config.run
        now = {"data.lanes": list(data.lanes), "data.shuffle_buffer": data.shuffle_buffer}
        for name, value in (now | {"run.batch_size": run.batch_size}).items():
            begun = begun_with(run.output_dir, *name.split("."))
            if begun not in (None, value):
                logger.warning(
                    "the order of a stream depends on %s, %s -> %s: where the run goes on within an epoch, some images "
                    "are seen twice in it and others not at all",
                    name,
                    begun,
                    value,
                )

    def gains_by_bfloat16(self, device: torch.device) -> bool:
        if self.config.model.architecture == "vae":
            return True
        run = self.config.run  # whose weights are cast at every forward, which takes as long as small ones gain
        forwards = run.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", 1))
        return device.type == "cpu" and run.batch_size >= IMAGES_FOR_BFLOAT16 * forwards

    def compiles(self) -> bool:
        run, device = self.config.run, self.accelerator.device
        steps = run.total_images(self.images) / run.batch_size
        pays = device.type == "cuda" or (device.type == "cpu" and self.config.model.architecture == "mlp")
        if not pays or steps < STEPS_TO_COMPILE or run.deterministic or self.config.changes_by_step:
            return False
        try:
            torch.compile(lambda images: images.exp() + 1)(torch.ones(8, device=device))
        except Exception as error:  # no compiler, no headers, no Triton, too old a GPU: each has an error of its own
            reason = str(error).strip().partition("\n")[0]
            logger.warning("torch.compile does not work here, so the run goes without: %s", reason)
            return False
        return True

    def _load_for_fine_tuning(self) -> None:
        model = self.config.model
        pretrained = load_autoencoder(model.pretrained, model.subfolder, model.revision)
        check_value_range(self.config.data.value_range, model.pretrained, model.subfolder, model.revision)
        self.pretrained, self.pretrained_hash = pretrained, weights_hash(pretrained)
        self.repository, self.revision = find_repository(model.pretrained, model.revision)
        if model.latents:
            described = f"training images of {self.config.data.described}"
            latents = matching_latents(pretrained, self.train_set, model.latents, described)
            if latents.kind != "posterior":
                raise ValueError(
                    f"model.latents needs mean and logvar, and {model.latents} holds latents of kind {latents.kind}: "
                    "encode with --kind posterior"
                )
            self.train_set = EncodedImages(self.train_set, latents)
            self.verification = Verification(latents)

    def data(self) -> dict[str, dict[str, Any]]:
        return {
            name: {"images": len(part), "fingerprint": part.fingerprint()}
            | ({"contents": contents} if (contents := part.contents()) else {})
            for name, part in (("training", self.train_set), ("held-out", self.heldout))
        } | ({"pretrained autoencoder": {"fingerprint": self.pretrained_hash}} if self.config.model.pretrained else {})

    def image_errors(self) -> Iterator[str]:
        yield from self.train_set.errors
        yield from self.heldout.errors

    def build(self) -> nn.Module:
        model = speed_up_norms(self.config.model.build(self.config.data.channels, self.config.data.size))
        if self.config.run.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return WithScale(model) if self.config.objective.scale == "learned" else model

    def blank(self, model: nn.Module, device: torch.device) -> torch.Tensor:
        images = torch.zeros(1, self.config.data.channels, *self.config.data.size, device=device)
        return sum(output.sum() for output in model(images, sample_posterior=True, return_dict=False))

    def build_discriminator(self, device: torch.device) -> Discriminator | None:
        config = self.config.adversarial
        if not config.weight:
            return None
        module = PatchDiscriminator(self.config.data.channels, config.width, config.layers, config.norm).to(device)
        self.adversary = Adversary(config, module)
        self.discriminator_optimizer = torch.optim.AdamW(module.parameters(), betas=BETAS, weight_decay=0.0)
        return Discriminator(module, self.discriminator_optimizer)

    def begin_step(self, images_seen: int, total_images: int, learning_rate: float) -> dict[str, float]:
        readings = self.objective.begin_step(images_seen, total_images)
        if self.adversary:
            readings |= self.adversary.begin_step(images_seen)
            highest = self.config.optimizer.learning_rate
            own = (self.config.adversarial.learning_rate or highest) * learning_rate / highest * self.adversary.rise
            for group in self.discriminator_optimizer.param_groups:
                group["lr"] = own
        return readings

    def draws(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        shape = self.config.model.latent_shape(self.config.data.size)
        drawn = {"noise": torch.randn(count, *shape, generator=generator, device=generator.device)}
        if self.config.objective.equivariance:
            # The same for all images of a part; on the CPU, which decides by them without waiting for the device. Parts
            # of a whole batch are made of whole micro-batches. A smaller one, at the end of an epoch, is one part: how
            # its images are cut depends on the number of forwards.
            parts = self.config.objective.transformations if count == self.config.run.batch_size else 1
            own = torch.Generator().manual_seed(generator.initial_seed() ^ 1)
            chances = torch.rand(parts, equivariance.DRAWS, generator=own)
            drawn["chances"] = chances.repeat_interleave(count // parts, 0)
        return drawn

    def step(self, model: nn.Module, read: ReadImages, draws: dict[str, torch.Tensor]) -> StepTerms:
        noise, keywords = draws["noise"], {}
        pixels = read.pixels.to(noise.device, non_blocking=True)
        before = after = None
        if "chances" in draws:
            ratio = self.config.model.spatial_compression_ratio
            probability = self.config.objective.equivariance
            before, after = equivariance.draw(draws["chances"][0], probability, tuple(noise.shape[-2:]), ratio)
        if before:
            noise = noise[..., : before.size[0], : before.size[1]]
        if isinstance(read, _Encoded):
            self.verification.check()
            keywords["moments"] = read.moments.to(noise.device, non_blocking=True)
        images, reconstructions, terms, log_scale = self._program(model, pixels, noise, before, after, **keywords)
        step = StepTerms(
            terms.loss,
            {"distortion": terms.distortion, "rate": terms.rate},
            statistics=dict(terms.statistics),
            readings={} if log_scale is None else {"scale": log_scale.detach().exp()},
        )
        if self.perceptual:
            distance = self.perceptual(images, reconstructions)
            step.per_image["perceptual"] = distance
            weight = self.config.objective.perceptual_weight * images[0].numel()
            step = replace(step, network_loss=weight * distance.mean())
        if self.adversary:
            step.per_image.update(dict.fromkeys(("generator", "discriminator"), torch.zeros_like(terms.rate)))
        if self.adversary and self.adversary.active:
            autoencoder = _autoencoder(self.accelerator.unwrap_model(model))
            step = self._judged(step, images, reconstructions, autoencoder, images.numel() / pixels.numel())
        return step

    @cached_property
    def _program(self) -> Callable[..., tuple[Any, ...]]:
        """`_forward`, compiled if the run is."""
        if not self.config.run.compile:
            return self._forward
        from torch import _dynamo  # which takes a second to import

        # a program for each size of batch: one for all sizes would take over as soon as it is there, and round
        # otherwise, so that a run would depend on where it was interrupted
        _dynamo.config.recompile_limit = 64
        return torch.compile(self._forward, dynamic=False)

    def _forward(
        self,
        model: nn.Module,
        pixels: torch.Tensor,
        noise: torch.Tensor,
        before: equivariance.Transformation | None,
        after: equivariance.Transformation | None,
        **keywords: torch.Tensor,
    ) -> tuple[Any, ...]:
        """Images, reconstructions, terms of the objective and log_scale (None unless it is learned)."""
        images = to_model_range(pixels)
        if before:
            images = before.images(images)
        if after:
            keywords["transform"] = after.latents
        if bernoulli := self.config.objective.likelihood == "bernoulli":
            keywords["return_logits"] = True
        reconstructions, posterior, *others = model(
            images, return_dict=False, return_posterior=True, noise=noise, **keywords
        )
        if after:
            images = after.images(images)
        size = images.numel() / pixels.numel()
        named = {"logits" if bernoulli else "log_scale": others[0]} if others else {}
        terms = self.objective(images, reconstructions, posterior, **named, encoded_whole=before is None, size=size)
        return images, reconstructions, terms, named.get("log_scale")

    def _judged(
        self, step: StepTerms, images: torch.Tensor, reconstructions: torch.Tensor, model: VAE, size: float
    ) -> StepTerms:
        """The step with what the discriminator makes of it."""
        with self.accelerator.autocast():
            judgement = self.adversary.generator_loss(reconstructions)
        step.per_image["generator"] = judgement
        added = self.adversary.weight_for(size) * judgement.mean()
        gradients = self.adversary.gradients(step.total_loss, judgement.mean(), model.decoder.conv_out.weight, size)
        return replace(
            step,
            network_loss=added if step.network_loss is None else step.network_loss + added,
            statistics=step.statistics | gradients,
            pair=(images, reconstructions.detach()),
        )

    def discriminate(self, terms: StepTerms) -> StepTerms:
        with self.accelerator.autocast():
            loss, statistics = self.adversary.discriminator_loss(*terms.pair)
        return replace(
            terms,
            discriminator_loss=loss.mean(),
            per_image=terms.per_image | {"discriminator": loss},
            statistics=terms.statistics | statistics,
        )

    def end_step(self, statistics: dict[str, torch.Tensor], images: int) -> None:
        self.objective.end_step(statistics, images)
        if self.adversary:
            self.adversary.end_step(statistics)

    def state(self) -> dict[str, Any]:
        return {
            "objective": self.objective.state(),
            "adversary": self.adversary.state() if self.adversary else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        known, kept = state.get("objective", {}), self.objective.state()
        self.objective.restore(known)
        if known.keys() != kept.keys() and self.accelerator.is_main_process:  # run.allow_config_change let them change
            keys = kept.keys() - known.keys(), known.keys() - kept.keys()
            new, gone = (", ".join(sorted(names)) or "nothing" for names in keys)
            logger.warning(
                "the checkpoint is of other settings of the objective: of what it remembers from step to step, %s "
                "begins anew, and %s is forgotten",
                new,
                gone,
            )
        if self.adversary and state.get("adversary"):
            self.adversary.restore(state["adversary"])

    def summary(self, model: nn.Module) -> str:
        data, autoencoder = self.config.data, _autoencoder(model)
        values = data.channels * data.size[0] * data.size[1]
        objective, adversarial = self.config.objective, self.config.adversarial
        when = f", after {objective.kl_warmup_images:,} images" if objective.kl_warmup_images else ""
        judged = f"; a discriminator after {adversarial.start_images:,} images" if adversarial.weight else ""
        all_of_them, trained = (autoencoder.num_parameters(only_trainable=only) for only in (False, True))
        compiled = ", compiled" if self.config.run.compile else ""
        per_value = objective.kl_weight_per_value(values)
        means = "" if per_value is None else f" (w = {per_value:.3g} in {MEAN_LOSSES[objective.likelihood]} + w * KL)"
        of = "" if trained == all_of_them else f" ({trained:,} are trained)"
        return (
            f"{type(autoencoder).__qualname__} with {all_of_them:,} parameters{of}{compiled}, latents "
            f"{'x'.join(map(str, self.config.model.latent_shape(data.size)))}; {len(self.train_set):,} training and "
            f"{len(self.heldout):,} held-out images of {showable(data.described)} at "
            f"{'x'.join(map(str, data.size))}; kl_weight {objective.kl_weight:g}{means}{when}{judged}"
        )

    def unreached(self, total_images: int) -> list[str]:
        sections = (self.config.optimizer, self.config.objective, self.config.adversarial)
        return [sentence for section in sections for sentence in section.unreached(total_images)]

    def evaluate(
        self, model: nn.Module, log: Log, progress: dict[str, int]
    ) -> tuple[EvaluationReport, dict[str, Image.Image]]:
        """Measure `model` on all processes, and picture it on the main process."""
        return self._evaluate(_saved(model), self._measured(model), log, progress)

    def _measured(self, model: nn.Module) -> VAEObjective:
        """By which likelihood and kl_weight the model is measured: those that training has come to."""
        return self.objective.measured(model.log_scale.item() if isinstance(model, WithScale) else None)

    def _evaluate(
        self,
        model: VAE | MLPVAE,
        objective: VAEObjective,
        log: Log,
        progress: dict[str, int],
        change: Callable[[EvaluationReport], FineTuning] | None = None,
    ) -> tuple[EvaluationReport, dict[str, Image.Image]]:
        config, settings = self.config, self.config.evaluation
        name, bar = Path(config.run.output_dir).resolve().name, self.accelerator.is_main_process
        report = evaluate(model, self.heldout, objective, settings, config.data, "held-out", name, bar)
        report = replace(report, target_rate=config.objective.target_rate)
        numbers = {
            key: value for key, value in vars(report).items() if isinstance(value, float) and key not in SETTINGS
        }
        if bad := [name for name, value in numbers.items() if not math.isfinite(value)]:
            raise FloatingPointError(f"training diverged, not finite on held-out images: {', '.join(bad)}. {STABLER}")
        log.write("evaluation", progress | numbers)
        if change:
            report = replace(report, fine_tuning=change(report))

        def draw() -> dict[str, Image.Image]:
            pictures = draw_report(model, self.heldout, log.path, settings, report)
            log.show(pictures, progress["images_seen"])
            return pictures

        pictures: dict[str, Image.Image] = {}
        on_main(lambda: pictures.update(draw()))
        return report, pictures

    def finish(self, model: nn.Module, log: Log, progress: dict[str, int]) -> TrainResult:
        """Save the model before anything that could fail, then measure: latents, which go into its config unless the
        encoder is a published one, and images. evaluation.json comes last: it says that the run is finished.
        """
        config, output_dir = self.config, Path(self.config.run.output_dir)
        objective, change = self._measured(model), None
        if config.model.latents:
            self.verification.finish()
        if config.model.lora_rank:
            on_main(lambda: self._save_adapter(_autoencoder(model)))
        model = _saved(model)

        def save() -> None:
            with whole_folder(output_dir / "model") as folder:
                model.save_pretrained(folder)
                if config.data.value_range is not None:
                    ValueRange(*config.data.value_range).save(folder)

        if config.model.trains_encoder:
            describe_latents(model, None)  # what the config holds is the source's, or a default
        on_main(save)
        if config.model.trains_encoder:
            self._measure_latents(model)
            on_main(save)
        if config.model.pretrained:
            base = self.pretrained.to(model.device)  # not read again: it may be another by now
            settings = (objective, config.evaluation, config.data, "held-out", config.model.pretrained)
            before = evaluate(base, self.heldout, *settings, self.accelerator.is_main_process)
            change = partial(self._fine_tuning, base, before)
        report, pictures = self._evaluate(model, objective, log, progress, change)

        def write() -> None:
            evaluation = report.to_json()
            write_file(output_dir / "evaluation.csv", report.per_image.to_csv())
            write_file(output_dir / "report.html", report_html(json.loads(evaluation), pictures, report.model.name))
            write_card(output_dir, config.hub, json.loads(evaluation))
            write_file(output_dir / "evaluation.json", evaluation)

        on_main(write)
        missed = missed_target(vars(report))
        if missed and self.accelerator.is_main_process:
            logger.warning("%s", missed)
        return self._result(report, model)

    def _save_adapter(self, model: VAE) -> None:
        with whole_folder(Path(self.config.run.output_dir) / "lora") as folder:
            model.save_lora_adapter(folder)

    def _measure_latents(self, model: VAE | MLPVAE) -> None:
        """Measure the latents of the training images and write what describes them into the model's config."""
        settings = self.config.evaluation
        bar = self.accelerator.is_main_process
        statistics = image_set_statistics(model, self.train_set, settings.batch_size, settings.max_images, bar)
        try:
            describe_latents(model, statistics)
        except FloatingPointError as error:
            raise FloatingPointError(f"training diverged: {error}. {STABLER}") from error

    def _fine_tuning(self, base: VAE, before: EvaluationReport, report: EvaluationReport) -> FineTuning:
        """What the saved model has in common with the published one, and by what it is better.

        Raises:
            ValueError: when the encoder, which was not trained, is not what it was.
        """
        config = self.config.model
        saved = load_autoencoder(str(Path(self.config.run.output_dir) / "model"))
        hashes = [weights_hash(model, LATENT_PARTS) for model in (base, saved)]
        if not config.trains_encoder and hashes[0] != hashes[1]:
            raise ValueError(
                f"the encoder must be that of {config.pretrained}, since it was not trained, and its weights are "
                f"others: SHA-256 {hashes[1]}, and there {hashes[0]}"
            )
        differences = compare(before, report).differences if report.images > 1 else {}
        return FineTuning(
            source=config.pretrained,
            revision=self.revision,
            weights_sha256=self.pretrained_hash,
            encoder_sha256=hashes[1],
            latents_unchanged=hashes[0] == hashes[1],
            differences={name: [value.mean, *value.interval] for name, value in differences.items()},
            repository=self.repository,
        )

    def few(self, folder: Path) -> AutoencoderTask:
        config = self.config
        evaluation = replace(config.evaluation, max_images=config.evaluation.batch_size, every=None)
        return AutoencoderTask(replace(config, run=few_steps(config.run, folder), evaluation=evaluation), 0)

    def _result(self, report: EvaluationReport, model: nn.Module) -> TrainResult:
        folder = Path(self.config.run.output_dir) / "model"
        autoencoder = _autoencoder(model)
        place = quoted(folder.absolute().as_posix())
        package, name = ("diffusers", "AutoencoderKL") if isinstance(autoencoder, VAE) else ("diffusers_vae", "MLPVAE")
        return TrainResult(
            output_dir=folder.parent,
            saved=folder.name,
            report=report,
            parameters=autoencoder.num_parameters(),
            latent_shape=self.config.model.latent_shape(self.config.data.size),
            load_line=f"from {package} import {name}; vae = {name}.from_pretrained({place})",
        )
