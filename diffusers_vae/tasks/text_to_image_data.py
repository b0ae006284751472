"""Inputs of a text-to-image run: latents of images, their captions as tokens, and the autoencoder."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from transformers import CLIPTokenizer

from ..data import ImageSet, image_batches, load_data, refuse_colours
from ..engine.program import settled
from ..engine.step import Program
from ..latents.dataset import LatentDataset, Verification, matching_latents
from ..latents.encode import encode_images
from ..latents.shards import INDEX
from ..messages import showable
from ..models import VAE, compression_ratio, encode, is_local
from ..models.scaling import LatentScaling
from ..pipelines import latent_scaling
from ..processes import one_first
from ..settings import config_of_run, read_settings
from .captions import Captions, captions_of
from .encoded import LatentsAlone
from .text_to_image_config import TextToImageConfig
from .tokenizer import caption_tokenizer

logger = logging.getLogger(__name__)
T = TypeVar("T")
BATCH_SIZE = 64
"""Number of images per forward outside of training."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Inputs of a run: images, latents, captions as tokens, and the autoencoder."""

    config: TextToImageConfig
    """Settings, with the data.channels of the autoencoder."""
    accelerator: Accelerator
    vae: VAE
    scaling: LatentScaling
    images: ImageSet
    """Training images."""
    heldout: ImageSet
    train_set: LatentsAlone
    verification: Verification
    captions: Captions
    """Captions of the training images."""
    tokenizer: CLIPTokenizer
    tokens: torch.Tensor
    """Tokens of the distinct captions, (captions, captions.max_length) int64."""
    no_prompt: torch.Tensor
    """Tokens of the empty prompt, (1, captions.max_length) int64."""
    prompts: list[str]
    """Prompts of the pictures."""
    heldout_latents: torch.Tensor
    """Scaled posterior means of the held-out images, (N, C, h, w)."""
    heldout_tokens: torch.Tensor
    """Tokens of the first captions of the held-out images, (N, captions.max_length) int64."""

    @property
    def latents(self) -> LatentDataset:
        """Latents of the training images."""
        return self.train_set.latents

    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """Return what identifies the inputs: latents and captions, the autoencoder, the kind of latents."""
        latents, captions = self.latents, self.captions
        cached = latents.cache["data"]
        images = {name: cached[name] for name in ("fingerprint", "contents", "image_shape", "resize") if name in cached}
        digest = sha256(json.dumps([images, captions.distinct]).encode())
        digest.update(captions.rows.numpy().tobytes() + captions.counts.numpy().tobytes())
        computed = [f"computed in {latents.compute_dtype}"] * (latents.compute_dtype != torch.float32)
        return {
            "training": {"images": len(latents), "fingerprint": digest.hexdigest()},
            "autoencoder": {"fingerprint": latents.weights_hash},
            "kind of latents": {"fingerprint": ", ".join([latents.kind, latents.cache["dtype"], *computed])},
        }

    def image_errors(self) -> Iterator[str]:
        """Yield the reason for each image that was left out so far."""
        yield from self.images.errors
        yield from self.heldout.errors


def load_run_data(config: TextToImageConfig, accelerator: Accelerator, max_images: int | None = None) -> RunData:
    """Load images, captions and autoencoder on all processes, and encode the images if there is no cache yet.

    Args:
        config: settings of the run.
        accelerator: accelerator of the launch.
        max_images: number of images to encode; None: all.
    """
    first = accelerator.is_local_main_process
    with one_first(first, "reading the data set"):
        if is_local(config.vae.source):  # what is missing is reported before the data are read
            _read_vae(config.vae.location.config)
        limit = None if max_images is None else 0
        images, heldout = load_data(config.data, first, limit, captions=True)
        vae = load_vae(config)
        if (channels := vae.config.in_channels) != images.channels:
            if channels == 1:
                refuse_colours(images, config.data, config.vae.source)
            config = replace(config, data=replace(config.data, channels=channels))
            images, heldout = load_data(config.data, first, limit, captions=True)
    config = replace(config, data=replace(config.data, channels=images.channels))
    if accelerator.is_main_process:
        logger.info("%s", showable(images.files))
    if first:
        _warn_of_another_fit(config)
    heldout = heldout.first(config.sampling.heldout_images)
    digits = config.data.name in ("digits", "mnist", "qmnist")
    say = partial(captions_of, phrases=config.captions.phrases, digits=digits)
    spoken = say(images.captions, images.labels, images.classes)
    captions = Captions(spoken)
    texts = say(heldout.captions, heldout.labels, heldout.classes, part="held-out")
    labels = None if images.captions is not None else images.labels
    prompts = list(config.sampling.prompts or _prompts(spoken, texts, labels))
    length = config.captions.max_length
    tokenizer = caption_tokenizer(captions.distinct, length)
    _check_lengths(tokenizer, length, captions.distinct, [text for several in texts for text in several], prompts)
    scaling = latent_scaling("StableDiffusionPipeline", vae)
    vae.to(accelerator.device)
    train_set = LatentsAlone(_latents(config, vae, images, max_images, accelerator.is_main_process), images)
    config = replace(config, run=settled(config.run, program_of(config, train_set), len(train_set), accelerator))
    verification = Verification(train_set.latents)
    heldout_captions, means = [], []
    for _, indices, batch in image_batches(heldout, BATCH_SIZE, None, vae.device):
        heldout_captions += [texts[index][0] for index in indices]
        means.append(encode(vae, batch).mean.cpu())
    vae.to("cpu")
    return RunData(
        config=config,
        accelerator=accelerator,
        vae=vae,
        scaling=scaling,
        images=images,
        heldout=heldout,
        train_set=train_set,
        verification=verification,
        captions=captions,
        tokenizer=tokenizer,
        tokens=_tokens(tokenizer, captions.distinct),
        no_prompt=_tokens(tokenizer, [""]),
        prompts=prompts,
        heldout_latents=scaling.scale(torch.cat(means)),
        heldout_tokens=_tokens(tokenizer, heldout_captions),
    )


