"""Posterior of images, its latents, and the checks that both architectures share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import BaseOutput

from .stock import ModelMixin


@dataclass
class VAEOutput(BaseOutput):
    """Reconstructions (B, C, H, W) in [-1, 1] and the posterior that they were decoded from."""

    sample: torch.Tensor
    latent_dist: DiagonalGaussianDistribution


def posterior_from_moments(moments: torch.Tensor) -> DiagonalGaussianDistribution:
    """Return q(z|x) in at least float32: bfloat16 loses digits of the rate, float16 overflows in exp(logvar) above
    11.1.
    """
    if moments.dtype in (torch.float16, torch.bfloat16):
        moments = moments.float()
    return DiagonalGaussianDistribution(moments)


def check_batch(tensor: torch.Tensor, channels: int, what: str) -> None:
    """Raise ValueError unless the batch is floating point of the shape (B, `channels`, H, W)."""
    if not tensor.is_floating_point():
        hint = "; diffusers_vae.images.ranges.to_model_range converts uint8 pixels" if what == "images" else ""
        raise ValueError(f"{what} must be floating point, got {tensor.dtype}{hint}")
    if tensor.ndim != 4:
        raise ValueError(f"{what} must have the shape (batch, channels, height, width), got {tuple(tensor.shape)}")
    if tensor.shape[1] != channels:
        raise ValueError(f"{what} must have {channels} channels as in the model's config, got {tensor.shape[1]}")


def check_dtype(model: ModelMixin, images: torch.Tensor) -> None:
    """Raise ValueError if images and model differ in floating dtype and autocast does not cast the images."""
    if images.dtype == next(model.parameters()).dtype:  # model.dtype would visit all modules
        return
    device = images.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if images.dtype != model.dtype and (not autocast or images.dtype == torch.float64):  # autocast keeps float64
        raise ValueError(f"images must have the model's dtype, {model.dtype}, got {images.dtype}")


def in_dtype_of(model: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    return latents if latents.dtype == next(model.parameters()).dtype else latents.to(model.dtype)


def take_latents(
    posterior: DiagonalGaussianDistribution,
    sample_posterior: bool,
    generator: torch.Generator | None,
    noise: torch.Tensor | None,
) -> torch.Tensor:
    """Return latents (B, C, h, w) for `VAE.forward` to decode: from the given noise, a random sample, or the mode."""
    if noise is not None:
        return posterior.mean + posterior.std * noise
    return posterior.sample(generator=generator) if sample_posterior else posterior.mode()
