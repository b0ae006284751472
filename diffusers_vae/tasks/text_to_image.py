"""A run of a text-to-image model on the latents of a trained autoencoder, from settings to a stock pipeline."""

from __future__ import annotations

import json
import logging
import math
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from ..engine import dry_run as trial
from ..engine.config import RunConfig, few_steps, kept_channels
from ..engine.folder import Log, check_whole, find_run, opened
from ..engine.launch import launched
from ..engine.loop import fit
from ..engine.state import TrainState
from ..engine.step import RunResult
from ..images.ranges import to_model_range
from ..messages import message, quoted, showable
from ..models import weights_hash, with_whole_tiles
from ..processes import on_main
from ..reports.charts import loss_picture
from ..reports.pictures import prompt_picture
from ..silence import PATIENCE, Patience
from ..storage import described, whole_folder, write_file
from ..untrusted import check_type, read_json
from .text_to_image_config import TextToImageConfig
from .text_to_image_data import BATCH_SIZE, RunData, load_run_data, load_vae
from .text_to_image_step import TextToImage, TextToImageStep, blank_output, build_model

logger = logging.getLogger(__name__)
SCHEDULERS = {"ddim": DDIMScheduler, "pndm": PNDMScheduler, "dpm-solver": DPMSolverMultistepScheduler}
PANELS = {
    "loss": "loss",
    "error": "squared error of the prediction",
    "grad_norm": "norm of the gradient",
    "learning_rate": "learning rate",
}


@dataclass(frozen=True, kw_only=True)
class TextToImageResult(RunResult):
    """Result of the run of a text-to-image model, whose folder also has pipeline/."""

    heldout_error: float
    """Squared error of the prediction on held-out images, the mean over latent units and timesteps."""


def train(
    config: TextToImageConfig,
    max_images: int | None = None,
    *,
    finish: bool = True,
    patience: Patience = PATIENCE,
    planned: RunConfig | None = None,
) -> TextToImageResult | None:
    """Train, evaluate and save a text-to-image model on at most `max_images` images. See `autoencoder.train`."""
    with (
        launched(config.run, lambda device: False, patience) as launch,
        opened(config, launch, finished, temporary=planned is not None) as run,
    ):
        accelerator = launch.accelerator
        if run.result:
            return run.result if run.main else None
        data = load_run_data(run.config, accelerator, max_images)
        config = data.config
        step = TextToImageStep(config, data, accelerator)
        build = partial(build_model, config, data)
        run.begin(config, data.fingerprints(), build)
        blank = partial(blank_output, data=data, device=accelerator.device)
        state = TrainState(accelerator, build, config, step.terms, blank)
        if run.checkpoint:
            state.load(run.checkpoint)
        log = Log(accelerator, run.output_dir, state.images_seen, run.checkpoint)
        length = (planned or config.run).total_images(len(data.images))
        run.announce(summary(state.plain_model, data), step.program, config.unreached(length), data.image_errors())
        with closing(fit(state, step, data.train_set, run, log, measure_every=config.sampling.every)) as fitting:
            for progress in fitting:
                measure(state.averaged(), step, log, progress)
        if not finish:
            return None
        result = finish_run(state.averaged(), step, log, state.progress())
        return run.complete(result, state.skipped, len(data.images), data.image_errors())


def dry_run(config: TextToImageConfig) -> tuple[RunResult, bool, float | None] | None:
    """Go through every phase of a run on two batches: see `engine.dry_run.dry_run`."""

    def try_out(folder: Path, finish: bool) -> TextToImageResult | None:
        return train(few(config, folder), 2 * config.run.batch_size, finish=finish, planned=config.run)

    return trial.dry_run(config.run, partial(find_run, kept_channels(config), finished, None), try_out)


def few(config: TextToImageConfig, folder: Path) -> TextToImageConfig:
    """Return settings for two batches in `folder`, with a minimal evaluation."""
    sampling = replace(config.sampling, steps=2, seeds=1, heldout_images=8, every=None)
    latents = replace(config.latents, folder=None)
    return replace(config, run=few_steps(config.run, folder), sampling=sampling, latents=latents)


