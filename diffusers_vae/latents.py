"""Statistics of the latents over a data set: what makes them unit-scale for a diffusion model."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from .data import ImageSet, image_batches
from .metrics import gather_parts, process_share
from .models import MLPVAE, VAE


class LatentStatistics:
    """Mean and std of the latents over all images, channels and positions, streamed in float64.

    Of draws from the posterior, without drawing: by the law of total variance, the variance of the latents is that
    of the posteriors' means plus the mean of their variances. Rombach et al. 2022, appendix G, estimate it from the
    draws of one batch.
    """

    def __init__(self):
        self.count, self.sum, self.sum_of_squares = 0, 0.0, 0.0

    def update(self, posterior: DiagonalGaussianDistribution) -> None:
        """Count in the posterior of a batch of images."""
        mean, variance = posterior.mean.cpu().double(), posterior.var.cpu().double()
        self.count += mean.numel()
        self.sum += mean.sum().item()
        self.sum_of_squares += (mean**2 + variance).sum().item()

    def add(self, other: LatentStatistics) -> None:
        """Count in what `other` has counted."""
        self.count += other.count
        self.sum += other.sum
        self.sum_of_squares += other.sum_of_squares

    @property
    def mean(self) -> float:
        """Of the latents: the `shift_factor`."""
        return self.sum / self.count

    @property
    def std(self) -> float:
        """Of the latents."""
        return max(0.0, self.sum_of_squares / self.count - self.mean**2) ** 0.5

    @property
    def scaling_factor(self) -> float:
        """1 / std: (latents - shift_factor) * scaling_factor has mean 0 and std 1 over the data set."""
        return 1 / self.std


@torch.no_grad()
def measure_latents(
    model: VAE | MLPVAE, image_set: ImageSet, batch_size: int, max_images: int | None = None
) -> LatentStatistics:
    """Statistics of the latents of the first `max_images` images, by default all, under `model` in eval mode.

    Under torch.distributed all processes must call it, with the same model; they share the work, and the statistics
    are those of one process.
    """
    parts = []
    for indices, images in image_batches(image_set, batch_size, max_images, model.device, *process_share()):
        parts.append((indices[0], LatentStatistics()))
        parts[-1][1].update(model.encode(images).latent_dist)
    parts = gather_parts(parts)
    if not parts:
        raise ValueError("no image to measure the latents of can be read")
    statistics = LatentStatistics()
    for _, part in parts:
        statistics.add(part)
    return statistics
