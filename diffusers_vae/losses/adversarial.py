"""Patch discriminator, its losses and penalties, and its state between training steps.

Every loss and penalty is a mean over patches, one value per image. The state is a function of the whole step's batch:
with the spectral norm, the result does not depend on how the batch is split.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from ..fields import check, only_with, setting

LECAM_DECAY = 0.99  # as in the code of Tseng et al. 2021
BETAS = (0.5, 0.9)
"""Decay rates of the discriminator's AdamW for gradient and squared gradient, as in latent-diffusion."""


@dataclass(frozen=True)
class AdversarialConfig:
    """Discriminator that judges reconstructions by patches: Isola et al. 2017, Esser et al. 2021."""

    weight: float = setting(0.0, at_least=0)
    """Weight of the generator's loss, a mean over patches, for sharper images; 0: no discriminator; 0.5 in
    latent-diffusion."""
    loss: Literal["hinge", "non-saturating"] = only_with("hinge", weight=True)
    """Loss of the discriminator: hinge (Lim & Ye 2017) or non-saturating (Goodfellow 2014)."""
    start_images: int = only_with(0, at_least=0, weight=True)
    """Number of training images before the discriminator starts."""
    warmup_images: int = only_with(0, at_least=0, weight=True)
    """Number of images after start_images over which weight and the discriminator's learning rate rise linearly from
    0."""
    adaptive: bool = only_with(True, weight=True)
    """Scale weight so that its gradient at the decoder's last layer matches the gradient of the
    reconstruction terms."""
    max_factor: float | None = only_with(None, above=0, weight=True, adaptive=True)
    """Upper limit of the factor of adaptive; null: no limit; 1e4 in latent-diffusion (docs/objective.md)."""
    norm: Literal["spectral", "batch"] = only_with("spectral", weight=True)
    """Normalization of the layers; with batch, results depend on how a batch is split into micro-batches and over
    processes."""
    width: int = only_with(64, at_least=1, weight=True)
    """Number of channels of the first layer; each further layer doubles it, up to 8 times."""
    layers: int = only_with(3, at_least=1, weight=True)
    """Number of layers of stride 2, n_layers of pix2pix; with 3, a patch is 70x70 pixels."""
    learning_rate: float | None = only_with(None, above=0, weight=True)
    """Peak learning rate of the discriminator, with the same schedule; null: optimizer.learning_rate."""
    lecam_weight: float = only_with(0.0, at_least=0, weight=True)
    """Weight of the LeCam penalty, for small data sets (Tseng et al. 2021)."""
    r1_weight: float = only_with(0.0, at_least=0, weight=True)
    """Gamma of the penalty 0.5 * gamma * |gradient at the image|^2 (Mescheder et al. 2018)."""

    def __post_init__(self):
        check("adversarial", self)

    def rise(self, images_seen: int) -> float:
        """Return the factor in [0, 1] on weight and learning rate in the step that begins after `images_seen`
        images.
        """
        if images_seen < self.start_images:
            return 0.0
        return min(1.0, (images_seen - self.start_images + 1) / max(1, self.warmup_images))

    def unreached(self, total_images: int) -> list[str]:
        """Return warnings, one sentence each, about settings without full effect in a run of `total_images` images."""
        if not self.weight or self.start_images + self.warmup_images <= total_images > self.start_images:
            return []
        if self.start_images >= total_images:
            return [
                f"adversarial.start_images must be less than the {total_images:,} images of the run, got "
                f"{self.start_images:,}: the discriminator never trains, and adversarial.weight {self.weight:g} has no "
                "effect. Lower it, or train longer: raise run.epochs or run.max_images"
            ]
        return [
            f"adversarial.start_images plus adversarial.warmup_images must not exceed the {total_images:,} images of "
            f"the run, got {self.start_images:,} + {self.warmup_images:,}: the weight of the discriminator only rises "
            f"to about {self.weight * self.rise(total_images - 1):.2g}, not to adversarial.weight {self.weight:g}. "
            "Lower one of the two, or train longer: raise run.epochs or run.max_images"
        ]


class _Conv(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # Autocast would compute the singular value in half precision; the convolution may be.
        with torch.autocast(input.device.type, enabled=False):
            weight = self.weight
        return F.conv2d(input, weight, self.bias, self.stride, self.padding)


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of images, with positive logits for real ones: pix2pix (Isola et al. 2017) as in
    taming-transformers (Esser et al. 2021), by default with the spectral norm (Miyato et al. 2018) instead.

    The spectral norm runs one power iteration per `iterate` and none in a forward. The batch norm normalises by the
    images of one forward, in eval mode too, so two processes or micro-batches are not equal to one.
    """

    def __init__(
        self, channels: int, width: int = 64, layers: int = 3, norm: Literal["spectral", "batch"] = "spectral"
    ):
        super().__init__()
        self.layers = layers
        widths = [width * min(2**layer, 8) for layer in range(layers + 1)]
        modules: list[nn.Module] = [_Conv(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, layers + 1):
            stride = 2 if layer < layers else 1
            modules.append(_Conv(widths[layer - 1], widths[layer], 4, stride, padding=1, bias=norm != "batch"))
            if norm == "batch":
                modules.append(nn.BatchNorm2d(widths[layer], track_running_stats=False))
            modules.append(nn.LeakyReLU(0.2))
        self.main = nn.Sequential(*modules, _Conv(widths[-1], 1, 4, padding=1))
        for module in self.main:
            if isinstance(module, (_Conv, nn.BatchNorm2d)):
                nn.init.normal_(module.weight, float(isinstance(module, nn.BatchNorm2d)), 0.02)
            if norm == "spectral" and isinstance(module, nn.Conv2d):
                spectral_norm(module)
        self.train()

    def train(self, mode: bool = True) -> PatchDiscriminator:
        super().train(mode)
        for module in self._normalised():
            module.parametrizations.eval()  # in train mode, every forward would be a power iteration
        return self

    @torch.no_grad()
    def iterate(self) -> None:
        """Run one power iteration for the largest singular value of every layer: call it once per optimiser step, on
        every process. Equal weights and buffers give equal results.
        """
        for module in self._normalised():
            weight = module.parametrizations.weight.train()
            with torch.autocast(weight.original.device.type, enabled=False):
                weight()
            weight.eval()

    def _normalised(self) -> list[Any]:
        return [module for module in self.main if parametrize.is_parametrized(module)]

    @staticmethod
    def check(size: tuple[int, int], layers: int) -> None:
        """Raise ValueError if images are too small for a patch."""
        smallest = 3 * 2**layers
        if min(size) < smallest:
            raise ValueError(
                f"a discriminator of {layers} layers needs sides of at least {smallest} pixels, got "
                f"{size[0]}x{size[1]}: use larger images, or fewer adversarial.layers"
            )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (B, 1, h, w), one per patch, of images (B, channels, H, W) in [-1, 1], in the dtype of the
        parameters, float32, under autocast too. ValueError if the images are too small for a patch.
        """
        self.check((images.shape[2], images.shape[3]), self.layers)
        device, dtype = images.device.type, next(self.parameters()).dtype
        # float16 rounds the small gradients of a mean over patches to 0: the loss scale is chosen for the model's
        # gradients, and the gradients that the adaptive weight compares are not scaled
        float16 = torch.get_autocast_dtype(device) == torch.float16
        with torch.autocast(device, enabled=False) if float16 else nullcontext():
            return self.main(images.to(dtype)).to(dtype)


@contextmanager
def frozen(discriminator: PatchDiscriminator) -> Generator[None]:
    """Keep forwards in this context from giving parameters a gradient, even if backward runs later; images get
    theirs.
    """
    trained = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
    try:
        discriminator.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


def generator_loss(kind: Literal["hinge", "non-saturating"], fake_logits: torch.Tensor) -> torch.Tensor:
    """Return the loss per image (B,) from the logits of reconstructions."""
    values = -fake_logits if kind == "hinge" else F.softplus(-fake_logits)
    return values.flatten(1).mean(1)


def discriminator_loss(
    kind: Literal["hinge", "non-saturating"], real_logits: torch.Tensor, fake_logits: torch.Tensor
) -> torch.Tensor:
    """Return the loss per image (B,) from the logits of images and of their reconstructions, the mean of both as in
    taming-transformers. Hinge: Lim & Ye 2017; non-saturating: Goodfellow 2014, equation 1.
    """
    if kind == "hinge":
        real, fake = F.relu(1 - real_logits), F.relu(1 + fake_logits)
    else:
        real, fake = F.softplus(-real_logits), F.softplus(fake_logits)
    return 0.5 * (real.flatten(1).mean(1) + fake.flatten(1).mean(1))


def r1_penalty(discriminator: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return half the squared norm of the gradient of the logit, a mean over patches, at each image (B,): Mescheder et
    al. 2018, equation 9, without gamma. It is at least float32, under autocast too, and its gradient reaches the
    parameters.
    """
    images = images.detach().to(torch.promote_types(images.dtype, torch.float32)).requires_grad_()
    with torch.autocast(images.device.type, enabled=False):
        logits = discriminator(images).flatten(1).mean(1)
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        return 0.5 * gradient.square().flatten(1).sum(1)


def lecam_penalty(
    real_logits: torch.Tensor, fake_logits: torch.Tensor, real_average: float, fake_average: float
) -> torch.Tensor:
    """Return a penalty per image (B,): the squared excess of an image's logit over the average reconstruction's, and of
    the average image's over a reconstruction's. Tseng et al. 2021, rectified as in their code.
    """
    real = F.relu(real_logits - fake_average).square()
    fake = F.relu(real_average - fake_logits).square()
    return real.flatten(1).mean(1) + fake.flatten(1).mean(1)


def adaptive_weight(reconstruction_gradient: torch.Tensor, generator_gradient: torch.Tensor) -> torch.Tensor:
    """Return the scalar factor that makes the generator's gradient at the last layer as large as the reconstruction's:
    Esser et al. 2021, equation 7, with the delta of their code. Their limit is `AdversarialConfig.max_factor`; it can
    be exceeded because our reconstruction loss is a sum over the image.
    """
    return reconstruction_gradient.norm() / (generator_gradient.norm() + 1e-4)


class Adversary:
    """Discriminator in training, and its state between steps.

    A step is `begin_step`, then `generator_loss`, `gradients` and `discriminator_loss` for each micro-batch, then
    `end_step` with the statistics of the whole step. Losses are per image and statistics are means over the images, so
    both are summed over micro-batches and processes, weighted by their share in the step's images. Only
    `discriminator_loss` gives the discriminator's parameters gradients, local to the process.

    One deviation from the papers: the adaptive factor and LeCam's averages are those of earlier steps, because a
    micro-batch does not have the gradients and logits of the others. In the first step, both are 0.

    The reconstruction loss is a sum over an image's values and the generator's a mean over its patches, so the factor
    is proportional to the number of values. The stored factor is for images at full size; `size` is the number of
    values of a current image, divided by the number at full size.
    """

    def __init__(self, config: AdversarialConfig, discriminator: PatchDiscriminator):
        self.config, self.discriminator = config, discriminator
        self.rise = 0.0  # factor on weight and learning rate in this step, 0 before the start
        self._factor = 0.0
        self._real_average = self._fake_average = 0.0
        self._average_weight = 0.0  # total weight of the averages: 0 after no step, 1 after many

    @property
    def active(self) -> bool:
        """Return whether reconstructions are judged in this step."""
        return self.rise > 0

    def weight_for(self, size: float = 1.0) -> float:
        """Return the weight of the generator's loss in this step for images of this size."""
        factor = min(self._factor * size, self.config.max_factor or math.inf) if self.config.adaptive else 1.0
        return self.config.weight * self.rise * factor

    def begin_step(self, images_seen: int) -> dict[str, float]:
        """Start the step after `images_seen` images. Return its weight for full-size images, to log."""
        self.rise = self.config.rise(images_seen)
        if self.active:
            self.discriminator.iterate()
        return {"adversarial_weight": self.weight_for()}

    def generator_loss(self, reconstructions: torch.Tensor) -> torch.Tensor:
        """Return the unweighted loss per image (B,) of reconstructions (B, C, H, W) in [-1, 1]."""
        with frozen(self.discriminator):
            return generator_loss(self.config.loss, self.discriminator(reconstructions))

    def gradients(
        self,
        reconstruction_loss: torch.Tensor,
        generator_loss: torch.Tensor,
        last_layer: torch.Tensor,
        size: float = 1.0,
    ) -> dict[str, torch.Tensor]:
        """Return, as statistics, the gradients of the two losses (per image or means) at the decoder's last layer, with
        the reconstruction's divided by `size`. Empty unless the weight is adaptive and the discriminator active. Keeps
        the graphs for the backward.
        """
        if not (self.active and self.config.adaptive):
            return {}
        of_reconstruction, of_generator = (
            torch.autograd.grad(loss.mean(), last_layer, retain_graph=True)[0]
            for loss in (reconstruction_loss, generator_loss)
        )
        return {"reconstruction_gradient": of_reconstruction / size, "generator_gradient": of_generator}

    def discriminator_loss(
        self, images: torch.Tensor, reconstructions: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss per image (B,) with penalties, and statistics, for images and reconstructions (B, C, H, W) in
        model range. No gradient reaches the reconstructions.
        """
        config = self.config
        real_logits, fake_logits = self.discriminator(images), self.discriminator(reconstructions.detach())
        loss, statistics = discriminator_loss(config.loss, real_logits, fake_logits), {}
        if config.lecam_weight:
            if self._average_weight:
                penalty = lecam_penalty(real_logits, fake_logits, self._real_average, self._fake_average)
                loss = loss + config.lecam_weight * penalty
            statistics = {"real_logits": real_logits.detach().mean(), "fake_logits": fake_logits.detach().mean()}
        if config.r1_weight:
            loss = loss + config.r1_weight * r1_penalty(self.discriminator, images)
        return loss, statistics

    def end_step(self, statistics: dict[str, torch.Tensor]) -> None:
        """Store the statistics of the whole step. Do not call it for a skipped step, whose statistics are not
        finite.
        """
        if not self.active:
            return
        if self.config.adaptive:
            gradients = statistics["reconstruction_gradient"], statistics["generator_gradient"]
            self._factor = adaptive_weight(*gradients).item()
        if self.config.lecam_weight:
            # an exponential average without bias towards its first value
            self._average_weight = LECAM_DECAY * self._average_weight + (1 - LECAM_DECAY)
            new = (1 - LECAM_DECAY) / self._average_weight
            self._real_average += new * (statistics["real_logits"].item() - self._real_average)
            self._fake_average += new * (statistics["fake_logits"].item() - self._fake_average)

    def state(self) -> dict[str, float]:
        """Return the state for `restore`, as JSON values. The discriminator's weights are in its state dict."""
        return {
            "factor": self._factor,
            "real_average": self._real_average,
            "fake_average": self._fake_average,
            "average_weight": self._average_weight,
        }

    def restore(self, state: dict[str, float]) -> None:
        self._factor, self._average_weight = state["factor"], state["average_weight"]
        self._real_average, self._fake_average = state["real_average"], state["fake_average"]
