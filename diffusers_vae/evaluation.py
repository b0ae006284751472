"""Model and held-out images to numbers."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

import numpy as np
import torch

from .data import ImageSet, image_batches
from .metrics import gather_parts, process_share, psnr, ssim
from .models import MLPVAE, VAE
from .objective import VAEObjective


@dataclass(frozen=True)
class EvaluationConfig:
    """Measuring and picturing during a run, always with the EMA weights when there are any, in float32."""

    every: int | None = None
    """Images between two evaluations; by default there is one, at the end."""
    max_images: int | None = None
    """At most this many held-out images are measured, and as many training images for the statistics of the latents,
    always the same; by default all."""
    batch_size: int = 64
    """Images per forward, of pictures too."""
    seed: int = 0
    """Of the noise in the latents and of the samples from the prior."""

    def __post_init__(self):
        for name in ("every", "max_images", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"evaluation.{name} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"evaluation.seed must lie in [0, 2^31), got {self.seed}")


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

    def to_json(self) -> str:
        """The report as evaluation.json holds it; ValueError when a number in it is not finite."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> EvaluationReport:
        """The report that `to_json` gave; ValueError when it is none."""
        try:
            values = json.loads(text)
            return cls(**values | {"resolution": tuple(values["resolution"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"no evaluation report: {error}") from error


@torch.no_grad()
def evaluate(
    model: VAE | MLPVAE, image_set: ImageSet, objective: VAEObjective, config: EvaluationConfig
) -> EvaluationReport:
    """The report of `model`, in eval mode, over the images. The draw for an image depends on the seed and its index.

    Under torch.distributed all processes must call it, with the same model; they share the work, and the report is
    that of one process.

    Raises:
        ValueError: when there is no image, or the model is not float32.
    """
    if not len(image_set):
        raise ValueError("there must be at least one image to evaluate, got none")
    if model.dtype != torch.float32:
        raise ValueError(f"a model is evaluated in float32, got one in {model.dtype}; convert it with model.float()")
    parts = []
    generator = torch.Generator()
    batches = image_batches(image_set, config.batch_size, config.max_images, model.device, *process_share())
    for indices, images in batches:
        posterior = model.encode(images).latent_dist
        noise = []
        for index in indices:
            generator.manual_seed(int(np.random.SeedSequence([config.seed, index]).generate_state(1)[0]))
            noise.append(torch.randn(posterior.mean.shape[1:], generator=generator))
        latents = posterior.mean + posterior.std * torch.stack(noise).to(images)
        terms = objective(images, model.decode(latents).sample, posterior)
        reconstructions = model.decode(posterior.mode()).sample
        similarity = psnr(images, reconstructions), ssim(images, reconstructions)
        loss = terms.loss.expand(len(images))
        per_image = torch.stack([loss, terms.distortion, terms.rate, terms.elbo, *similarity])
        parts.append((indices[0], per_image.cpu().double().T, tuple(images.shape[1:])))
    parts = gather_parts(parts)
    if not parts:
        raise ValueError("no image to evaluate can be read")
    of_images = torch.cat([figures for _, figures, _ in parts])
    channels, height, width = parts[0][2]
    loss, distortion, rate, elbo, mean_psnr, mean_ssim = (of_images.sum(0) / len(of_images)).tolist()
    return EvaluationReport(
        images=len(of_images),
        loss=loss,
        distortion=distortion,
        rate=rate,
        elbo=elbo,
        bits_per_dim=-elbo / (math.log(2) * channels * height * width),
        density=objective.likelihood.density,
        psnr=mean_psnr,
        ssim=mean_ssim,
        resolution=(height, width),
        seed=config.seed,
    )
