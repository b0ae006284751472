"""Training step of an autoencoder: losses, random inputs, and state between steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from ..data import ReadImages
from ..engine.program import compiled, compiles_whole_steps
from ..engine.step import Discriminator, StepTerms
from ..images.ranges import to_model_range
from ..latents.dataset import Verification
from ..losses import equivariance
from ..losses.adversarial import BETAS, Adversary, PatchDiscriminator
from ..losses.objective import START_SCALE, VAEObjective
from ..losses.perceptual import PerceptualLoss
from ..losses.training_objective import TrainingObjective
from ..models import MLPVAE, VAE, speed_up_norms
from .autoencoder_config import TrainConfig
from .autoencoder_data import program_of
from .encoded import ReadEncoded

logger = logging.getLogger(__name__)

STABLER = (
    "To make training more stable, lower optimizer.learning_rate or raise optimizer.warmup_images or objective.scale"
)


class WithScale(nn.Module):
    """An autoencoder and the learned scale of its likelihood as one module, so that one call of `forward` synchronises
    all gradients.
    """

    FASTER = 10.0
    """Factor on the learning rate of the scale. Adam moves a parameter by about the learning rate per step, so that a
    scale would need 700 steps to halve without it."""

    autoencoder: VAE | MLPVAE
    slow_log_scale: nn.Parameter

    def __init__(self, autoencoder: VAE | MLPVAE):
        super().__init__()
        self.autoencoder = autoencoder
        self.slow_log_scale = nn.Parameter(torch.full([1], math.log(START_SCALE) / self.FASTER))  # FSDP2: no scalar

    @property
    def log_scale(self) -> torch.Tensor:
        """Natural logarithm of the scale, a scalar."""
        return self.FASTER * self.slow_log_scale[0]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the outputs of the autoencoder, and log_scale."""
        return (*self.autoencoder(*args, **kwargs), self.log_scale)


CPU = torch.device("cpu")


def build_model(config: TrainConfig, device: torch.device = CPU) -> nn.Module:
    """Return a new model for training on `device`: the autoencoder, with its scale if that is learned."""
    assert config.data.channels is not None
    model = config.model.build(config.data.channels, config.data.size)
    if device.type == "cuda" and isinstance(model, VAE):
        from ..models.fast import fast  # and Triton

        fast(model)
    else:
        speed_up_norms(model)
    if config.run.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return WithScale(model) if config.objective.scale == "learned" else model


def autoencoder_of(model: nn.Module) -> VAE | MLPVAE:
    """Return the autoencoder in a result of `build_model`."""
    model = model.autoencoder if isinstance(model, WithScale) else model
    assert isinstance(model, (VAE, MLPVAE))
    return model


