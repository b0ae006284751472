"""Statistics of the latents over a data set: what makes them unit-scale for a diffusion model."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from .data import ImageSet, image_batches
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
    """Statistics of the latents of the first `max_images` images, by default all, under `model` in eval mode."""
    statistics = LatentStatistics()
    for _, images in image_batches(image_set, batch_size, max_images, model.device):
        statistics.update(model.encode(images).latent_dist)
    return statistics
