"""Statistics of latents over a data set, and the health of the posterior."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from tqdm import tqdm

from ..data import ImageSet, image_batches
from ..losses.objective import rate_per_unit
from ..models import check_batch, encode
from ..models.stock import ModelMixin
from ..processes import gather_parts, in_parts, process_share

ACTIVE = 0.01  # variance of a unit's posterior mean above which it is active: Burda et al. 2016, section 5.2
EMPTY = 0.01  # rate in nats below which a unit's posterior counts as equal to the prior
UNUSED = 0.05  # dB of PSNR: a channel is unused if swapping it with another image's costs less
UNUSED_INFORMATION = 0.1  # nats per image: without a decoder, a channel is unused if it holds less
POOR = 3.0  # dB of PSNR: reconstructions are poor if swapping all latents costs less
POOR_COLOUR = 1.0  # dB, the same for the colour error alone
EXPLODED = 20.0  # std of a channel that the prior does not constrain; published models: 0.65 to 7.7
SLACK = 1e-3  # tolerance of images beyond [-1, 1], for rounding


class LatentStatistics:
    """Per-unit sums over images, accumulated in float64.

    The statistics are those of samples from the posterior, without sampling: by the law of total variance, their
    variance is the variance of the posteriors' means plus the mean of the posteriors' variances. (Rombach et al. 2022,
    appendix G, estimate it from one batch.)
    """

    def __init__(self):
        self.images = 0
        self.sums: torch.Tensor | None = None
        """Sums of mean, squared mean, variance and rate, (4, channels, height, width)."""

    def update(self, posterior: DiagonalGaussianDistribution) -> LatentStatistics:
        """Add the posterior of a batch of images, and return these statistics."""
        exact = torch.float32 if posterior.mean.device.type == "mps" else torch.float64
        mean, variance, rate = (t.to(exact) for t in (posterior.mean, posterior.var, rate_per_unit(posterior)))
        sums = torch.stack([mean.sum(0), (mean**2).sum(0), variance.sum(0), rate.sum(0)]).cpu().double()
        self.images += len(mean)
        self.sums = sums if self.sums is None else self.sums + sums
        return self

    def add(self, other: LatentStatistics) -> None:
        """Add the sums of `other`."""
        if other.sums is not None:
            self.images += other.images
            self.sums = other.sums if self.sums is None else self.sums + other.sums

    def _means(self) -> torch.Tensor:
        assert self.sums is not None, "statistics of at least one image"
        return self.sums / self.images

    def latent_shape(self) -> list[int]:
        """Return channels, height and width."""
        return list(self._means().shape[1:])

    def _moments(self, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and std of the latents, over images and the dimensions `dims` of (channels, height, width)."""
        mean, square, variance, _ = self._means()
        mean, square = (t.mean(dims) if dims else t for t in (mean, square + variance))
        return mean, (square - mean**2).clamp(min=0).sqrt()

    @property
    def mean(self) -> float:
        """Return the mean of the latents over all channels and positions: the `shift_factor`."""
        return self._moments((0, 1, 2))[0].item()

    @property
    def std(self) -> float:
        """Return the std of the latents over all channels and positions."""
        return self._moments((0, 1, 2))[1].item()

    @property
    def scaling_factor(self) -> float:
        """Return 1 / std: (latents - shift_factor) * scaling_factor has mean 0 and std 1 over the data set."""
        return 1 / self.std if self.std else math.inf

    @property
    def latents_mean(self) -> list[float]:
        """Return the mean of each channel."""
        return self._moments((1, 2))[0].tolist()

    @property
    def latents_std(self) -> list[float]:
        """Return the std of each channel: (latents - latents_mean) / latents_std has mean 0 and std 1 per channel."""
        return self._moments((1, 2))[1].tolist()

    def health(self, swaps: SwapCosts | None = None) -> PosteriorHealth:
        """Return a summary of how the posterior and, given `swaps`, the decoder use the latents.

        A channel's information, an upper bound of what distinguishes images, is its rate minus the KL divergence of the
        aggregate posterior from the prior, assuming that each unit is normal: 0.5 * (log variance over the images -
        mean log variance of the posteriors). Like `swaps`, it does not depend on the scale of the latents.
        """
        mean, square, variance, rate = self._means()
        unit_mean, unit_std = self._moments(())
        log_variance = square + variance - 1 - 2 * rate  # its mean, by the definition of the rate
        information = 0.5 * (2 * unit_std.log() - log_variance).clamp(min=0)
        per_channel = torch.where(unit_std > 0, information, 0.0).sum((1, 2)).tolist()
        unused: list[int] = []
        if swaps is None and self.images > 1:
            unused = [channel for channel, nats in enumerate(per_channel) if nats < UNUSED_INFORMATION]
        elif swaps is not None:
            unused = [channel for channel, cost in enumerate(swaps.channels) if cost < UNUSED]
        measured: dict[str, Any] = {
            "units": mean.numel(),
            "active_units": int((square - mean**2 > ACTIVE).sum()),
            "empty_share": (rate < EMPTY).double().mean().item(),
            "unused_channels": unused,
            "rate_per_channel": rate.sum((1, 2)).tolist(),
            "information_per_channel": per_channel,
            "rate_per_position": rate.sum(0).tolist(),
            "aggregate_distance": (unit_mean**2 + (unit_std - 1) ** 2).mean().sqrt().item(),
            "swaps": swaps,
        }
        verdict, advice = _verdict(measured, max(self.latents_std), self.images)
        return PosteriorHealth(**measured, verdict=verdict, advice=advice)


