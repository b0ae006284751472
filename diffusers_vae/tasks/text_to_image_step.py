"""Training step of a text-to-image model: denoiser and text encoder on latents of images."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, cast

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from ..engine.program import compiled
from ..engine.step import StepTerms
from ..losses.diffusion import DiffusionTerms
from .encoded import ReadLatents
from .text_to_image_config import TextToImageConfig
from .text_to_image_data import RunData, program_of


class TextToImage(nn.Module):
    """Text encoder and denoiser as one module, so that one call of `forward` synchronises all gradients."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the prediction (B, C, h, w) for noisy scaled latents at timesteps (B,), given tokens (B, L) of
        prompts.
        """
        return self.unet(noisy_latents, timesteps, self.text_encoder(tokens)[0]).sample


def build_model(config: TextToImageConfig, data: RunData) -> TextToImage:
    """Return a new model for latents and tokens of `data`."""
    model = config.model
    channels, height, width = data.latents.latent_shape
    attending = [len(model.block_out_channels) == 1 or level > 0 for level in range(len(model.block_out_channels))]
    unet = UNet2DConditionModel(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attending),
        up_block_types=tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attending)),
        block_out_channels=tuple(model.block_out_channels),
        layers_per_block=model.layers_per_block,
        attention_head_dim=model.attention_heads,  # stock's name for their number
        norm_num_groups=model.norm_num_groups,
        cross_attention_dim=model.text_width,
    )
    if config.run.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    tokenizer = data.tokenizer
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=model.text_width,
        intermediate_size=4 * model.text_width,
        projection_dim=model.text_width,
        num_hidden_layers=model.text_layers,
        num_attention_heads=model.text_heads,
        max_position_embeddings=config.captions.max_length,
        bos_token_id=cast(int, tokenizer.bos_token_id),
        eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int, tokenizer.pad_token_id),
    )
    return TextToImage(unet, CLIPTextModel(text))


def blank_output(model: nn.Module, data: RunData, device: torch.device) -> torch.Tensor:
    """Return a scalar that depends on every parameter by one forward."""
    latents = torch.zeros(1, *data.latents.latent_shape, device=device)
    return model(latents, torch.zeros(1, dtype=torch.long, device=device), data.no_prompt.to(device)).sum()


class TextToImageStep:
    """The `Step` of a text-to-image model.

    Args:
        config: settings.
        data: inputs of the run.
        accelerator: accelerator of the launch.
    """

    terms: tuple[str, ...] = ("error",)
    advice = "To make training more stable, lower optimizer.learning_rate or raise optimizer.warmup_images"

    def __init__(self, config: TextToImageConfig, data: RunData, accelerator: Accelerator):
        self.config, self.data = config, data
        self.program = program_of(config, data.train_set)
        self.objective = config.diffusion.build()
        # on the device, which chooses captions without the CPU waiting for it
        self.captions, self.positions = (
            data.captions.to(accelerator.device),
            data.latents.indices.to(accelerator.device),
        )
        self.tokens, self.no_prompt = (part.to(accelerator.device) for part in (data.tokens, data.no_prompt))

    def begin(self, images_seen: int, total_images: int, learning_rate: float) -> dict[str, float]:
        self.data.verification.check()
        return {}

    def random_inputs(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        shape, device = (count, *self.data.latents.latent_shape), generator.device
        steps = len(self.objective.scheduler.alphas_cumprod)
        return {
            "posterior_noise": torch.randn(shape, generator=generator, device=device),
            "noise": torch.randn(shape, generator=generator, device=device),
            "timesteps": torch.randint(steps, (count,), generator=generator, device=device),
            "caption": torch.rand(count, generator=generator, device=device),
            "dropped": torch.rand(count, generator=generator, device=device) < self.config.diffusion.caption_dropout,
        }

    def batch(self, read: ReadLatents, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        device = inputs["noise"].device
        noise = inputs["posterior_noise"] if self.data.latents.kind == "posterior" else None
        scaled_latents = self.data.scaling.scale(self.data.latents.latents(read.indices, noise).to(device))
        indices = self.positions[torch.as_tensor(read.indices, device=device)]
        tokens = self.tokens[self.captions.choose(indices, inputs["caption"])]
        tokens = torch.where(inputs["dropped"][:, None], self.no_prompt, tokens)
        kept = {name: inputs[name] for name in ("noise", "timesteps")}
        return kept | {"scaled_latents": scaled_latents, "tokens": tokens}

    @cached_property
    def _program(self) -> Callable[..., DiffusionTerms]:
        """`compute`, compiled if `run.step` is compiled."""
        return compiled(self.compute) if self.config.run.step == "compiled" else self.compute

    def __call__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> StepTerms:
        terms = self._program(model, batch["scaled_latents"], batch["noise"], batch["timesteps"], batch["tokens"])
        return StepTerms(terms.loss, {"error": terms.error})

    def compute(
        self,
        model: nn.Module,
        scaled_latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        tokens: torch.Tensor,
    ) -> DiffusionTerms:
        """Return the objective of scaled latents (B, C, h, w) with noise of the same shape at timesteps (B,), given
        tokens (B, L) of prompts.
        """
        noisy_latents = self.objective.noisy(scaled_latents, noise, timesteps)
        return self.objective(model(noisy_latents, timesteps, tokens), scaled_latents, noise, timesteps)

    def end(self, statistics: dict[str, torch.Tensor], images: int) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass
