"""Figures of a model on held-out images, with everything needed to reproduce them."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any, Literal, cast

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from tqdm import tqdm

from ..data import DataConfig, ImageSet, image_batches
from ..fields import check, setting
from ..images.ranges import ValueRange, to_model_range, to_uint8
from ..latents.statistics import LatentStatistics, draw, total
from ..losses.objective import Bernoulli, VAEObjective
from ..losses.perceptual import LPIPS, InceptionFeatures
from ..models import decode, decode_logits, encode, unmeasured, weights_hash
from ..models.stock import ModelMixin
from ..processes import gather_parts, in_parts, largest_part, process_share
from .float16 import measure_precision
from .metrics import frechet_distance, mean_interval, psnr, ssim
from .report import EvaluationReport, LatentSummary, ModelSummary, PerImage, Protocol
from .swaps import measure_swaps

PACKAGES = (
    "diffusers-vae", "diffusers", "torch", "torchvision", "torchmetrics", "torch-fidelity", "numpy", "scipy", "pillow",
)  # fmt: skip


@dataclass(frozen=True)
class EvaluationConfig:
    """Figures and pictures, in a run from the EMA weights if it has any."""

    every: int | None = setting(None, "training", at_least=1)
    """Number of images between evaluations in a run; null: only one at the end."""
    max_images: int | None = setting(None, at_least=1)
    """Maximum number of held-out images to evaluate, and of training images for the statistics of the latents; null:
    all."""
    batch_size: int = setting(64, "free", at_least=1)
    """Maximum number of images per forward, also for pictures; halved as often as memory requires."""
    seed: int = setting(0, at_least=0, below=2**31)
    """Seed of the noise in the latents and of the samples from the prior."""
    reconstruction: Literal["mode", "sample"] = "mode"
    """What PSNR, SSIM, LPIPS and rFID measure: the decoded mode of the posterior, or a decoded sample from it."""
    round_to_8_bit: bool = True
    """Round reconstructions to 8 bits before PSNR, SSIM and LPIPS; false for a data.value_range (docs/images.md)."""
    draws: int = setting(1, at_least=1)
    """Number of posterior samples per image; two or more also give the importance-weighted bound."""
    lpips: tuple[Literal["alex", "vgg", "squeeze"], ...] = ()
    """Networks of LPIPS, whose published weights are downloaded to `$TORCH_HOME/hub/checkpoints` if missing."""
    rfid: bool = False
    """Measure the Frechet inception distance between images and reconstructions; its weights are downloaded like those
    of LPIPS."""

    def __post_init__(self):
        check("evaluation", self)
        if wrong := [name for name in self.lpips if name not in ("alex", "vgg", "squeeze")]:
            raise ValueError(f"evaluation.lpips must name alex, vgg or squeeze, or several, got {wrong[0]}")


Judges = tuple[dict[str, LPIPS], InceptionFeatures | None]


MEASURED_SOMETIMES = ("importance_weighted_bound", "lpips_alex", "lpips_vgg", "lpips_squeeze")
"""Figures of a report that are None unless settings enable them."""


def load_judges(config: EvaluationConfig, channels: int, size: tuple[int, int]) -> Judges:
    """Return the networks that `config` enables.

    Raises:
        FileNotFoundError: If weights are missing and cannot be downloaded.
        ValueError: If they cannot process images of `channels` and `size`.
    """
    lpips = {name: LPIPS(name) for name in config.lpips}
    inception = InceptionFeatures() if config.rfid else None
    for network in (*lpips.values(), *([inception] if inception else [])):
        network.check(channels, size)
    return lpips, inception


def log_prior_ratio(posterior: DiagonalGaussianDistribution, latents: torch.Tensor) -> torch.Tensor:
    """Return log p(latents) - log q(latents | image) per image (B,), nats. Its negative mean over samples is
    the rate.
    """
    ratio = 0.5 * (((latents - posterior.mean) / posterior.std) ** 2 + posterior.logvar - latents**2)
    return ratio.flatten(1).sum(1)


def reconstruct(
    model: ModelMixin, images: torch.Tensor, indices: Sequence[int], config: EvaluationConfig
) -> torch.Tensor:
    """Return reconstructions (B, C, H, W) in [-1, 1] of the images `indices`, as `config` specifies."""
    posterior = encode(model, images)
    latents = posterior.mode()
    if config.reconstruction == "sample":
        latents = next(draw(posterior, indices, config.seed, 1))
    return _as_compared(decode(model, latents), config)


def _as_compared(reconstructions: torch.Tensor, config: EvaluationConfig) -> torch.Tensor:
    clamped = reconstructions.clamp(-1, 1)
    if not config.round_to_8_bit:
        return clamped
    return to_model_range(to_uint8(clamped)).where(clamped.isfinite(), clamped)  # keep NaN, which would become black


@torch.no_grad()
def evaluate(
    model: ModelMixin,
    image_set: ImageSet,
    objective: VAEObjective,
    config: EvaluationConfig,
    data: DataConfig | None = None,
    split: str | None = None,
    name: str = "",
    progress: bool = False,
    fp16: bool = False,
) -> EvaluationReport:
    """Return the report of `model`, in eval mode, on the images. It can be any autoencoder of diffusers with
    `encode(...).latent_dist` and `decode(...).sample`. The samples for an image depend on the seed and its index.

    Under torch.distributed, all processes must call it with the same model. They share the work, and the report is
    bit-identical to one from a single process.

    Args:
        model: The model, on the device and in the dtype to measure.
        image_set: The images.
        objective: Objective whose terms are measured.
        config: Settings of the evaluation.
        data: Name of the data set, for the protocol.
        split: Part of the data set, for the protocol.
        name: Name of the model, for the report.
        progress: Whether to show a progress bar.
        fp16: Whether to also run the model in float16.

    Raises:
        FileNotFoundError: If weights for LPIPS or rFID are missing.
        ValueError: If no image can be read, the model does not take such images, or float16 is to be tested and even
            float32 activations are not finite.
    """
    if not len(image_set):
        raise ValueError("there must be at least one image to evaluate, got none")
    if config.rfid and min(len(image_set), config.max_images or 2) < 2:
        raise ValueError("the FID compares spreads: it needs at least two images, got one")
    stated = None if data is None else data.stated_range
    if stated:
        config = replace(config, round_to_8_bit=False)
    rank, processes = process_share()
    parts, statistics, networks = [], {}, {}
    judges: Judges | None = None
    count = min(len(image_set), config.max_images or len(image_set))
    with tqdm(total=count, desc="evaluation", unit="img", disable=not progress or rank > 0, leave=False) as bar:
        for part, indices, images in image_batches(
            image_set, config.batch_size, config.max_images, model.device, rank, processes
        ):
            if judges is None:
                judges = load_judges(config, images.shape[1], (images.shape[2], images.shape[3]))
                named = judges[0] | ({"inception": judges[1]} if judges[1] else {})
                networks = {name: weights_hash(network.to(model.device)) for name, network in named.items()}
            measured: list[Any] = in_parts(model, partial(_measure, model, objective, config, judges), images, indices)
            for counted, *_ in measured:
                statistics.setdefault(part, LatentStatistics()).add(counted)
            figures = {name: torch.cat([each[1][name] for each in measured]) for name in measured[0][1]}
            features = judges[1] and tuple(torch.cat([each[2][which] for each in measured]) for which in (0, 1))
            table = torch.stack([values.cpu().double() for values in figures.values()]).T.numpy()
            parts.append((indices[0], indices, list(figures), table, features, tuple(images.shape[1:])))
            bar.set_postfix({term: f"{figures[term].mean():.4g}" for term in ("distortion", "rate")}, refresh=False)
            bar.update(min(len(indices) * processes, count - bar.n))
    parts = gather_parts(parts)
    if not parts:
        raise ValueError("no image to evaluate can be read")
    statistics = total(statistics)
    indices = [index for part in parts for index in part[1]]
    table = np.concatenate([part[3] for part in parts])
    figures = {name: np.ascontiguousarray(table[:, column]) for column, name in enumerate(parts[0][2])}
    means = {name: float(values.sum() / len(values)) for name, values in figures.items()}
    channels, height, width = parts[0][5]
    per_dim, (per_unit, unit) = -1 / (math.log(2) * channels * height * width), _unit(objective, stated)
    intervals = {}
    if len(indices) > 1:
        intervals = {name: list(mean_interval(values)) for name, values in figures.items()}
        intervals["bits_per_dim"] = [bound * per_dim + per_unit for bound in intervals["elbo"][::-1]]
    rfid = None
    if config.rfid:
        rfid = frechet_distance(*(torch.cat([part[4][which] for part in parts]) for which in (0, 1)))
    precision = None
    if fp16:
        precision = measure_precision(model, image_set, config.batch_size, config.max_images, progress)
    swaps = measure_swaps(model, image_set, config.batch_size, config.max_images)
    described = getattr(model, "config", {})
    return EvaluationReport(
        images=len(indices),
        bits_per_dim=means["elbo"] * per_dim + per_unit,
        density=objective.likelihood.density + unit,
        kl_weight=objective.kl_weight,
        scale=cast(float | None, objective.scale),
        rfid=rfid,
        intervals=intervals,
        latents=LatentSummary(
            mean=statistics.latents_mean,
            std=statistics.latents_std,
            shift_factor=statistics.mean,
            scaling_factor=statistics.scaling_factor,
        ),
        posterior=statistics.health(swaps),
        model=ModelSummary(
            name=name,
            class_name=type(model).__qualname__,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            latent_shape=statistics.latent_shape(),
            scaling_factor=None if unmeasured(described) else described["scaling_factor"],
            shift_factor=None if unmeasured(described) else described.get("shift_factor"),
            weights_sha256=weights_hash(model),
        ),
        protocol=Protocol(
            data=None if data is None else data.described,
            split=split,
            images=len(indices),
            fingerprint=image_set.contents() or image_set.fingerprint(),
            resolution=[height, width],
            channels=channels,
            resize=None if data is None else data.resize,
            value_range=f"[-1, 1], which stands for {stated} in the files" if stated else "[-1, 1]",
            round_to_8_bit=config.round_to_8_bit,
            reconstruction=config.reconstruction,
            draws=config.draws,
            seed=config.seed,
            dtype=str(model.dtype).removeprefix("torch."),
            device=model.device.type,
            networks=networks,
            versions={"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
            batch_size=largest_part(model, config.batch_size),
        ),
        fp16=precision,
        per_image=PerImage(indices, [image_set.name(index) for index in indices], figures),
        **cast(dict[str, Any], dict.fromkeys(MEASURED_SOMETIMES) | means),
    )


def _unit(objective: VAEObjective, stated: ValueRange | None) -> tuple[float, str]:
    """Return the bits that the density's unit adds to each value in bits/dim, and a description of that unit."""
    if isinstance(objective.likelihood, Bernoulli):  # a probability has no unit
        return 0.0, ""
    if stated:
        return 0.0, "; bits/dim per unit of [-1, 1]"
    return math.log2(255 / 2), "; bits/dim per 8-bit level (2/255)"


