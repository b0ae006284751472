"""Rate, distortion and their sum, the negative evidence lower bound: Kingma & Welling 2014, equation 3.

Both terms are sums over the image, in nats, one value per image. Images and reconstructions are in model range [-1, 1]:
a unit-weight squared error on [0, 1] pixels is a Gaussian with std sqrt(2), a unit-weight L1 in model range a Laplace
with scale 1. Other objectives correspond to the following settings, for images of V values and U latent units:

- latent-diffusion: `sum |error| / exp(logvar) + logvar` and `1e-6 * sum KL` is likelihood laplace with kl_weight 1e-6.
Its logvar is our log(scale), but no optimiser trains it, so it stays 0: scale 1. "learned" trains it.
- sigma-VAE (Rybkin 2021): likelihood gaussian, scale "optimal" or "learned", kl_weight 1.
- the articles: the summed cross entropy is likelihood bernoulli, the summed squared error on [0, 1] pixels likelihood
gaussian with scale sqrt(2), kl_weight 1.
- `mse + w * sum KL`, where mse is the mean over the values of [-1, 1] pixels, is scale sqrt(1 / 2) with kl_weight w *
V; with the mean of KL over the latent units, w * V / U. On [0, 1] pixels, the scale is sqrt(2).
- beta-VAE (Higgins 2017): kl_weight is beta; its beta_norm, with means for both sums, is kl_weight * U / V.
- free bits (Kingma 2016), cyclical annealing (Fu 2019), ControlVAE (Shao 2020): `ObjectiveConfig`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from ..fields import check, only_with, setting
from ..images.ranges import to_unit_range

START_SCALE = 1.0
"""Initial value of a learned or optimal scale, before any error is measured: about the scale for a grey image in [-1,
1]."""
MEAN_LOSSES = {"gaussian": "F.mse_loss", "laplace": "F.l1_loss", "bernoulli": "F.binary_cross_entropy"}
"""The torch.nn.functional loss, by likelihood, that is the mean of its error up to a constant factor."""


def kl_to_standard_normal(posterior: DiagonalGaussianDistribution) -> torch.Tensor:
    """Return KL(q(z|x) || N(0, I)) per image (B,), nats, at least float32: Kingma & Welling 2014, appendix B."""
    return rate_per_unit(posterior).flatten(1).sum(1)


def rate_per_unit(posterior: DiagonalGaussianDistribution) -> torch.Tensor:
    """Return the rate of each latent unit (B, C, h, w) in nats."""
    mean, logvar = (t if t.dtype == torch.float64 else t.float() for t in (posterior.mean, posterior.logvar))
    return 0.5 * (mean**2 + logvar.expm1() - logvar)


def rate_per_channel(posterior: DiagonalGaussianDistribution) -> torch.Tensor:
    """Return the rate of each latent channel (B, C) in nats, summed over its positions."""
    return rate_per_unit(posterior).flatten(2).sum(2)


def _log(scale: float | torch.Tensor) -> float | torch.Tensor:
    return scale.log() if isinstance(scale, torch.Tensor) else math.log(scale)


@dataclass(frozen=True)
class Gaussian:
    """Normal density with the reconstruction as its mean; `std` in model range."""

    std: float | torch.Tensor

    def error(self, images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        squared = F.mse_loss(reconstructions, images, reduction="none")  # half the memory traffic of (a - b) ** 2
        return squared.flatten(1).sum(1) / (2 * self.std**2)

    def constant(self) -> float | torch.Tensor:
        return _log(self.std) + 0.5 * math.log(2 * math.pi)

    def deviation(self, images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error per image (B,)."""
        return ((images - reconstructions) ** 2).flatten(1).mean(1)

    def optimal_scale(self, deviation: float) -> float:
        """Return the root of the mean squared error: Rybkin 2021, optimal sigma-VAE."""
        return math.sqrt(deviation)

    @property
    def density(self) -> str:
        return f"normal density with std {self.std:g} over pixels in [-1, 1]"


@dataclass(frozen=True)
class Laplace:
    """Laplace density with the reconstruction as its median; `scale` (mean absolute deviation) in model range."""

    scale: float | torch.Tensor

    def error(self, images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        return (images - reconstructions).abs().flatten(1).sum(1) / self.scale

    def constant(self) -> float | torch.Tensor:
        return _log(2 * self.scale)

    def deviation(self, images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        """Return the mean absolute error per image (B,)."""
        return (images - reconstructions).abs().flatten(1).mean(1)

    def optimal_scale(self, deviation: float) -> float:
        """Return the mean absolute error, the maximum likelihood scale of a Laplace density."""
        return deviation

    @property
    def density(self) -> str:
        return f"Laplace density with scale {self.scale:g} over pixels in [-1, 1]"


@dataclass(frozen=True)
class Bernoulli:
    """Bernoulli probability of each value with p = sigmoid(logit); grey values count as probabilities. It is computed
    from the decoder's logits (B, C, H, W): float32 reconstructions round to -1 or 1 beyond about ±16, where the
    gradient would vanish.
    """

    def error(self, images: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        values = to_unit_range(images)
        return F.binary_cross_entropy_with_logits(logits, values, reduction="none").flatten(1).sum(1)

    def constant(self) -> float:
        return 0.0

    @property
    def density(self) -> str:
        return "Bernoulli probability of pixels in [0, 1], exact for 0 and 1 only: no density for grey values"


Likelihood = Gaussian | Laplace | Bernoulli
"""p(image | latents), independent per pixel. `error` is -log p per image (B,) in nats, without the part that no
parameter changes, from images and reconstructions (logits for a Bernoulli likelihood). `constant` is that part, in nats
per value. `density` describes p."""


@dataclass(frozen=True)
class ObjectiveTerms:
    """Terms of one batch, in nats per image."""

    distortion: torch.Tensor
    """Distortion -log p(image | latents) with its constant, (B,)."""
    rate: torch.Tensor
    """Rate KL(posterior || prior), (B,)."""
    loss: torch.Tensor
    """Loss to differentiate, scalar: mean of distortion + kl_weight * rate, without `VAEObjective.left_out`."""
    statistics: dict[str, torch.Tensor] = field(default_factory=dict)
    """Means over these images, without gradient. `TrainingObjective.end_step` takes their average over a step."""

    @property
    def elbo(self) -> torch.Tensor:
        """Return the evidence lower bound per image (B,) in nats, independent of the kl_weight."""
        return -(self.distortion + self.rate)


@dataclass(frozen=True)
class VAEObjective:
    """Distortion plus `kl_weight` times rate: the negative ELBO for 1, else a beta-VAE (Higgins 2017, equation 4)."""

    likelihood: Likelihood
    kl_weight: float = 1.0
    free_bits: float = 0.0
    """Nats per latent channel, mean over the images, below which the loss ignores its rate."""
    scale_varies: bool = False
    """Whether training changes the likelihood's scale. Its logarithm is then part of the loss, once per value."""

    def __post_init__(self):
        if self.scale_varies and self.scale is None:
            raise ValueError(f"scale_varies needs a likelihood with a scale, got {self.likelihood}")

    def left_out(self) -> float | torch.Tensor:
        """Return the part of the distortion, in nats per value, that training cannot change and the loss omits."""
        constant, scale = self.likelihood.constant(), self.scale
        return constant - _log(scale) if self.scale_varies and scale is not None else constant

    @property
    def scale(self) -> float | torch.Tensor | None:
        """Return the scale of the likelihood: std of a Gaussian, scale of a Laplace, None for a Bernoulli."""
        return getattr(self.likelihood, "std", getattr(self.likelihood, "scale", None))

    def __call__(
        self,
        images: torch.Tensor,
        reconstructions: torch.Tensor,
        posterior: DiagonalGaussianDistribution,
        *,
        logits: torch.Tensor | None = None,
        kl_weight: float | None = None,
        scale: torch.Tensor | float | None = None,
        channel_rates: torch.Tensor | None = None,
    ) -> ObjectiveTerms:
        """Return the terms for images and reconstructions (B, C, H, W) in [-1, 1], in at least float32.

        Args:
            logits: Logits (B, C, H, W) of the reconstructions, which are 2 * sigmoid(logits) - 1, as `MLPVAE` returns
                them with `return_logits=True`. Required for a `Bernoulli` likelihood, and only for that.
            kl_weight: Replaces the objective's weight in the loss.
            scale: Replaces the likelihood's scale: a positive number or scalar tensor. It is then not a constant, so
                the loss contains its logarithm once per value, and its gradient flows to a tensor that requires one.
            channel_rates: Rates (latent channels,) in nats: free bits omit from the loss the channels that have at most
                `free_bits`. By default the means over these images, as in Kingma 2016, equation 15: max(free_bits, mean
                rate) per channel. Pass them so that parts of a batch use the same channels.

        Raises:
            ValueError: If shapes or numbers of images differ, images are integers, logits are missing for a `Bernoulli`
                likelihood or given for another one, or a `Bernoulli` likelihood is given a scale.
        """
        if not images.is_floating_point():
            raise ValueError(f"images must be floating point in [-1, 1], got {images.dtype}")
        if images.shape != reconstructions.shape:
            raise ValueError(
                f"images and reconstructions must have one shape, got {tuple(images.shape)} and "
                f"{tuple(reconstructions.shape)}"
            )
        likelihood = self.likelihood
        if isinstance(likelihood, Bernoulli) and logits is None:
            raise ValueError(
                "a Bernoulli likelihood needs logits, got None: pass those that MLPVAE returns with return_logits=True"
            )
        if not isinstance(likelihood, Bernoulli) and logits is not None:
            raise ValueError(f"logits must be None for the likelihood {likelihood}, got a tensor")
        decoded = reconstructions if logits is None else logits
        if decoded.shape != images.shape:
            raise ValueError(
                f"logits must have the shape of the images, {tuple(images.shape)}, got {tuple(decoded.shape)}"
            )
        if decoded.dtype in (torch.float16, torch.bfloat16):
            decoded = decoded.float()
        images = images.to(decoded.dtype)
        values = images[0].numel()
        if scale is not None:
            if isinstance(likelihood, Bernoulli):
                raise ValueError(f"a Bernoulli likelihood has no scale: leave it out, got {scale}")
            if isinstance(scale, torch.Tensor):
                scale = scale.to(decoded.dtype)
            likelihood = type(likelihood)(scale)
        elif self.scale_varies:
            scale = self.scale
        error = likelihood.error(images, decoded)
        rate = pressed_rate = kl_to_standard_normal(posterior)
        if len(rate) != len(images):
            raise ValueError(f"the posterior must be of the {len(images)} images, got one of {len(rate)}")
        if self.free_bits:
            rates = rate_per_channel(posterior)
            if channel_rates is None:
                channel_rates = rates.detach().mean(0)
            elif channel_rates.shape != rates.shape[1:]:
                raise ValueError(
                    f"channel_rates must be one per latent channel, ({rates.shape[1]},), got "
                    f"{tuple(channel_rates.shape)}"
                )
            pressed_rate = torch.where(channel_rates > self.free_bits, rates, self.free_bits).sum(1)
        return ObjectiveTerms(
            distortion=error + likelihood.constant() * values,
            rate=rate,
            loss=(
                (error if scale is None else error + values * _log(scale))
                + (self.kl_weight if kl_weight is None else kl_weight) * pressed_rate
            ).mean(),
        )


@dataclass(frozen=True)
class ObjectiveConfig:
    """Minimised objective: distortion + kl_weight * rate, both summed over the image, in nats.

    A null scale gets the value in its description, and the run's config.yaml records it.
    """

    likelihood: Literal["gaussian", "laplace", "bernoulli"] = "gaussian"
    """Density of an image given its reconstruction; bernoulli needs the mlp architecture."""
    scale: float | Literal["learned", "optimal"] | None = only_with(None, above=0, likelihood=("gaussian", "laplace"))
    """Std of the gaussian or scale of the laplace, in model range; null: 0.05; learned: a parameter; optimal: measured
    from the errors (docs/objective.md)."""
    kl_weight: float = setting(1.0, at_least=0)
    """Weight of the rate, beta; 1.0 is the true ELBO."""
    kl_schedule: Literal["constant", "linear", "cosine", "cyclical"] = only_with("constant", "training", kl_weight=True)
    """Schedule of kl_weight: constant, a linear or cosine rise over kl_warmup_images, or cycles (docs/objective.md)."""
    kl_warmup_images: int = only_with(0, "training", kl_schedule=("linear", "cosine"))
    """Number of images over which a linear or cosine schedule rises to kl_weight."""
    kl_cycles: int = only_with(4, "training", at_least=1, kl_schedule=("cyclical",))
    """Number of cycles of a cyclical schedule."""
    free_bits: float = only_with(0.0, "training", at_least=0, kl_weight=True)
    """Rate per latent channel, in nats, that is free of cost and keeps channels from collapsing (Kingma 2016;
    docs/objective.md)."""
    target_rate: float | None = only_with(None, "training", above=0, kl_weight=True)
    """Rate in nats per image that a controller maintains by adjusting the weight, starting at kl_weight (ControlVAE,
    Shao 2020)."""
    perceptual: Literal["alex", "vgg", "squeeze"] | None = setting(None, "training")
    """Network of an LPIPS loss for sharper reconstructions (Zhang 2018); null: none."""
    perceptual_weight: float = only_with(1.0, "training", above=0, perceptual=True)
    """Weight of LPIPS, also multiplied by the number of values of an image (docs/objective.md)."""
    equivariance: float = setting(0.0, "training", at_least=0, at_most=1)
    """Fraction of steps that decode scaled and rotated latents, which makes latents easier to diffuse (EQ-VAE, Kouzelis
    2025: 0.5; docs/objective.md)."""
    transformations: int = only_with(1, "training", at_least=1, equivariance=True)
    """Number of equal parts of a batch with different transformations, a divisor of the processes times
    run.gradient_accumulation_steps."""

    def __post_init__(self):
        check("objective", self)
        if self.scale is None and self.likelihood != "bernoulli":
            object.__setattr__(self, "scale", 0.05)
        rule = f"a {self.kl_schedule} objective.kl_schedule"
        if self.kl_schedule in ("linear", "cosine") and self.kl_warmup_images < 1:
            raise ValueError(
                f"{rule} rises over objective.kl_warmup_images, which must be at least 1, got {self.kl_warmup_images}"
            )
        if self.target_rate is not None and self.kl_schedule != "constant":
            raise ValueError(
                f"objective.target_rate changes the weight of the rate, and so does {rule}: set only one of them"
            )

    def kl_weight_at(self, images_seen: int, total_images: int) -> float:
        """Return the scheduled weight of the rate in the step after `images_seen` of `total_images` images."""
        if self.kl_schedule == "constant" or images_seen >= total_images:
            return self.kl_weight
        if self.kl_schedule == "cyclical":
            in_cycle = images_seen * self.kl_cycles % total_images / total_images
            return self.kl_weight * min(1.0, 2 * in_cycle)
        progress = min(1.0, images_seen / self.kl_warmup_images)
        return self.kl_weight * (progress if self.kl_schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2)

    def unreached(self, total_images: int) -> list[str]:
        """Return warnings, one sentence each, about settings without full effect in a run of `total_images` images."""
        if self.kl_warmup_images <= total_images:
            return []
        reached = self.kl_weight_at(total_images - 1, total_images)
        return [
            f"objective.kl_warmup_images must not exceed the {total_images:,} images of the run, got "
            f"{self.kl_warmup_images:,}: the weight of the rate only rises to about {reached:.2g}, not to "
            f"objective.kl_weight {self.kl_weight:g}. Shorten the warm-up, or train longer: raise run.epochs or "
            "run.max_images"
        ]

    def kl_weight_per_value(self, values: int) -> float | None:
        """Return the weight w so that the loss in `MEAN_LOSSES`, a mean over the `values` = C * H * W of an image, + w
        * the rate has the same minimum as this objective. None for a learned or optimal scale, with which w changes.
        """
        if isinstance(self.scale, str):
            return None
        if self.scale is None:  # bernoulli
            return self.kl_weight / values
        return self.kl_weight * (2 * self.scale**2 if self.likelihood == "gaussian" else self.scale) / values

    def build(self, scale: float | None = None) -> VAEObjective:
        """Return the objective for evaluation: full `kl_weight`, no free bits. `scale` is the value of a learned or
        optimal scale; ValueError if it is missing, or given although the settings state a scale.
        """
        if isinstance(self.scale, str):
            if scale is None:
                raise ValueError(
                    f"objective.scale {self.scale} has a value only in the run that trains it: to measure, give it as "
                    "a number"
                )
        elif scale is None:
            scale = self.scale
        else:
            raise ValueError(f"objective.scale is {self.scale}, not learned or optimal: leave out {scale}")
        kind: Any = {"gaussian": Gaussian, "laplace": Laplace}.get(self.likelihood)
        likelihood = kind(scale) if kind else Bernoulli()
        return VAEObjective(likelihood, self.kl_weight, scale_varies=isinstance(self.scale, str))