@dataclass(frozen=True)
class SwapCosts:
    """Mean PSNR in dB that reconstructions from the posterior's mode lose with latents of another image: a measure of
    what the decoder uses, independent of the scale of the latents.
    """

    images: int
    """Number of reconstructed images: at most 64, spread evenly over those measured."""
    all: float
    """PSNR lost, in dB, with all latents of another image."""
    colour: float | None
    """Growth in dB of the colour error (image channels minus their mean) with all latents of another image; None for
    grey images."""
    channels: list[float]
    """PSNR lost, in dB, with one latent channel of another image, for each channel."""


@dataclass(frozen=True)
class PosteriorHealth:
    """Use of the latents by the posterior. A unit is one channel at one position."""

    units: int
    """Number of latent units."""
    active_units: int
    """Number of units whose posterior mean has a variance above 0.01 over the images: Burda et al. 2016,
    section 5.2."""
    empty_share: float
    """Share of units with a rate below 0.01 nats, whose posterior equals the prior."""
    unused_channels: list[int]
    """Channels, from 0, that cost less than 0.05 dB to swap with another image's or, without `swaps`, hold less than
    0.1 nats of information. Empty for one image."""
    rate_per_channel: list[float]
    """Rate per channel, nats per image, summed over positions; their sum is the rate."""
    information_per_channel: list[float]
    """Information per channel, nats per image: an upper bound of the part of the rate that is not common to all
    images."""
    rate_per_position: list[list[float]]
    """Rate per position (height, width), nats per image, summed over channels; their sum is the rate."""
    aggregate_distance: float
    """Distance of the aggregate posterior, the mean of all images' posteriors, from N(0, I): root mean square over the
    units of the 2-Wasserstein distance sqrt(m^2 + (s - 1)^2) of N(m, s^2) from N(0, 1). It ignores dependence between
    units."""
    swaps: SwapCosts | None
    """PSNR lost with latents of another image; None without a decoder."""
    verdict: str
    """healthy, partly collapsed, collapsed, poor reconstruction or exploding; unknown for one image."""
    advice: str
    """Meaning of the verdict, and what to change."""