def _measure(
    model: ModelMixin,
    objective: VAEObjective,
    config: EvaluationConfig,
    judges: Judges,
    images: torch.Tensor,
    indices: list[int],
) -> tuple[LatentStatistics, dict[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]:
    """Return statistics of the latents, the figures (B,) of each image by name, and the features of images and
    reconstructions if requested.
    """
    posterior, statistics = encode(model, images), LatentStatistics()
    statistics.update(posterior)
    distortions, log_weights, rate, reconstructions = [], [], None, None
    for latents in draw(posterior, indices, config.seed, config.draws):
        if isinstance(objective.likelihood, Bernoulli):
            logits = decode_logits(model, latents)
            decoded = to_model_range(logits.sigmoid())
            terms = objective(images, decoded, posterior, logits=logits)
        else:
            decoded = decode(model, latents)
            terms = objective(images, decoded, posterior)
        distortions.append(terms.distortion)
        rate = terms.rate
        log_weights.append(log_prior_ratio(posterior, latents).cpu().double() - terms.distortion.cpu().double())
        if reconstructions is None and config.reconstruction == "sample":
            reconstructions = decoded
    if reconstructions is None:
        reconstructions = decode(model, posterior.mode())
    reconstructions = _as_compared(reconstructions, config)
    assert rate is not None, "at least one sample"
    distortion = torch.stack(distortions).mean(0)
    left_out = objective.left_out() * images[0].numel()
    figures = {
        "loss": distortion - left_out + objective.kl_weight * rate,
        "distortion": distortion,
        "rate": rate,
        "elbo": -(distortion + rate),
        "psnr": psnr(images, reconstructions),
        "ssim": ssim(images, reconstructions),
    }
    if config.draws > 1:
        bound = torch.stack(log_weights).logsumexp(0) - math.log(config.draws)
        figures["importance_weighted_bound"] = bound
    for name, network in judges[0].items():
        figures[f"lpips_{name}"] = network(images, reconstructions)
    inception = judges[1]
    return statistics, figures, inception and (inception(images).cpu(), inception(reconstructions).cpu())
