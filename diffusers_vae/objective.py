"""Rate, distortion and their sum, the negative evidence lower bound: Kingma & Welling 2014, equation 3.

Both terms are sums over the image, in nats, one value per image. Images and reconstructions are in model range
[-1, 1]: a unit-weight squared error on [0, 1] pixels is a Gaussian with std sqrt(2) here, a unit-weight L1 in model
range a Laplace with scale 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from .images import to_unit_range


def kl_to_standard_normal(posterior: DiagonalGaussianDistribution) -> torch.Tensor:
    """The rate KL(q(z|x) || N(0, I)) per image (B,), nats: Kingma & Welling 2014, appendix B.

    Computed in float32 at least.
    """
    return rate_per_unit(posterior).flatten(1).sum(1)


def rate_per_unit(posterior: DiagonalGaussianDistribution) -> torch.Tensor:
    """What each latent unit adds to the rate, of the shape of the latents, nats."""
    mean, logvar = (t if t.dtype == torch.float64 else t.float() for t in (posterior.mean, posterior.logvar))
    return 0.5 * (mean**2 + logvar.expm1() - logvar)


class Likelihood(Protocol):
    """p(image | latents), independent per pixel. `error` is what training needs of -log p, `constant` the rest."""

    def error(self, images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        """-log p(image | latents) per image (B,), nats, without the part that no parameter changes."""
        ...

    def constant(self) -> float:
        """What `error` leaves out of -log p, nats per value."""
        ...

    @property
    def density(self) -> str:
        """What p is a density over, in words."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """Normal with the reconstruction as its mean; `std` in model range."""

    std: float = 1.0

    def error(self, images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        return ((images - reconstructions) ** 2).flatten(1).sum(1) / (2 * self.std**2)

    def constant(self) -> float:
        return math.log(self.std) + 0.5 * math.log(2 * math.pi)

    @property
    def density(self) -> str:
        return f"normal density with std {self.std:g} over pixels in [-1, 1]"


@dataclass(frozen=True)
class Laplace:
    """Laplace with the reconstruction as its median; `scale` (mean absolute deviation) in model range."""

    scale: float = 1.0

    def error(self, images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        return (images - reconstructions).abs().flatten(1).sum(1) / self.scale

    def constant(self) -> float:
        return math.log(2 * self.scale)

    @property
    def density(self) -> str:
        return f"Laplace density with scale {self.scale:g} over pixels in [-1, 1]"


@dataclass(frozen=True)
class Bernoulli:
    """Every value is 1 with the probability (reconstruction + 1) / 2; grey values count as probabilities.

    Needs reconstructions in [-1, 1]. Probabilities are kept a float32 epsilon away from 0 and 1, as
    `torch.distributions.Bernoulli` does.
    """

    def error(self, images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        low, high = reconstructions.detach().aminmax()
        if low < -1 or high > 1:  # NaN is for the training loop to report
            raise ValueError(
                "a Bernoulli likelihood needs reconstructions that are probabilities: in [-1, 1] after the rescaling "
                f"of images, got values from {low.item():.3g} to {high.item():.3g}. The decoder of VAE is unbounded; "
                "use MLPVAE, which ends in a sigmoid, or a Gaussian or Laplace likelihood"
            )
        epsilon = torch.finfo(reconstructions.dtype).eps
        probabilities = to_unit_range(reconstructions).clamp(epsilon, 1 - epsilon)
        values = to_unit_range(images)
        # written out: F.binary_cross_entropy refuses to run under CUDA autocast
        return -(values * probabilities.log() + (1 - values) * (-probabilities).log1p()).flatten(1).sum(1)

    def constant(self) -> float:
        return 0.0

    @property
    def density(self) -> str:
        return "Bernoulli probability of pixels in [0, 1], exact for 0 and 1 only: no density for grey values"


@dataclass(frozen=True)
class ObjectiveTerms:
    """The terms of one batch, nats per image."""

    distortion: torch.Tensor
    """-log p(image | latents) with its constant, (B,)."""
    rate: torch.Tensor
    """KL to the prior, (B,)."""
    loss: torch.Tensor
    """What is differentiated, a scalar: mean of distortion, without its constant, + kl_weight * rate."""

    @property
    def elbo(self) -> torch.Tensor:
        """The evidence lower bound per image (B,), nats, whatever the kl_weight."""
        return -(self.distortion + self.rate)


@dataclass(frozen=True)
class VAEObjective:
    """Distortion plus `kl_weight` times rate. A `kl_weight` of 1 is the negative ELBO, others a beta-VAE's objective
    (Higgins 2017, equation 4).
    """

    likelihood: Likelihood = Gaussian()
    kl_weight: float = 1.0

    def __call__(
        self, images: torch.Tensor, reconstructions: torch.Tensor, posterior: DiagonalGaussianDistribution
    ) -> ObjectiveTerms:
        """The terms for images and reconstructions (B, C, H, W) in [-1, 1]; float32 at least.

        Raises:
            ValueError: when shapes or numbers of images differ, images are integers, or reconstructions are no
                probabilities for a Bernoulli likelihood.
        """
        if not images.is_floating_point():
            raise ValueError(f"images must be floating point in [-1, 1], got {images.dtype}")
        if images.shape != reconstructions.shape:
            raise ValueError(
                f"images and reconstructions must have one shape, got {tuple(images.shape)} and "
                f"{tuple(reconstructions.shape)}"
            )
        if reconstructions.dtype in (torch.float16, torch.bfloat16):
            reconstructions = reconstructions.float()
        images = images.to(reconstructions.dtype)
        error = self.likelihood.error(images, reconstructions)
        rate = kl_to_standard_normal(posterior)
        if len(rate) != len(images):
            raise ValueError(f"the posterior must be of the {len(images)} images, got one of {len(rate)}")
        return ObjectiveTerms(
            distortion=error + self.likelihood.constant() * images[0].numel(),
            rate=rate,
            loss=(error + self.kl_weight * rate).mean(),
        )


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised: distortion + kl_weight * rate, both summed over the image, in nats.

    A scale that is left out gets the value named in its description, which the run's config.yaml then states.
    """

    likelihood: Literal["gaussian", "laplace", "bernoulli"] = "gaussian"
    """Density of an image given its reconstruction. bernoulli needs the mlp architecture."""
    scale: float | None = None
    """Std of the gaussian or scale of the laplace, in model range [-1, 1] (0.1); bernoulli has none."""
    kl_weight: float = 1.0
    """Beta on the rate; 1.0 is the true ELBO."""

    def __post_init__(self):
        if self.likelihood not in ("gaussian", "laplace", "bernoulli"):
            raise ValueError(f"objective.likelihood must be gaussian, laplace or bernoulli, got {self.likelihood!r}")
        if self.likelihood == "bernoulli":
            if self.scale is not None:
                raise ValueError(f"a bernoulli likelihood has no scale: leave out objective.scale, got {self.scale}")
        elif self.scale is None:
            object.__setattr__(self, "scale", 0.1)
        elif not (self.scale > 0 and math.isfinite(self.scale)):
            raise ValueError(f"objective.scale must be positive and finite, got {self.scale}")
        if not (self.kl_weight >= 0 and math.isfinite(self.kl_weight)):
            raise ValueError(f"objective.kl_weight must be at least 0 and finite, got {self.kl_weight}")

    def build(self) -> VAEObjective:
        """The objective that these settings describe."""
        likelihoods = {"gaussian": Gaussian, "laplace": Laplace}
        likelihood = likelihoods[self.likelihood](self.scale) if self.likelihood in likelihoods else Bernoulli()
        return VAEObjective(likelihood, self.kl_weight)