def _verdict(measured: dict[str, Any], largest_std: float, images: int) -> tuple[str, str]:
    count, unused, swaps = len(measured["rate_per_channel"]), measured["unused_channels"], measured["swaps"]
    kind = "unit" if measured["units"] == count else "channel"
    if images < 2:
        return "unknown", "A verdict needs at least two images: measure more."
    if not largest_std < EXPLODED:  # also true for NaN
        return "exploding", (
            f"The latents of a channel have std {largest_std:.3g}, where N(0, I) has 1: the rate hardly counts in the "
            "loss. Raise objective.kl_weight or objective.scale, or lower optimizer.learning_rate."
        )
    information = sum(measured["information_per_channel"])
    lower = "lower objective.kl_weight or objective.scale"
    used = swaps is not None and swaps.all >= POOR
    if len(unused) == count and information < max(1.0, EMPTY * measured["units"]) and not used:
        return "collapsed", (
            f"No {kind} distinguishes images: to the decoder, they all look the same. Train again and {lower}; a "
            "kl_weight that rises slowly (objective.kl_schedule) helps, too."
        )
    if swaps and swaps.all < POOR:
        return "poor reconstruction", (
            "Reconstructions hardly resemble their images: with the latents of another image, the PSNR falls by only "
            f"{swaps.all:.2f} dB. The latents hold up to {information:.1f} nats, which the decoder hardly uses: train "
            f"longer or with a higher optimizer.learning_rate, or {lower}."
        )
    if swaps and swaps.colour is not None and swaps.colour < POOR_COLOUR:
        return "poor reconstruction", (
            "Reconstructions hardly show the colours of their images: with the latents of another image, the error of "
            f"the colours changes by only {swaps.colour:.2f} dB. Train longer or with a higher "
            f"optimizer.learning_rate, or {lower}."
        )
    if swaps and used and len(unused) == count:
        return "partly collapsed", (
            f"Taking any one of the {count} {kind}s from another image costs less than {UNUSED} dB, but all of them "
            f"together cost {swaps.all:.2f} dB: they hold the same information. A model with fewer does as well."
        )
    if unused:
        which = f"{kind}s {', '.join(map(str, unused[:20]))}{' ...' * (len(unused) > 20)}"
        why = f"using another image's costs less than {UNUSED} dB" if swaps else "they hold hardly any information"
        normal = "This is normal in a network with more units than the images need. " if kind == "unit" else ""
        return "partly collapsed", (
            f"{len(unused)} of {count} {kind}s are unused ({which}): {why}. {normal}To use them, {lower}; otherwise, a "
            "model with fewer does as well."
        )
    advice = f"Every {kind} carries information that the decoder uses; nothing to change."
    if measured["aggregate_distance"] > 0.5:
        advice = (
            f"Every {kind} carries information that the decoder uses. Taken together, the latents are not N(0, I) "
            f"(distance {measured['aggregate_distance']:.2f}), so samples from the prior do not decode to images: "
            "train a diffusion model on the scaled latents or, to sample from the prior, raise objective.kl_weight."
        )
    return "healthy", advice


def measure_latents(
    vae: ModelMixin, images: torch.Tensor | Iterable[torch.Tensor] | ImageSet, batch_size: int = 64
) -> LatentStatistics:
    """Measure the latents of `images` in eval mode and write scaling_factor and shift_factor into the config of `vae`,
    as `diffusers-vae train` does at the end of a run. latents_mean and latents_std become None. The mode is restored;
    save the model afterwards. Under torch.distributed, all processes must call it with the same model, each with its
    part of the images or all with the same images.

    Args:
        vae: A `VAE`, an `MLPVAE`, or a stock autoencoder whose config has a scaling_factor, on the device to use.
        images: The training images: a float tensor (N, C, H, W) in [-1, 1], an iterable of such batches, such as a
            DataLoader, or an image set of this package.
        batch_size: Images per forward; ignored if `images` is an iterable of batches.

    Raises:
        FloatingPointError: If mean or std of the latents is not finite, or std is 0. The config is then unchanged.
        TypeError: If `vae` is not an autoencoder with a scaling_factor, or a batch is not a tensor.
        ValueError: If there are no images, or some are outside [-1, 1] or have a wrong shape or dtype.
    """
    if "scaling_factor" not in getattr(vae, "config", ()):
        raise TypeError(
            "measure_latents takes an autoencoder whose config has a scaling_factor, such as diffusers_vae.VAE or "
            f"diffusers' AutoencoderKL, got {type(vae).__name__}; if it is wrapped, pass the model inside"
        )
    training = [module for module in vae.modules() if module.training]
    vae.eval()
    try:
        if isinstance(images, ImageSet):
            statistics = image_set_statistics(vae, images, batch_size)
        else:
            batches = images.split(batch_size) if isinstance(images, torch.Tensor) else images
            statistics = total(_sums(vae, batches))
    finally:
        for module in training:
            module.training = True
    describe_latents(vae, statistics)
    return statistics


