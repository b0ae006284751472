"""A run of an autoencoder, from settings to a trained, measured and pictured model."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from .checkpoint import on_main, whole_folder, write_file
from .data import DataConfig, FolderImages, ReadImages, load_data
from .evaluation import EvaluationConfig, EvaluationReport, evaluate, load_judges
from .hub import HubConfig, write_card
from .images import to_model_range
from .latents import measure_latents
from .loop import OptimizerConfig, RunConfig, RunResult, StepTerms, few_steps, run_task
from .models import MLPVAE, VAE, ModelConfig
from .objective import ObjectiveConfig
from .report import draw_report, report_html
from .run_folder import Log, Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
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


@dataclass(frozen=True, kw_only=True)
class TrainResult(RunResult):
    """What the run of an autoencoder leaves behind: model/, report.html and README.md (the card), too."""

    report: EvaluationReport
    """Of the model in model/, on the held-out images."""


def train(config: TrainConfig, memory_limit: int | None = None) -> TrainResult | None:
    """Train, evaluate and save as `config` says, and continue the run that `run.output_dir` holds: `loop.run_task`.

    `memory_limit` is that of `load_data`.
    """
    return run_task(AutoencoderTask(config, memory_limit))


STABLER = (
    "More stable are a lower optimizer.learning_rate, a longer optimizer.warmup_images, a lower "
    "optimizer.max_grad_norm or a larger objective.scale"
)


class AutoencoderTask:
    """Training of a KL autoencoder, for the loop."""

    results = ("model", "evaluation.json")
    terms = ("distortion", "rate")
    advice = STABLER
    builds_at_once = True

    def __init__(self, config: TrainConfig, memory_limit: int | None = None):
        self.config, self.memory_limit = config, memory_limit
        self.objective = config.objective.build()
        self.evaluate_every = config.evaluation.every

    def finished(self) -> TrainResult:
        text = (Path(self.config.run.output_dir) / "evaluation.json").read_text()
        report = EvaluationReport.from_json(text)
        with torch.device("meta"):
            return self._result(report, self.build())

    def load(self, accelerator: Accelerator) -> None:
        config = self.config
        with accelerator.local_main_process_first():
            self.train_set, self.heldout = load_data(config.data, accelerator.is_local_main_process, self.memory_limit)
        load_judges(config.evaluation, config.data.channels, config.data.size)  # are missed now, not after days
        self.workers = config.data.num_workers if isinstance(self.train_set, FolderImages) else 0
        self.accelerator, self.images = accelerator, len(self.train_set)

    def data(self) -> dict[str, dict[str, Any]]:
        return {
            name: {"images": len(part), "fingerprint": part.fingerprint()}
            for name, part in (("training", self.train_set), ("held-out", self.heldout))
        }

    def image_errors(self) -> Iterator[str]:
        yield from self.train_set.errors
        yield from self.heldout.errors

    def build(self) -> VAE | MLPVAE:
        return self.config.model.build(self.config.data.channels, self.config.data.size)

    def blank(self, model: torch.nn.Module, device: torch.device) -> torch.Tensor:
        images = torch.zeros(1, self.config.data.channels, *self.config.data.size, device=device)
        return model(images, sample_posterior=True).sample.sum()

    def draws(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        shape = self.config.model.latent_shape(self.config.data.size)
        return {"noise": torch.randn(count, *shape, generator=generator, device=generator.device)}

    def step(self, model: torch.nn.Module, read: ReadImages, draws: dict[str, torch.Tensor]) -> StepTerms:
        images = to_model_range(read.pixels.to(draws["noise"].device))
        reconstructions, posterior = model(images, return_dict=False, return_posterior=True, noise=draws["noise"])
        terms = self.objective(images, reconstructions, posterior)
        return StepTerms(terms.loss, {"distortion": terms.distortion, "rate": terms.rate})

    def summary(self, model: VAE | MLPVAE) -> str:
        data = self.config.data
        return (
            f"{'VAE' if isinstance(model, VAE) else 'MLPVAE'} with {model.num_parameters():,} parameters, latents "
            f"{'x'.join(map(str, self.config.model.latent_shape(data.size)))}; {len(self.train_set):,} training and "
            f"{len(self.heldout):,} held-out images of {data.name} at {'x'.join(map(str, data.size))}"
        )

    def evaluate(
        self, model: VAE | MLPVAE, log: Log, progress: dict[str, int]
    ) -> tuple[EvaluationReport, dict[str, Image.Image]]:
        """Measure `model` on all processes, and picture it on the main process."""
        config, settings = self.config, self.config.evaluation
        name, bar = Path(config.run.output_dir).resolve().name, self.accelerator.is_main_process
        report = evaluate(model, self.heldout, self.objective, settings, config.data, "held-out", name, bar)
        numbers = {key: value for key, value in vars(report).items() if isinstance(value, float)}
        if bad := [name for name, value in numbers.items() if not math.isfinite(value)]:
            raise FloatingPointError(f"training diverged, not finite on held-out images: {', '.join(bad)}. {STABLER}")
        log.write("evaluation", progress | numbers)

        def draw() -> dict[str, Image.Image]:
            pictures = draw_report(model, self.heldout, log.path, settings, report)
            log.show(pictures, progress["images_seen"])
            return pictures

        pictures: dict[str, Image.Image] = {}
        on_main(self.accelerator, lambda: pictures.update(draw()))
        return report, pictures

    def finish(self, model: VAE | MLPVAE, log: Log, progress: dict[str, int]) -> TrainResult:
        """Save the model before anything that could fail, then measure: latents, which go into its config, and images.
        evaluation.json comes last: it says that the run is finished.
        """
        config, output_dir = self.config, Path(self.config.run.output_dir)

        def save() -> None:
            with whole_folder(output_dir / "model") as folder:
                model.save_pretrained(folder)

        on_main(self.accelerator, save)
        batch_size, max_images = config.evaluation.batch_size, config.evaluation.max_images
        bar = self.accelerator.is_main_process
        statistics = measure_latents(model, self.train_set, batch_size, max_images, bar)
        if not (math.isfinite(statistics.mean) and 0 < statistics.std < math.inf):
            raise FloatingPointError(
                f"training diverged: the latents have mean {statistics.mean} and std {statistics.std}. {STABLER}"
            )
        model.register_to_config(scaling_factor=statistics.scaling_factor, shift_factor=statistics.mean)
        on_main(self.accelerator, save)
        report, pictures = self.evaluate(model, log, progress)

        def write() -> None:
            evaluation = report.to_json()
            write_file(output_dir / "evaluation.csv", report.per_image.to_csv())
            write_file(output_dir / "report.html", report_html(json.loads(evaluation), pictures, report.model.name))
            write_card(output_dir, config.hub, json.loads(evaluation))
            write_file(output_dir / "evaluation.json", evaluation)

        on_main(self.accelerator, write)
        return self._result(report, model)

    def few(self, folder: Path) -> AutoencoderTask:
        config = self.config
        evaluation = replace(config.evaluation, max_images=config.evaluation.batch_size, every=1)
        return AutoencoderTask(replace(config, run=few_steps(config.run, folder), evaluation=evaluation), 0)

    def _result(self, report: EvaluationReport, model: VAE | MLPVAE) -> TrainResult:
        folder = Path(self.config.run.output_dir) / "model"
        package, name = ("diffusers", "AutoencoderKL") if isinstance(model, VAE) else ("diffusers_vae", "MLPVAE")
        return TrainResult(
            output_dir=folder.parent,
            saved=folder.name,
            report=report,
            parameters=model.num_parameters(),
            latent_shape=self.config.model.latent_shape(self.config.data.size),
            load_line=f'from {package} import {name}; vae = {name}.from_pretrained("{folder.as_posix()}")',
        )