def blank_output(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.Tensor:
    """Return a scalar that depends on every parameter by one forward."""
    assert config.data.channels is not None
    images = torch.zeros(1, config.data.channels, *config.data.size, device=device)
    return torch.stack([output.sum() for output in model(images, sample_posterior=True, return_dict=False)]).sum()


class AutoencoderStep:
    """The `Step` of an autoencoder.

    Args:
        config: settings, with data.channels set.
        accelerator: accelerator of the launch.
        verification: check of the latents that are trained on, if any.

    Attributes:
        discriminator: new discriminator on the accelerator's device; None if `adversarial.weight` is 0.

    Raises:
        FileNotFoundError: if the weights of the perceptual loss are missing and cannot be downloaded.
        ValueError: if settings and processes contradict each other.
    """

    advice = STABLER

    def __init__(self, config: TrainConfig, accelerator: Accelerator, verification: Verification | None = None):
        self.config, self.accelerator, self.verification = config, accelerator, verification
        self.program = program_of(config)
        self.objective = TrainingObjective(config.objective)
        self.perceptual: PerceptualLoss | None = None
        self.adversary: Adversary | None = None
        self.discriminator: Discriminator | None = None
        self.terms = ("distortion", "rate")
        if config.objective.perceptual:
            self.terms += ("perceptual",)
            self.perceptual = PerceptualLoss(config.objective.perceptual)
            self.perceptual.check(config.smallest_size)
            self.perceptual.to(accelerator.device)
        if config.adversarial.weight:
            self.terms += ("generator", "discriminator")
            self._begin_discriminator()

    def _begin_discriminator(self) -> None:
        adversarial, accelerator = self.config.adversarial, self.accelerator
        if accelerator.is_fsdp2 and adversarial.adaptive:
            raise ValueError(
                "adversarial.adaptive needs the decoder's last layer whole on every process, which FSDP2 cuts up; let "
                "the processes work together by DDP, or set it to false"
            )
        assert self.config.data.channels is not None
        set_seed(self.config.run.seed)
        module = PatchDiscriminator(
            self.config.data.channels, adversarial.width, adversarial.layers, adversarial.norm
        ).to(accelerator.device)
        self.adversary = Adversary(adversarial, module)
        optimizer = torch.optim.AdamW(module.parameters(), betas=BETAS, weight_decay=0.0)
        self.discriminator = Discriminator(module, optimizer)

    def begin(self, images_seen: int, total_images: int, learning_rate: float) -> dict[str, float]:
        if self.verification:
            self.verification.check()
        readings = self.objective.begin_step(images_seen, total_images)
        if self.adversary and self.discriminator:
            readings |= self.adversary.begin_step(images_seen)
            highest = self.config.optimizer.learning_rate
            rate = (self.config.adversarial.learning_rate or highest) * learning_rate / highest * self.adversary.rise
            for group in self.discriminator.optimizer.param_groups:
                group["lr"] = rate
        return readings

    def random_inputs(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        shape = self.config.model.latent_shape(self.config.data.size)
        inputs = {"noise": torch.randn(count, *shape, generator=generator, device=generator.device)}
        if self.config.objective.equivariance:
            # The same for all images of a part; on the CPU, which decides by them without waiting for the device. Parts
            # of a whole batch are made of whole micro-batches. A smaller one, at the end of an epoch, is one part: how
            # its images are cut depends on the number of forwards.
            parts = self.config.objective.transformations if count == self.config.run.batch_size else 1
            cpu_generator = torch.Generator().manual_seed(generator.initial_seed() ^ 1)
            chances = torch.rand(parts, equivariance.DRAWS, generator=cpu_generator)
            inputs["chances"] = chances.repeat_interleave(count // parts, 0)
        return inputs

    def batch(self, read: ReadImages, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        device = inputs["noise"].device
        batch = inputs | {"pixels": read.pixels.to(device, non_blocking=True)}
        if isinstance(read, ReadEncoded) and read.moments is not None:
            batch["moments"] = read.moments.to(device, non_blocking=True)
        return batch

    def __call__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> StepTerms:
        pixels, noise = batch["pixels"], batch["noise"]
        before = after = None
        if "chances" in batch:
            ratio = self.config.model.spatial_compression_ratio
            probability = self.config.objective.equivariance
            size = noise.shape[-2], noise.shape[-1]
            before, after = equivariance.draw(batch["chances"][0], probability, size, ratio)
        if before:
            noise = noise[..., : before.size[0], : before.size[1]]
        keywords = {"moments": batch["moments"]} if "moments" in batch else {}
        # a compiled whole step traces this call
        forward = self._forward if torch.compiler.is_compiling() else self._program
        images, reconstructions, terms, log_scale = forward(model, pixels, noise, before, after, **keywords)
        step = StepTerms(
            terms.loss,
            {"distortion": terms.distortion, "rate": terms.rate},
            statistics=dict(terms.statistics),
            readings={} if log_scale is None else {"scale": log_scale.detach().exp()},
        )
        if self.perceptual:
            distance = self.perceptual(images, reconstructions)
            step.per_image["perceptual"] = distance
            weight = self.config.objective.perceptual_weight * images[0].numel()
            step = replace(step, network_loss=weight * distance.mean())
        if self.adversary:
            step.per_image.update(dict.fromkeys(("generator", "discriminator"), torch.zeros_like(terms.rate)))
            if self.adversary.active:
                decoder: Any = autoencoder_of(self.accelerator.unwrap_model(model)).decoder
                size = images.numel() / pixels.numel()
                step = self._judged(self.adversary, step, images, reconstructions, decoder.conv_out.weight, size)
        return step

    @cached_property
    def _program(self) -> Callable[..., tuple[Any, ...]]:
        """`_forward`, compiled if `run.step` is compiled."""
        run = self.config.run
        whole = compiles_whole_steps(run, self.program, self.accelerator)
        return compiled(self._forward) if run.step == "compiled" and not whole else self._forward

    def _forward(
        self,
        model: nn.Module,
        pixels: torch.Tensor,
        noise: torch.Tensor,
        before: equivariance.Transformation | None,
        after: equivariance.Transformation | None,
        **keywords: Any,
    ) -> tuple[Any, ...]:
        """Return images, reconstructions, the terms of the objective and log_scale (None unless it is learned)."""
        images = to_model_range(pixels)
        if before:
            images = before.images(images)
        if after:
            keywords["transform"] = after.latents
        if bernoulli := self.config.objective.likelihood == "bernoulli":
            keywords["return_logits"] = True
        reconstructions, posterior, *others = model(
            images, return_dict=False, return_posterior=True, noise=noise, **keywords
        )
        if after:
            images = after.images(images)
        size = images.numel() / pixels.numel()
        named = {"logits" if bernoulli else "log_scale": others[0]} if others else {}
        terms = self.objective(images, reconstructions, posterior, **named, encoded_whole=before is None, size=size)
        return images, reconstructions, terms, named.get("log_scale")

    def _judged(
        self,
        adversary: Adversary,
        terms: StepTerms,
        images: torch.Tensor,
        reconstructions: torch.Tensor,
        last_layer: torch.Tensor,
        size: float,
    ) -> StepTerms:
        """Return the terms with the generator's loss, and with the discriminator's loss as `judge`."""
        with self.accelerator.autocast():
            judgement = adversary.generator_loss(reconstructions)
        terms.per_image["generator"] = judgement
        added = adversary.weight_for(size) * judgement.mean()
        gradients = adversary.gradients(terms.total_loss, judgement.mean(), last_layer, size)
        judged = replace(
            terms,
            network_loss=added if terms.network_loss is None else terms.network_loss + added,
            statistics=terms.statistics | gradients,
        )
        reconstructions = reconstructions.detach()

        def judge() -> StepTerms:
            with self.accelerator.autocast():
                loss, statistics = adversary.discriminator_loss(images, reconstructions)
            return replace(
                judged,
                discriminator_loss=loss.mean(),
                per_image=judged.per_image | {"discriminator": loss},
                statistics=judged.statistics | statistics,
            )

        return replace(judged, judge=judge)

    def end(self, statistics: dict[str, torch.Tensor], images: int) -> None:
        self.objective.end_step(statistics, images)
        if self.adversary:
            self.adversary.end_step(statistics)

    def state(self) -> dict[str, Any]:
        return {
            "objective": self.objective.state(),
            "adversary": self.adversary.state() if self.adversary else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        saved, kept = state.get("objective", {}), self.objective.state()
        self.objective.restore(saved)
        if saved.keys() != kept.keys() and self.accelerator.is_main_process:  # run.allow_config_change let them change
            keys = kept.keys() - saved.keys(), saved.keys() - kept.keys()
            new, gone = (", ".join(sorted(names)) or "nothing" for names in keys)
            logger.warning(
                "the checkpoint was saved with other settings of the objective: the state of %s starts over, and the "
                "state of %s is dropped",
                new,
                gone,
            )
        if self.adversary and state.get("adversary"):
            self.adversary.restore(state["adversary"])

    def measured(self, model: nn.Module) -> VAEObjective:
        """Return the objective for evaluating `model`, with the current likelihood scale and kl_weight."""
        return self.objective.measured(model.log_scale.item() if isinstance(model, WithScale) else None)
