"""MLP autoencoder of the articles, with the interface and ranges of the convolutional one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ..images.ranges import to_model_range, to_unit_range
from .posterior import VAEOutput, check_batch, check_dtype, in_dtype_of, posterior_from_moments, take_latents
from .scaling import KeepsScaling
from .stock import ConfigMixin, ModelMixin


@dataclass
class MLPVAEOutput(VAEOutput):
    """`VAEOutput` with the logits (B, C, H, W) of the reconstructions: sample is 2 * sigmoid(logits) - 1."""

    logits: torch.Tensor


class MLPVAE(KeepsScaling, ModelMixin, ConfigMixin):
    """MLP encoder and decoder with one hidden layer each, after Kingma & Welling 2014 (Auto-Encoding Variational
    Bayes).

    Inside, the network works on [0, 1] pixels as in the paper and ends in a sigmoid, so that a Bernoulli likelihood is
    possible. It takes and returns images in model range [-1, 1]. Latents have the shape (B, latent_dim, 1, 1).
    Diffusers has no such class, so loading the model needs this package.

    Args:
        image_size: Side of the images in pixels, or (height, width).
        in_channels: Number of channels of images and reconstructions.
        hidden_dim: Width of the two hidden layers.
        latent_dim: Number of latent units.
        scaling_factor: 1 / std of the latents over the training set; `diffusers_vae.measure_latents` sets it.
        shift_factor: Mean of the latents over the training set.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int | tuple[int, int] = 28,
        in_channels: int = 1,
        hidden_dim: int = 400,
        latent_dim: int = 2,
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
    ):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_shape = (in_channels, height, width)
        pixels = in_channels * height * width
        # created in this order, so that a seed gives the same weights as in the articles' loops
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden_dim), nn.ReLU())
        self.mean = nn.Linear(hidden_dim, latent_dim)
        self.logvar = nn.Linear(hidden_dim, latent_dim)
        self.decoder = nn.Sequential(nn.Linear(latent_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, pixels))

    @apply_forward_hook
    def encode(
        self, x: torch.Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Return the float32 posterior over latents (B, latent_dim, 1, 1) of images `x` in [-1, 1] as `latent_dist`;
        ValueError for images that are not floating point of the shape (B, in_channels, height, width).
        """
        check_batch(x, self.config.in_channels, "images")
        if tuple(x.shape[1:]) != self.image_shape:
            size, got = ("x".join(map(str, shape[-2:])) for shape in (self.image_shape, x.shape))
            raise ValueError(f"an MLP takes images of one size only: image_size is {size}, got {got}")
        check_dtype(self, x)
        hidden = self.encoder(to_unit_range(x).flatten(1))
        posterior = posterior_from_moments(torch.cat([self.mean(hidden), self.logvar(hidden)], 1)[:, :, None, None])
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Return reconstructions (B, in_channels, height, width) in [-1, 1] of latents (B, latent_dim, 1, 1) as
        `sample`. (sample + 1) / 2 is the probability that a pixel is on. `generator` is ignored.
        """
        sample = to_model_range(torch.sigmoid(self.decode_logits(z)))
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def decode_logits(self, z: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, in_channels, height, width) of the probability that a pixel is on, in at least float32,
        for latents (B, latent_dim, 1, 1); ValueError for latents of another shape.
        """
        check_batch(z, self.config.latent_dim, "latents")
        if z.shape[2:] != (1, 1):
            raise ValueError(f"latents must have the shape (batch, {z.shape[1]}, 1, 1), got {tuple(z.shape)}")
        logits = self.decoder(in_dtype_of(self, z).flatten(1)).view(-1, *self.image_shape)
        # a sigmoid in half precision rounds dark pixels to probability 0
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        return_posterior: bool = False,
        noise: torch.Tensor | None = None,
        return_logits: bool = False,
    ) -> DecoderOutput | MLPVAEOutput | tuple[Any, ...]:
        """Return reconstructions (B, in_channels, height, width) of the images `sample`, as `VAE.forward` does. With
        `return_logits`, return an `MLPVAEOutput` (or a tuple of three) with the logits that a `Bernoulli` likelihood
        needs.
        """
        posterior = self.encode(sample, return_dict=False)[0]
        latents = take_latents(posterior, sample_posterior, generator, noise)
        logits = self.decode_logits(latents)
        outputs: tuple[Any, ...] = (to_model_range(torch.sigmoid(logits)), posterior, logits)
        outputs = outputs[: 3 if return_logits else 2 if return_posterior else 1]
        kind: Any = MLPVAEOutput if return_logits else VAEOutput if return_posterior else DecoderOutput
        return kind(*outputs) if return_dict else outputs
