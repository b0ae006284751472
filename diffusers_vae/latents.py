"""Statistics of the latents over a data set: what makes them unit-scale for a diffusion model, and how the posterior
uses them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_utils import ModelMixin
from tqdm import tqdm

from .data import ImageSet, image_batches
from .models import encode
from .objective import rate_per_unit
from .processes import gather_parts, process_share

ACTIVE = 0.01
"""Variance of a unit's posterior mean over the data above which Burda et al. 2016, section 5.2, call it active."""
COLLAPSED = 0.01
"""Nats: a unit, or the mean of a channel's, with a smaller rate tells next to nothing of the image."""
EXPLODED = 20.0
"""Std of a channel's latents above which the prior has lost its hold; published models lie between 1 and 6."""


class LatentStatistics:
    """Sums over images of what describes the latents, unit by unit, streamed in float64.

    The latents are draws from the posterior, but nothing is drawn: by the law of total variance, their variance is that
    of the posteriors' means plus the mean of their variances. (Rombach et al. 2022, appendix G, estimate it from the
    draws of one batch.)
    """

    def __init__(self):
        self.images = 0
        self.sums: torch.Tensor | None = None
        """Of mean, mean squared, variance and rate, (4, channels, height, width)."""

    def update(self, posterior: DiagonalGaussianDistribution) -> None:
        """Count in the posterior of a batch of images."""
        exact = torch.float32 if posterior.mean.device.type == "mps" else torch.float64
        mean, variance, rate = (t.to(exact) for t in (posterior.mean, posterior.var, rate_per_unit(posterior)))
        sums = torch.stack([mean.sum(0), (mean**2).sum(0), variance.sum(0), rate.sum(0)]).cpu().double()
        self.images += len(mean)
        self.sums = sums if self.sums is None else self.sums + sums

    def add(self, other: LatentStatistics) -> None:
        """Count in what `other` has counted."""
        if other.sums is not None:
            self.images += other.images
            self.sums = other.sums if self.sums is None else self.sums + other.sums

    def _moments(self, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and std of the latents, over images and the dimensions `dims` of (channels, height, width)."""
        mean, square, variance, _ = self.sums / self.images
        mean, square = (t.mean(dims) if dims else t for t in (mean, square + variance))
        return mean, (square - mean**2).clamp(min=0).sqrt()

    @property
    def mean(self) -> float:
        """Of the latents over all channels and positions: the `shift_factor`."""
        return self._moments((0, 1, 2))[0].item()

    @property
    def std(self) -> float:
        """Of the latents over all channels and positions."""
        return self._moments((0, 1, 2))[1].item()

    @property
    def scaling_factor(self) -> float:
        """1 / std: (latents - shift_factor) * scaling_factor has mean 0 and std 1 over the data set."""
        return 1 / self.std if self.std else math.inf

    @property
    def latents_mean(self) -> list[float]:
        """Of each channel."""
        return self._moments((1, 2))[0].tolist()

    @property
    def latents_std(self) -> list[float]:
        """Of each channel: (latents - latents_mean) / latents_std has mean 0 and std 1 in every channel."""
        return self._moments((1, 2))[1].tolist()

    def health(self) -> PosteriorHealth:
        """How the posterior uses the latents."""
        mean, square, _, rate = self.sums / self.images
        unit_mean, unit_std = self._moments(())
        active = square - mean**2 > ACTIVE
        channels = (rate.mean((1, 2)) < COLLAPSED) | ~active.any(2).any(1)
        measured = {
            "units": mean.numel(),
            "active_units": int(active.sum()),
            "collapsed_share": (rate < COLLAPSED).double().mean().item(),
            "collapsed_channels": channels.nonzero().flatten().tolist(),
            "rate_per_channel": rate.sum((1, 2)).tolist(),
            "rate_per_position": rate.sum(0).tolist(),
            "aggregate_distance": (unit_mean**2 + (unit_std - 1) ** 2).mean().sqrt().item(),
        }
        verdict, advice = _verdict(measured, max(self.latents_std), self.images)
        return PosteriorHealth(**measured, verdict=verdict, advice=advice)


@dataclass(frozen=True)
class PosteriorHealth:
    """How the posterior uses the latents; a unit is one channel at one position."""

    units: int
    """Latent units."""
    active_units: int
    """Units whose posterior mean varies over the images with a variance above 0.01: Burda et al. 2016, section 5.2."""
    collapsed_share: float
    """Share of the units with a rate below 0.01 nats: their posterior is the prior, whatever the image."""
    collapsed_channels: list[int]
    """Channels that tell nothing of the image, from 0: with a mean rate below 0.01 nats a unit, or without an active
    unit, since a rate that is the same for all images tells nothing either."""
    rate_per_channel: list[float]
    """Nats per image, summed over the channel's positions; their sum is the rate."""
    rate_per_position: list[list[float]]
    """Nats per image, summed over the channels, height by width; their sum is the rate."""
    aggregate_distance: float
    """Of the aggregate posterior, the mean of all images' posteriors, from N(0, I): the 2-Wasserstein distance between
    normals of each unit's mean m and std s and N(0, 1), sqrt(m^2 + (s - 1)^2), as root mean square over the units; 0
    is best. What units have in common does not show in it."""
    verdict: str
    """healthy, partly collapsed, collapsed or exploding; of one image, unknown."""
    advice: str
    """What the verdict means, and what to change."""


def _verdict(measured: dict[str, Any], largest_std: float, images: int) -> tuple[str, str]:
    count, collapsed = len(measured["rate_per_channel"]), measured["collapsed_channels"]
    kind = "unit" if measured["units"] == count else "channel"
    if images < 2:
        return "unknown", "What the latents tell of an image shows in how they differ between images: measure more."
    if not largest_std < EXPLODED:  # or not a number
        return "exploding", (
            f"The latents of a channel have std {largest_std:.3g}, where N(0, I) has 1: the rate hardly counts in the "
            "loss. Raise objective.kl_weight or objective.scale, or lower optimizer.learning_rate."
        )
    if collapsed:
        which = f"{kind}s {', '.join(map(str, collapsed[:20]))}{' ...' * (len(collapsed) > 20)}"
        lower = "lower objective.kl_weight or objective.scale"
        if len(collapsed) == count:
            return "collapsed", (
                f"No {kind} tells anything of the image: to the decoder, all look the same. Start again and {lower}; a "
                "kl_weight that rises slowly helps too."
            )
        return "partly collapsed", (
            f"{len(collapsed)} of {count} {kind}s tell nothing of the image ({which}: less than {COLLAPSED} nats a "
            f"unit, or the same for all images). To use them, {lower}; else the model can do with fewer."
        )
    advice = f"Every {kind} carries information, at a scale near the prior's; nothing to change."
    if measured["aggregate_distance"] > 0.5:
        advice = (
            f"Every {kind} carries information. Taken together, the latents are not N(0, I) "
            f"(distance {measured['aggregate_distance']:.2f}), so that draws from the prior do not decode to images: "
            "train a diffusion model on the scaled latents or, to draw from the prior, raise objective.kl_weight."
        )
    return "healthy", advice


@torch.no_grad()
def measure_latents(
    model: ModelMixin, image_set: ImageSet, batch_size: int, max_images: int | None = None, progress: bool = False
) -> LatentStatistics:
    """Statistics of the latents of the first `max_images` images, by default all, under `model` in eval mode.

    Under torch.distributed all processes must call it, with the same model; they share the work, and the statistics
    are those of one process.
    """
    count = len(image_set) if max_images is None else min(max_images, len(image_set))
    parts: dict[int, LatentStatistics] = {}
    with tqdm(total=count, desc="latents", unit="img", disable=not progress, leave=False) as bar:
        for part, indices, images in image_batches(image_set, batch_size, max_images, model.device, *process_share()):
            parts.setdefault(part, LatentStatistics()).update(encode(model, images))
            bar.update(len(indices) * process_share()[1])
    return total(parts)


def total(parts: dict[int, LatentStatistics]) -> LatentStatistics:
    """The statistics of the parts of all processes, summed in one order whatever their number."""
    gathered = gather_parts(list(parts.items()))
    if not gathered:
        raise ValueError("no image to measure the latents of can be read")
    statistics = LatentStatistics()
    for _, part in gathered:
        statistics.add(part)
    return statistics


def draw(
    posterior: DiagonalGaussianDistribution, indices: Sequence[int], seed: int, draws: int
) -> Iterator[torch.Tensor]:
    """Latents (B, C, h, w) of the images `indices`, `draws` times: pure functions of seed, index and draw."""
    seeds = [int(np.random.SeedSequence([seed, index]).generate_state(1)[0]) for index in indices]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(draws):
        noise = torch.stack([torch.randn(posterior.mean.shape[1:], generator=generator) for generator in generators])
        yield posterior.mean + posterior.std * noise.to(posterior.mean)
