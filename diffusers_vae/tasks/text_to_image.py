"""A run of a text-to-image model on the latents of a trained autoencoder, from settings to a stock pipeline."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

from ..data import ImageSet, TrainingSet, image_batches, load_data, refuse_colours
from ..engine.config import few_steps, kept_channels
from ..engine.folder import Log, check_whole
from ..engine.step import RunResult, StepTerms, Task
from ..images.ranges import to_model_range
from ..latents.dataset import LatentDataset, Verification, matching_latents
from ..latents.encode import encode_images
from ..latents.shards import INDEX
from ..messages import message, quoted, showable
from ..models import VAE, encode, is_local, load_autoencoder, read_config, weights_hash, with_whole_tiles
from ..models.value_range import check_value_range
from ..pipelines import latent_scaling
from ..processes import on_main, one_first
from ..reports.charts import loss_picture
from ..reports.pictures import prompt_picture
from ..settings import config_of_run, read_settings
from ..storage import described, whole_folder, write_file
from ..untrusted import check_type, read_json
from .captions import Captions, captions_of
from .text_to_image_config import LatentsConfig, TextToImageConfig
from .tokenizer import caption_tokenizer

logger = logging.getLogger(__name__)
T = TypeVar("T")
SCHEDULERS = {"ddim": DDIMScheduler, "pndm": PNDMScheduler, "dpm-solver": DPMSolverMultistepScheduler}
PANELS = {
    "loss": "loss",
    "error": "squared error of the prediction",
    "grad_norm": "norm of the gradient",
    "learning_rate": "learning rate",
}


@dataclass(frozen=True, kw_only=True)
class TextToImageResult(RunResult):
    """What the run of a text-to-image model leaves behind: pipeline/, too."""

    heldout_error: float
    """Squared error of the prediction on held-out images, mean over latent units and timesteps."""


class TextToImage(nn.Module):
    """Text encoder and denoiser as one module: gradients are synchronised by one call of `forward`."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The prediction (B, C, h, w) for noisy scaled latents at timesteps (B,) under prompts of tokens (B, L)."""
        return self.unet(noisy_latents, timesteps, self.text_encoder(tokens)[0]).sample


@dataclass(frozen=True)
class _Asked:
    """A batch of the training set: the latents are read when it is known with which noise."""

    indices: Sequence[int]
    latents: LatentDataset
    errors: tuple[str, ...] = ()

    @property
    def kept(self) -> Sequence[int]:
        return range(len(self.indices))

    def checked(self) -> _Asked:
        return self

    def blank(self) -> _Asked:
        raise AssertionError("latents that were encoded can be read")

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"latents": self.latents.latents(self.indices)}


class EncodedImages(TrainingSet):
    """Latents of a set of images, all of them but those that could not be read: what the loop trains on."""

    def __init__(self, latents: LatentDataset, images: ImageSet):
        self.latents, self.images, self.errors = latents, images, ()

    def __len__(self) -> int:
        return len(self.latents)

    def __getitems__(self, indices: Sequence[int]) -> _Asked:
        return _Asked(indices, self.latents)

    def name(self, index: int) -> str:
        return self.images.name(int(self.latents.indices[index]))


