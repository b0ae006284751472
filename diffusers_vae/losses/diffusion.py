"""Training objective of a denoiser: mathematics on tensors, independent of models and trainers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import compute_snr

from ..fields import check, setting


@dataclass(frozen=True)
class DiffusionConfig:
    """Noise schedule, and the prediction of the denoiser.

    The noise schedule is Stable Diffusion's: 1,000 timesteps, beta from 0.00085 to 0.012, linear in its square root.
    """

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """What the denoiser predicts: the noise (Ho et al. 2020), or sqrt(a) noise - sqrt(1 - a) latents (Salimans & Ho
    2022)."""
    min_snr_gamma: float | None = setting(None, above=0)
    """Signal-to-noise ratio above which timesteps have less weight (min-SNR, Hang et al. 2023: 5); null: equal
    weights."""
    caption_dropout: float = setting(0.1, at_least=0, below=1)
    """Fraction of images with an empty prompt, for classifier-free guidance (Ho & Salimans 2022)."""

    def __post_init__(self):
        check("diffusion", self)

    def build(self) -> DiffusionObjective:
        return DiffusionObjective(self.prediction_type, self.min_snr_gamma)


@dataclass(frozen=True)
class DiffusionTerms:
    loss: torch.Tensor
    """Weighted squared error, mean over images and latent units; scalar."""
    error: torch.Tensor
    """Unweighted squared error per image (B,), mean over its latent units; 1 for a prediction of 0."""


class DiffusionObjective:
    """Squared error of the denoiser's prediction (Ho et al. 2020, equation 14)."""

    def __init__(self, prediction_type: str = "epsilon", min_snr_gamma: float | None = None):
        self.min_snr_gamma = min_snr_gamma
        self.velocity = prediction_type == "v_prediction"
        scheduler: Any = DDPMScheduler  # its methods are typed for IntTensor
        self.scheduler = scheduler(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            clip_sample=False,  # latents are not pixels: clipping them at 1 makes guided images worse
            steps_offset=1,
        )

    def noisy(self, scaled_latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return sqrt(a) scaled_latents + sqrt(1 - a) noise (B, C, h, w) with the a of each image's timestep (B,)."""
        return self.scheduler.add_noise(scaled_latents, noise, timesteps)

    def __call__(
        self, prediction: torch.Tensor, scaled_latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> DiffusionTerms:
        """Return the terms for the denoiser's prediction (B, C, h, w) at noisy(scaled_latents, noise, timesteps)."""
        if prediction.shape != noise.shape:
            raise ValueError(f"prediction and noise must have one shape, got {prediction.shape} and {noise.shape}")
        target = self.scheduler.get_velocity(scaled_latents, noise, timesteps) if self.velocity else noise
        error = ((prediction.float() - target) ** 2).flatten(1).mean(1)
        return DiffusionTerms(loss=(self.weights(timesteps) * error).mean(), error=error)

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return weights (B,): min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v (Hang 2023, section
        3.4).
        """
        if self.min_snr_gamma is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        snr = compute_snr(self.scheduler, timesteps)
        clipped = snr.clamp(max=self.min_snr_gamma)
        return clipped / (snr + 1 if self.velocity else snr)