def finished(config: TextToImageConfig) -> TextToImageResult:
    """Return the result of the finished run in output_dir; ValueError naming a file that is missing or damaged."""
    path = Path(config.run.output_dir) / "evaluation.json"
    evaluation = read_json(path)
    check_type(evaluation, EVALUATION, str(path))
    check_type(evaluation.get("pipeline", {}), dict[str, str], f"{path}.pipeline")
    check_whole(path.parent, ["metrics.jsonl", "pictures/prompts.png", "pictures/loss.png"])
    _check_pipeline(path.parent / "pipeline", evaluation.get("pipeline", {}))
    result = _result(path.parent, evaluation)
    try:
        same = weights_hash(load_vae(config)) == evaluation["autoencoder"]["weights_sha256"]
    except OSError as error:
        logger.warning("the autoencoder cannot be loaded, and may be another now: %s", message(error))
        return result
    if not same and not config.run.allow_config_change:
        raise FileExistsError(
            f"run.output_dir holds a finished run on the latents of another autoencoder than "
            f"{config.vae.source} now is: {path.parent.resolve()}. Choose another run.output_dir"
        )
    if not same:
        raise ValueError("it is of another autoencoder")
    return result


def _files(folder: Path) -> dict[str, Path]:
    """Return all files in a folder by their relative path."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _check_pipeline(folder: Path, written: dict[str, str]) -> None:
    """Raise ValueError naming a file of the pipeline in `folder` that is missing, or whose weights have another SHA-256
    than when they were written. Runs of older versions have no record of it; settings may differ.
    """
    check_whole(folder, written or ["model_index.json", *_files(folder)])
    for name in (name for name in written if name.endswith(".safetensors")):
        if (found := described(folder / name)["sha256"]) != written[name]:
            raise ValueError(f"{folder / name} must have the SHA-256 {written[name]}, as it was written, got {found}")


EVALUATION = {
    "heldout": {"error": float},
    "parameters": int,
    "latent_shape": list[int],
    "autoencoder": {"weights_sha256": str},
}
"""Keys that are read from evaluation.json."""


def summary(model: nn.Module, data: RunData) -> str:
    """Describe model and data in one line, before the first step."""
    latents = data.latents
    assert isinstance(model, TextToImage)
    parts = [sum(p.numel() for p in part.parameters()) for part in (model.unet, model.text_encoder)]
    return (
        f"U-Net with {parts[0]:,} parameters and text encoder with {parts[1]:,}, latents "
        f"{'x'.join(map(str, latents.latent_shape))}; {len(latents):,} training images of "
        f"{showable(data.config.data.described)}, {len(data.captions.distinct):,} different captions, "
        f"{len(data.tokenizer):,} tokens"
    )


@torch.no_grad()
def measure(model: nn.Module, step: TextToImageStep, log: Log, progress: dict[str, int]) -> dict[str, float]:
    """Measure the loss on held-out images and save the grid of pictures, both on the main process.

    Raises:
        FloatingPointError: if a figure is not finite.
    """

    def work() -> dict[str, float]:
        figures = _heldout(model, step)
        if bad := [name for name, value in figures.items() if not math.isfinite(value)]:
            raise FloatingPointError(
                f"training diverged, not finite on held-out images: {', '.join(bad)}. {step.advice}"
            )
        log.write("evaluation", progress | figures)
        pictures = {"prompts": _grid(model, step.data), "loss": loss_picture(log.path, PANELS)}
        log.show(pictures, progress["images_seen"])
        return figures

    return on_main(work)


def _heldout(model: nn.Module, step: TextToImageStep) -> dict[str, float]:
    """Return loss and error of posterior means with the first caption, at evenly spaced timesteps, with noise of seed
    0.
    """
    data, device = step.data, next(model.parameters()).device
    count = len(data.heldout_latents)
    noise = torch.randn(data.heldout_latents.shape, generator=torch.Generator().manual_seed(0))
    steps = len(step.objective.scheduler.alphas_cumprod)
    timesteps = (torch.arange(count) * steps) // count
    loss = error = 0.0
    for part in torch.arange(count).split(BATCH_SIZE):
        batch = (t[part].to(device) for t in (data.heldout_latents, noise, timesteps, data.heldout_tokens))
        terms = step.compute(model, *batch)
        loss += terms.loss.item() * len(part)
        error += terms.error.sum().item()
    return {"loss": loss / count, "error": error / count}


def _grid(model: nn.Module, data: RunData) -> Image.Image:
    sampling = data.config.sampling
    pipeline: Any = stock_pipeline(model, data)
    pipeline.to(data.accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    wanted = [(prompt, seed) for prompt in data.prompts for seed in range(sampling.seeds)]
    pictures = []
    with tqdm(total=len(sampling.guidance) * len(wanted), desc="pictures", unit="img", leave=False) as bar:
        for scale in sampling.guidance:
            for start in range(0, len(wanted), BATCH_SIZE):
                part = wanted[start : start + BATCH_SIZE]
                made = pipeline(
                    [prompt for prompt, _ in part],
                    num_inference_steps=sampling.steps,
                    guidance_scale=scale,
                    generator=[torch.Generator().manual_seed(seed) for _, seed in part],
                ).images
                pictures += [torch.from_numpy(np.array(picture)) for picture in made]
                bar.update(len(part))
    data.vae.to("cpu")
    pixels = torch.stack(pictures)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    images = to_model_range(pixels).unflatten(0, (len(sampling.guidance), len(data.prompts), sampling.seeds))
    return prompt_picture(images, data.prompts, sampling.guidance, f"{sampling.scheduler}, {sampling.steps} steps")


def stock_pipeline(model: nn.Module, data: RunData) -> StableDiffusionPipeline:
    """Return the stock pipeline of the parts."""
    assert isinstance(model, TextToImage)
    # as in Stable Diffusion's config; it stays there for samplers that are made from it
    config = {**data.config.diffusion.build().scheduler.config, "skip_prk_steps": True, "set_alpha_to_one": False}
    scheduler: Any = SCHEDULERS[data.config.sampling.scheduler].from_config(config)
    parts: Any = StableDiffusionPipeline  # whose types allow no part to be left out
    return parts(
        vae=with_whole_tiles(data.vae.to_diffusers()),
        text_encoder=model.text_encoder,
        tokenizer=data.tokenizer,
        unet=model.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def finish_run(model: nn.Module, step: TextToImageStep, log: Log, progress: dict[str, int]) -> TextToImageResult:
    """Save the pipeline before anything can fail, then evaluate. evaluation.json is written last."""
    data = step.data
    output_dir = Path(data.config.run.output_dir)
    saved = output_dir / "pipeline"
    data.verification.finish()

    def save() -> None:
        with whole_folder(saved) as folder:
            pipeline = stock_pipeline(model, data)
            pipeline.save_pretrained(folder)
            for_transformers_4(pipeline, folder)

    on_main(save)
    figures = measure(model, step, log, progress)
    evaluation = {
        "heldout": figures | {"images": len(data.heldout_latents)},
        "parameters": sum(p.numel() for p in model.parameters()),
        "latent_shape": list(data.latents.latent_shape),
        "autoencoder": {"source": data.config.vae.source, "weights_sha256": data.latents.weights_hash},
        "progress": progress,
        "pipeline": on_main(lambda: {name: described(path)["sha256"] for name, path in _files(saved).items()}),
    }
    on_main(
        lambda: write_file(output_dir / "evaluation.json", json.dumps(evaluation, indent=2) + "\n"),
    )
    return _result(output_dir, evaluation)


def _result(output_dir: Path, evaluation: dict[str, Any]) -> TextToImageResult:
    folder = output_dir / "pipeline"
    return TextToImageResult(
        output_dir=folder.parent,
        saved=folder.name,
        parameters=evaluation["parameters"],
        latent_shape=tuple(evaluation["latent_shape"]),
        heldout_error=evaluation["heldout"]["error"],
        load_line="from diffusers import DiffusionPipeline; "
        f"pipeline = DiffusionPipeline.from_pretrained({quoted(folder.absolute().as_posix())})",
    )


def for_transformers_4(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Make files that transformers 5 saved readable for transformers 4 as well, which reads the tokenizer only from
    vocab.json and merges.txt, and leaves weights random whose names lack `text_model.`. Transformers 5 reads both.
    """
    if not (folder / "tokenizer" / "vocab.json").exists():
        pipeline.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    named = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in weights.items()}
    save_file(named, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