@torch.no_grad()
def _sums(vae: ModelMixin, batches: Iterable[torch.Tensor]) -> dict[int, LatentStatistics]:
    """Return the statistics of this process's batches by its rank; empty if it has none."""
    statistics, size = LatentStatistics(), None
    for images in batches:
        if not isinstance(images, torch.Tensor):
            raise TypeError(
                f"batches of images must be tensors (B, C, H, W), got {type(images).__name__}; if a DataLoader also "
                "yields labels, pass (images for images, labels in loader)"
            )
        check_batch(images, vae.config.get("in_channels", images.shape[1:2].numel()), "images")
        if not len(images):
            continue
        low, high = images.min().item(), images.max().item()
        if not max(-low, high) <= 1 + SLACK:  # also true for NaN
            raise ValueError(f"images must be finite and lie in [-1, 1], got values from {low:g} to {high:g}")
        if size not in (None, tuple(images.shape[2:])):
            raise ValueError(f"images must all be of one size, got {size} and {tuple(images.shape[2:])}")
        size = tuple(images.shape[2:])
        statistics.update(encode(vae, images.to(vae.device)))
    return {process_share()[0]: statistics} if size else {}


def describe_latents(model: ModelMixin, statistics: LatentStatistics | None) -> None:
    """Write scaling_factor and shift_factor into the model's config, or None without statistics. latents_mean and
    latents_std become None, because stock pipelines apply them in addition to scaling_factor. FloatingPointError if
    mean or std is not finite, or std is 0.
    """
    values = dict.fromkeys(("scaling_factor", "shift_factor", "latents_mean", "latents_std"))
    if statistics is not None:
        if not (math.isfinite(statistics.mean) and 0 < statistics.std < math.inf):
            raise FloatingPointError(
                f"the latents have mean {statistics.mean} and std {statistics.std}: both must be finite and std above 0"
            )
        values |= {"scaling_factor": statistics.scaling_factor, "shift_factor": statistics.mean}
    model.register_to_config(**{name: value for name, value in values.items() if name in model.config})


@torch.no_grad()
def image_set_statistics(
    model: ModelMixin, image_set: ImageSet, batch_size: int, max_images: int | None = None, progress: bool = False
) -> LatentStatistics:
    """Return statistics of the latents of the first `max_images` images, by default all, under `model` in eval mode.
    Under torch.distributed, all processes must call it with the same model; they share the work and get the same result
    as one process.
    """
    count = len(image_set) if max_images is None else min(max_images, len(image_set))
    parts: dict[int, LatentStatistics] = {}
    with tqdm(total=count, desc="latents", unit="img", disable=not progress, leave=False) as bar:
        for part, indices, images in image_batches(image_set, batch_size, max_images, model.device, *process_share()):
            for counted in in_parts(model, lambda batch: LatentStatistics().update(encode(model, batch)), images):
                parts.setdefault(part, LatentStatistics()).add(counted)
            bar.update(len(indices) * process_share()[1])
    return total(parts)


def total(parts: dict[int, LatentStatistics]) -> LatentStatistics:
    """Return the statistics of the parts of all processes, summed in an order that does not depend on their number."""
    statistics = LatentStatistics()
    for _, part in gather_parts(list(parts.items())):
        statistics.add(part)
    if not statistics.images:
        raise ValueError("there is no image to measure the latents of, or none that can be read")
    return statistics


def draw(
    posterior: DiagonalGaussianDistribution, indices: Sequence[int], seed: int, draws: int
) -> Iterator[torch.Tensor]:
    """Yield `draws` samples (B, C, h, w) for the images `indices`: functions of seed, index and number of the sample
    only.
    """
    seeds = [int(np.random.SeedSequence([seed, index]).generate_state(1)[0]) for index in indices]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(draws):
        noise = torch.stack([torch.randn(posterior.mean.shape[1:], generator=generator) for generator in generators])
        yield posterior.mean + posterior.std * noise.to(posterior.mean)