def program_of(config: TextToImageConfig, train_set: LatentsAlone) -> Program:
    """Return the properties that decide how the steps of a run are executed."""
    _, height, width = train_set.latents.latent_shape
    return Program(config.run.batch_size * height * width * config.model.block_out_channels[0])


def _latents(
    settings: TextToImageConfig, vae: VAE, images: ImageSet, max_images: int | None, progress: bool
) -> LatentDataset:
    """Return the cached latents, or encode them; a dry run encodes a few."""
    config, data = settings.latents, f"training images of {settings.data.described}"
    if config.folder and (Path(config.folder) / INDEX).exists():
        return matching_latents(vae, images, config.folder, data)
    return encode_images(
        vae,
        images if max_images is None else images.first(max_images),
        config.folder or Path(settings.run.output_dir) / "latents",
        data=data,
        progress=progress,
    )


def _check_lengths(
    tokenizer: CLIPTokenizer, length: int, training: list[str], heldout: list[str], prompts: list[str]
) -> None:
    for what, texts in (
        ("training captions", training),
        ("held-out captions", heldout),
        ("sampling.prompts", prompts),
    ):
        lengths = [len(tokens) for tokens in tokenizer(texts, verbose=False).input_ids]
        if max(lengths) > length:
            longest = texts[lengths.index(max(lengths))]
            raise ValueError(
                f"{what} may have {length} tokens, captions.max_length, start and end among them; got "
                f"{max(lengths)} in {longest[:80]!r}"
            )


def _tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Return tokens (len(texts), max_length), as a pipeline tokenises prompts."""
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return tokens.input_ids


def _warn_of_another_fit(config: TextToImageConfig) -> None:
    """Warn if the run of the autoencoder resized images in another way."""
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
    """Return up to ten labels in the first phrase or, without labels, captions of the first held-out images."""
    if labels is None:
        return list(dict.fromkeys(texts[0] for texts in heldout))[:8]
    return [training[labels.tolist().index(label)][0] for label in labels.unique().tolist()[:10]]


def _read_vae(read: Callable[[], T]) -> T:
    """Return the result of `read` for vae.source."""
    try:
        return read()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"vae.source: {error}. Train an autoencoder first, `diffusers-vae train`, or say with --vae where one is"
        ) from error


def load_vae(config: TextToImageConfig) -> VAE:
    """Return the autoencoder; ValueError if the pipeline does not accept it, or if it takes other images."""
    source, vae = config.vae.source, _read_vae(config.vae.location.model)
    if not isinstance(vae, VAE):
        raise ValueError(f"StableDiffusionPipeline takes an AutoencoderKL, got {type(vae).__name__} in {source}")
    config.vae.location.check_value_range(config.data.stated_range)
    if config.data.channels not in (None, vae.config.in_channels):
        raise ValueError(
            f"data.channels must match the autoencoder, got {config.data.channels}, and {source} takes "
            f"{vae.config.in_channels}"
        )
    ratio = math.lcm(8, vae.spatial_compression_ratio)
    least = vae.spatial_compression_ratio * compression_ratio(config.model.block_out_channels)
    if any(side % ratio for side in config.data.size) or min(config.data.size) < least:
        raise ValueError(
            f"data.resolution must be divisible by {ratio}, as StableDiffusionPipeline and the autoencoder have it, "
            f"and at least {least} for {len(config.model.block_out_channels)} resolutions of the U-Net, got "
            f"{'x'.join(map(str, config.data.size))}"
        )
    return vae