class TextToImageTask(Task):
    """Training of denoiser and text encoder on latents, for the loop."""

    terms = ("error",)
    advice = "To make training more stable, lower optimizer.learning_rate or raise optimizer.warmup_images"
    workers = 0
    builds_at_once = False

    def __init__(self, config: TextToImageConfig, max_images: int | None = None):
        self.config, self.max_images = kept_channels(config), max_images
        self.objective = config.diffusion.build()
        self.evaluate_every = config.sampling.every

    def finished(self) -> TextToImageResult:
        path = Path(self.config.run.output_dir) / "evaluation.json"
        evaluation = read_json(path)
        check_type(evaluation, EVALUATION, str(path))
        check_type(evaluation.get("pipeline", {}), dict[str, str], f"{path}.pipeline")
        check_whole(path.parent, ["metrics.jsonl", "pictures/prompts.png", "pictures/loss.png"])
        _check_pipeline(path.parent / "pipeline", evaluation.get("pipeline", {}))
        result = self._result(evaluation)
        try:
            same = weights_hash(_load_vae(self.config)) == evaluation["autoencoder"]["weights_sha256"]
        except OSError as error:
            logger.warning("the autoencoder cannot be loaded, and may be another now: %s", message(error))
            return result
        if not same and not self.config.run.allow_config_change:
            raise FileExistsError(
                f"run.output_dir holds a finished run on the latents of another autoencoder than "
                f"{self.config.vae.source} now is: {path.parent.resolve()}. Choose another run.output_dir"
            )
        if not same:
            raise ValueError("it is of another autoencoder")
        return result

    def load(self, accelerator: Accelerator) -> None:
        config, first = self.config, accelerator.is_local_main_process
        self.accelerator = accelerator
        with one_first(first, "reading the data set"):
            if is_local(config.vae.source):  # what is missing is reported before the data are read
                _read_vae(config, read_config)
            limit = None if self.max_images is None else 0
            images, heldout = load_data(config.data, first, limit, captions=True)
            self.vae = _load_vae(config)
            if (channels := self.vae.config.in_channels) != images.channels:
                if channels == 1:
                    refuse_colours(images, config.data, config.vae.source)
                config = replace(config, data=replace(config.data, channels=channels))
                images, heldout = load_data(config.data, first, limit, captions=True)
        config = self.config = replace(config, data=replace(config.data, channels=images.channels))
        self.images = len(images)
        if accelerator.is_main_process:
            logger.info("%s", showable(images.files))
        if first:
            _warn_of_another_fit(config)
        heldout = heldout.first(config.sampling.heldout_images)
        digits = config.data.name in ("digits", "mnist", "qmnist")
        say = partial(captions_of, phrases=config.captions.phrases, digits=digits)
        spoken = say(images.captions, images.labels, images.classes)
        self.captions = Captions(spoken)
        texts = say(heldout.captions, heldout.labels, heldout.classes, part="held-out")
        labels = None if images.captions is not None else images.labels
        self.prompts = list(config.sampling.prompts or _prompts(spoken, texts, labels))
        self._tokenize([text for own in texts for text in own])
        self.scaling = latent_scaling("StableDiffusionPipeline", self.vae)
        self.vae.to(accelerator.device)
        self.train_set = EncodedImages(self._latents(images), images)
        self.verification = Verification(self.train_set.latents)
        self.heldout_captions, means = [], []
        for _, indices, batch in image_batches(heldout, config.latents.batch_size, None, self.vae.device):
            self.heldout_captions += [texts[index] for index in indices]
            means.append(encode(self.vae, batch).mean.cpu())
        self.heldout_latents = self.scaling.scale(torch.cat(means))
        self.image_errors = lambda: (*images.errors, *heldout.errors)
        self.vae.to("cpu")

    def _latents(self, images: ImageSet) -> LatentDataset:
        """Those that were encoded before, or are now; of a dry run, a few."""
        config = self.config.latents
        data = f"training images of {self.config.data.described}"
        if config.folder and (Path(config.folder) / INDEX).exists():
            latents = matching_latents(self.vae, images, config.folder, data)
            kept = {"dtype": latents.cache["dtype"], "compute_dtype": str(latents.compute_dtype).removeprefix("torch.")}
            for name, value in kept.items():
                if getattr(config, name) not in (None, getattr(LatentsConfig(), name), value):
                    raise ValueError(
                        f"latents.{name} {getattr(config, name)} would be ignored, since {config.folder} holds latents "
                        f"in {value}: leave it out, or choose another latents.folder"
                    )
            if config.sample_posterior and latents.kind != "posterior":
                raise ValueError(
                    f"latents.sample_posterior needs mean and logvar, and {config.folder} holds latents of kind "
                    f"{latents.kind}: set it to false, or encode with --kind posterior"
                )
            return latents
        return encode_images(
            self.vae,
            images if self.max_images is None else images.first(self.max_images),
            config.folder or Path(self.config.run.output_dir) / "latents",
            dtype=getattr(torch, config.dtype),
            compute_dtype=config.compute_dtype and getattr(torch, config.compute_dtype),
            batch_size=config.batch_size,
            data=data,
            progress=self.accelerator.is_main_process,
        )

    def _tokenize(self, heldout: list[str]) -> None:
        length = self.config.captions.max_length
        self.tokenizer = caption_tokenizer(self.captions.distinct, length)
        for what, texts in (
            ("training captions", self.captions.distinct),
            ("held-out captions", heldout),
            ("sampling.prompts", self.prompts),
        ):
            lengths = [len(tokens) for tokens in self.tokenizer(texts, verbose=False).input_ids]
            if max(lengths) > length:
                longest = texts[lengths.index(max(lengths))]
                raise ValueError(
                    f"{what} may have {length} tokens, captions.max_length, start and end among them; got "
                    f"{max(lengths)} in {longest[:80]!r}"
                )
        self.tokens, self.no_prompt = self._tokens(self.captions.distinct), self._tokens([""])

    def _tokens(self, texts: list[str]) -> torch.Tensor:
        """(len(texts), max_length), as a pipeline tokenises prompts."""
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return tokens.input_ids

    def data(self) -> dict[str, dict[str, Any]]:
        latents, captions = self.train_set.latents, self.captions
        known = latents.cache["data"]
        images = {name: known[name] for name in ("fingerprint", "contents", "image_shape", "resize") if name in known}
        digest = sha256(json.dumps([images, captions.distinct]).encode())
        digest.update(captions.rows.numpy().tobytes() + captions.counts.numpy().tobytes())
        computed = [f"computed in {latents.compute_dtype}"] * (latents.compute_dtype != torch.float32)
        return {
            "training": {"images": len(latents), "fingerprint": digest.hexdigest()},
            "autoencoder": {"fingerprint": latents.weights_hash},
            "kind of latents": {"fingerprint": ", ".join([latents.kind, latents.cache["dtype"], *computed])},
        }

    def build(self) -> TextToImage:
        model, length = self.config.model, self.config.captions.max_length
        channels, height, width = self.train_set.latents.latent_shape
        attending = [len(model.block_out_channels) == 1 or place > 0 for place in range(len(model.block_out_channels))]
        unet = UNet2DConditionModel(
            sample_size=height if height == width else (height, width),
            in_channels=channels,
            out_channels=channels,
            down_block_types=["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attending],
            up_block_types=["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attending)],
            block_out_channels=tuple(model.block_out_channels),
            layers_per_block=model.layers_per_block,
            attention_head_dim=model.attention_heads,  # stock's name for their number
            norm_num_groups=model.norm_num_groups,
            cross_attention_dim=model.text_width,
        )
        if self.config.run.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        tokenizer = self.tokenizer
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=model.text_width,
            intermediate_size=4 * model.text_width,
            projection_dim=model.text_width,
            num_hidden_layers=model.text_layers,
            num_attention_heads=model.text_heads,
            max_position_embeddings=length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return TextToImage(unet, CLIPTextModel(text))

    def blank(self, model: nn.Module, device: torch.device) -> torch.Tensor:
        latents = torch.zeros(1, *self.train_set.latents.latent_shape, device=device)
        return model(latents, torch.zeros(1, dtype=torch.long, device=device), self.no_prompt.to(device)).sum()

    def draws(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        on = {"generator": generator, "device": generator.device}
        shape = (count, *self.train_set.latents.latent_shape)
        return {
            "posterior_noise": torch.randn(shape, **on),
            "noise": torch.randn(shape, **on),
            "timesteps": torch.randint(self.objective.scheduler.config.num_train_timesteps, (count,), **on),
            "caption": torch.rand(count, **on),
            "dropped": torch.rand(count, **on) < self.config.diffusion.caption_dropout,
        }

    def step(self, model: nn.Module, read: _Asked, draws: dict[str, torch.Tensor]) -> StepTerms:
        self.verification.check()
        device = draws["noise"].device
        noise = draws["posterior_noise"].cpu() if self.config.latents.sample_posterior else None
        scaled_latents = self.scaling.scale(self.train_set.latents.latents(read.indices, noise)).to(device)
        places = self.train_set.latents.indices[torch.as_tensor(read.indices)]
        tokens = self.tokens[self.captions.choose(places, draws["caption"])]
        tokens = torch.where(draws["dropped"].cpu()[:, None], self.no_prompt, tokens).to(device)
        terms = self._terms(model, scaled_latents, draws["noise"], draws["timesteps"], tokens)
        return StepTerms(terms.loss, {"error": terms.error})

    def _terms(self, model, scaled_latents, noise, timesteps, tokens):
        noisy_latents = self.objective.noisy(scaled_latents, noise, timesteps)
        return self.objective(model(noisy_latents, timesteps, tokens), scaled_latents, noise, timesteps)

    def summary(self, model: TextToImage) -> str:
        latents = self.train_set.latents
        parts = [sum(p.numel() for p in part.parameters()) for part in (model.unet, model.text_encoder)]
        return (
            f"U-Net with {parts[0]:,} parameters and text encoder with {parts[1]:,}, latents "
            f"{'x'.join(map(str, latents.latent_shape))}; {len(latents):,} training images of "
            f"{showable(self.config.data.described)}, {len(self.captions.distinct):,} different captions, "
            f"{len(self.tokenizer):,} tokens"
        )

    def unreached(self, total_images: int) -> list[str]:
        return self.config.optimizer.unreached(total_images)

    @torch.no_grad()
    def evaluate(self, model: TextToImage, log: Log, progress: dict[str, int]) -> dict[str, float]:
        """The held-out loss, and the grid of pictures, both by the main process."""

        def measure() -> dict[str, float]:
            figures = self._heldout(model)
            if bad := [name for name, value in figures.items() if not math.isfinite(value)]:
                raise FloatingPointError(
                    f"training diverged, not finite on held-out images: {', '.join(bad)}. {self.advice}"
                )
            log.write("evaluation", progress | figures)
            pictures = {"prompts": self._grid(model), "loss": loss_picture(log.path, PANELS)}
            log.show(pictures, progress["images_seen"])
            return figures

        return on_main(measure)

    def _heldout(self, model: TextToImage) -> dict[str, float]:
        """Loss and error of posterior means with the first caption, at evenly spaced timesteps, noise of seed 0."""
        count, device = len(self.heldout_latents), next(model.parameters()).device
        noise = torch.randn(self.heldout_latents.shape, generator=torch.Generator().manual_seed(0))
        steps = self.objective.scheduler.config.num_train_timesteps
        timesteps = (torch.arange(count) * steps) // count
        tokens = self._tokens([texts[0] for texts in self.heldout_captions])
        loss = error = 0.0
        for part in torch.arange(count).split(self.config.sampling.batch_size):
            batch = (t[part].to(device) for t in (self.heldout_latents, noise, timesteps, tokens))
            terms = self._terms(model, *batch)
            loss += terms.loss.item() * len(part)
            error += terms.error.sum().item()
        return {"loss": loss / count, "error": error / count}

    def _grid(self, model: TextToImage) -> Image.Image:
        sampling, pipeline = self.config.sampling, self.pipeline(model)
        pipeline.to(self.accelerator.device)
        pipeline.set_progress_bar_config(disable=True)
        wanted = [(prompt, seed) for prompt in self.prompts for seed in range(sampling.seeds)]
        pictures = []
        with tqdm(total=len(sampling.guidance) * len(wanted), desc="pictures", unit="img", leave=False) as bar:
            for scale in sampling.guidance:
                for start in range(0, len(wanted), sampling.batch_size):
                    part = wanted[start : start + sampling.batch_size]
                    made = pipeline(
                        [prompt for prompt, _ in part],
                        num_inference_steps=sampling.steps,
                        guidance_scale=scale,
                        generator=[torch.Generator().manual_seed(seed) for _, seed in part],
                    ).images
                    pictures += [torch.from_numpy(np.array(picture)) for picture in made]
                    bar.update(len(part))
        self.vae.to("cpu")
        pixels = torch.stack(pictures)
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        images = to_model_range(pixels).unflatten(0, (len(sampling.guidance), len(self.prompts), sampling.seeds))
        return prompt_picture(images, self.prompts, sampling.guidance, f"{sampling.scheduler}, {sampling.steps} steps")

    def pipeline(self, model: TextToImage) -> StableDiffusionPipeline:
        """The stock pipeline of the parts."""
        # what Stable Diffusion's own config says to samplers; it stays in the config, for those that are made from it
        config = {**self.objective.scheduler.config, "skip_prk_steps": True, "set_alpha_to_one": False}
        scheduler = SCHEDULERS[self.config.sampling.scheduler].from_config(config)
        return StableDiffusionPipeline(
            vae=with_whole_tiles(self.vae.to_diffusers()),
            text_encoder=model.text_encoder,
            tokenizer=self.tokenizer,
            unet=model.unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def finish(self, model: TextToImage, log: Log, progress: dict[str, int]) -> TextToImageResult:
        output_dir = Path(self.config.run.output_dir)
        saved = output_dir / "pipeline"
        self.verification.finish()

        def save() -> None:
            with whole_folder(saved) as folder:
                pipeline = self.pipeline(model)
                pipeline.save_pretrained(folder)
                for_transformers_4(pipeline, folder)

        on_main(save)
        figures = self.evaluate(model, log, progress)
        evaluation = {
            "heldout": figures | {"images": len(self.heldout_latents)},
            "parameters": sum(p.numel() for p in model.parameters()),
            "latent_shape": list(self.train_set.latents.latent_shape),
            "autoencoder": {"source": self.config.vae.source, "weights_sha256": self.train_set.latents.weights_hash},
            "progress": progress,
            "pipeline": on_main(lambda: {name: described(path)["sha256"] for name, path in _files(saved).items()}),
        }
        on_main(
            lambda: write_file(output_dir / "evaluation.json", json.dumps(evaluation, indent=2) + "\n"),
        )
        return self._result(evaluation)

    def _result(self, evaluation: dict[str, Any]) -> TextToImageResult:
        folder = Path(self.config.run.output_dir) / "pipeline"
        return TextToImageResult(
            output_dir=folder.parent,
            saved=folder.name,
            parameters=evaluation["parameters"],
            latent_shape=tuple(evaluation["latent_shape"]),
            heldout_error=evaluation["heldout"]["error"],
            load_line="from diffusers import DiffusionPipeline; "
            f"pipeline = DiffusionPipeline.from_pretrained({quoted(folder.absolute().as_posix())})",
        )

    def few(self, folder: Path) -> TextToImageTask:
        config = self.config
        sampling = replace(config.sampling, steps=2, seeds=1, heldout_images=8, every=None)
        latents = replace(config.latents, folder=None)
        config = replace(config, run=few_steps(config.run, folder), sampling=sampling, latents=latents)
        return TextToImageTask(config, 2 * config.run.batch_size)


def _files(folder: Path) -> dict[str, Path]:
    """All files in a folder by their path in it."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _check_pipeline(folder: Path, written: dict[str, str]) -> None:
    """Raise ValueError naming a file of the pipeline in `folder` that is missing or damaged: weights by the SHA-256 of
    all files as they were written, which a run of an older version does not know; settings may be others.
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
"""What is read of evaluation.json."""


def _warn_of_another_fit(config: TextToImageConfig) -> None:
    """Say so when the run of the autoencoder brought images to their size in another way."""
    file = config_of_run(config.vae.source)
    fit = read_settings(file).get("data", {}).get("fit", config.data.fit) if file else config.data.fit
    if fit != config.data.fit:
        logger.warning(
            "the autoencoder was trained with data.fit %s, and this is data.fit %s: unless all images have the size of "
            "data.resolution, these latents are of images unlike those that it knows",
            fit,
            config.data.fit,
        )


def _prompts(
    training: Sequence[Sequence[str]], heldout: Sequence[Sequence[str]], labels: torch.Tensor | None
) -> list[str]:
    """The first phrase of up to ten labels or, without, captions of the first held-out images."""
    if labels is None:
        return list(dict.fromkeys(texts[0] for texts in heldout))[:8]
    return [training[labels.tolist().index(label)][0] for label in labels.unique().tolist()[:10]]


def for_transformers_4(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Make what transformers 5 saved readable for transformers 4, too: it takes the tokenizer's words from vocab.json
    and merges.txt alone, and leaves weights random whose names lack `text_model.`, as they do since version 5. That
    reads both.
    """
    if not (folder / "tokenizer" / "vocab.json").exists():
        pipeline.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    named = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in weights.items()}
    save_file(named, folder / "text_encoder" / "model.safetensors", {"format": "pt"})


def _read_vae(config: TextToImageConfig, read: Callable[[str, str | None, str | None], T]) -> T:
    """What `read` (load_autoencoder or read_config) finds in vae.source."""
    try:
        return read(config.vae.source, config.vae.subfolder, config.vae.revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"vae.source: {error}. Train an autoencoder first, `diffusers-vae train`, or say with --vae where one is"
        ) from error


def _load_vae(config: TextToImageConfig) -> VAE:
    """The autoencoder; ValueError when it is none that the pipeline takes, or takes other images."""
    source, vae = config.vae.source, _read_vae(config, load_autoencoder)
    if not isinstance(vae, VAE):
        raise ValueError(f"StableDiffusionPipeline takes an AutoencoderKL, got {type(vae).__name__} in {source}")
    check_value_range(config.data.value_range, source, config.vae.subfolder, config.vae.revision)
    if config.data.channels not in (None, vae.config.in_channels):
        raise ValueError(
            f"data.channels must be that of the autoencoder, got {config.data.channels}, and {source} takes "
            f"{vae.config.in_channels}"
        )
    ratio = math.lcm(8, vae.spatial_compression_ratio)
    least = vae.spatial_compression_ratio * 2 ** (len(config.model.block_out_channels) - 1)
    if any(side % ratio for side in config.data.size) or min(config.data.size) < least:
        raise ValueError(
            f"data.resolution must be divisible by {ratio}, as StableDiffusionPipeline and the autoencoder have it, "
            f"and at least {least} for {len(config.model.block_out_channels)} resolutions of the U-Net, got "
            f"{'x'.join(map(str, config.data.size))}"
        )
    return vae
