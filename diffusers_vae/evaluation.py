"""Model and held-out images to numbers."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .data import ImageSet, image_batches
from .metrics import psnr, ssim
from .models import MLPVAE, VAE
from .objective import VAEObjective


@dataclass(frozen=True)
class EvaluationConfig:
    """Measuring and picturing during a run, always with the EMA weights when there are any, in float32."""

    every: int | None = None
    """Images between two evaluations; by default there is one, at the end."""
    max_images: int | None = None
    """At most this many held-out images are measured, and as many training images for the statistics of the latents,
    always the first ones; by default all."""
    batch_size: int = 250
    """Images per forward."""
    seed: int = 0
    """Of the noise in the latents and of the samples from the prior."""

    def __post_init__(self):
        for name in ("every", "max_images", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"evaluation.{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class EvaluationReport:
    """Means over the images. Distortion, rate, elbo and loss are of one draw from the posterior per image; PSNR and
    SSIM of the reconstruction from its mode, clamped to [-1, 1] and not rounded.
    """

    images: int
    """How many were measured."""
    loss: float
    """As trained: distortion without its constant + kl_weight * rate, nats per image."""
    distortion: float
    """-log p(image | latents) with its constant, nats per image."""
    rate: float
    """KL to the prior, nats per image."""
    elbo: float
    """-(distortion + rate), nats per image."""
    bits_per_dim: float
    """-elbo / (ln 2 * C * H * W)."""
    density: str
    """What distortion, elbo and bits_per_dim are the likelihood of."""
    psnr: float
    """Peak signal-to-noise ratio, dB."""
    ssim: float
    """Structural similarity."""
    resolution: tuple[int, int]
    """Height and width of the images."""
    seed: int
    """Of the draws."""

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


@torch.no_grad()
def evaluate(
    model: VAE | MLPVAE, images: ImageSet, objective: VAEObjective, config: EvaluationConfig
) -> EvaluationReport:
    """The report of `model`, in eval mode, over `images`. The draw for an image depends on the seed and its index."""
    sums = torch.zeros(5, dtype=torch.float64)
    count = 0
    generator = torch.Generator()
    for indices, batch in image_batches(images, config.batch_size, config.max_images, model.device):
        posterior = model.encode(batch).latent_dist
        shape = posterior.mean.shape[1:]
        noise = torch.stack([torch.randn(shape, generator=generator.manual_seed(config.seed + i)) for i in indices])
        terms = objective(batch, model.decode(posterior.mean + posterior.std * noise.to(batch)).sample, posterior)
        reconstructions = model.decode(posterior.mode()).sample
        per_image = (terms.distortion, terms.rate, psnr(batch, reconstructions), ssim(batch, reconstructions))
        sums += torch.stack([terms.loss.cpu().double() * len(batch)] + [t.cpu().double().sum() for t in per_image])
        count += len(batch)
    loss, distortion, rate, mean_psnr, mean_ssim = (sums / count).tolist()
    return EvaluationReport(
        images=count,
        loss=loss,
        distortion=distortion,
        rate=rate,
        elbo=-(distortion + rate),
        bits_per_dim=(distortion + rate) / (math.log(2) * batch[0].numel()),
        density=objective.likelihood.density,
        psnr=mean_psnr,
        ssim=mean_ssim,
        resolution=tuple(batch.shape[2:]),
        seed=config.seed,
    )
