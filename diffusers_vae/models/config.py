"""From settings to a model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from .mlp import MLPVAE
from .vae import VAE

_DEFAULTS = {
    "vae": {
        "latent_channels": 4,
        "block_out_channels": (16, 32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "mid_block_add_attention": True,
        "use_quant_conv": False,
    },
    "mlp": {"hidden_dim": 400, "latent_dim": 20},
}


@dataclass(frozen=True)
class ModelConfig:
    """Which model.

    A field of the other architecture must be left out; one of the own that is left out gets the value named in its
    description, which the run's config.yaml then states.
    """

    architecture: Literal["vae", "mlp"] = "vae"
    """vae: convolutional, loads in stock diffusers. mlp: the perceptron, loads with this package only."""
    latent_channels: int | None = None
    """vae: channels of the latents (4)."""
    block_out_channels: tuple[int, ...] | None = None
    """vae: width per resolution; n entries make latents 2^(n-1) times smaller per side ([16, 32, 64])."""
    layers_per_block: int | None = None
    """vae: residual layers per resolution; the decoder has one more (1)."""
    norm_num_groups: int | None = None
    """vae: groups of the group norms, must divide every width (8)."""
    mid_block_add_attention: bool | None = None
    """vae: self-attention at the lowest resolution (true)."""
    use_quant_conv: bool | None = None
    """vae: 1x1 convolutions around the latents, as in Stable Diffusion 1 to XL (false)."""
    hidden_dim: int | None = None
    """mlp: width of the hidden layers (400)."""
    latent_dim: int | None = None
    """mlp: number of latent units (20)."""

    def __post_init__(self):
        if self.architecture not in _DEFAULTS:
            raise ValueError(f"model.architecture must be one of {', '.join(_DEFAULTS)}, got {self.architecture}")
        own = _DEFAULTS[self.architecture]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if field.name not in own:
                if value is not None:
                    raise ValueError(
                        f"model.{field.name} does not belong to the architecture {self.architecture}, got {value}; "
                        f"leave it out. Fields of {self.architecture}: {', '.join(own)}"
                    )
            elif value is None:
                object.__setattr__(self, field.name, own[field.name])
            elif (
                not isinstance(value, bool)
                and min(value if isinstance(value, (tuple, list)) else [value], default=0) < 1
            ):
                raise ValueError(f"model.{field.name} must be at least 1, got {value}")
        for width in self.block_out_channels or ():
            if width % self.norm_num_groups:
                raise ValueError(
                    f"model.block_out_channels must be divisible by model.norm_num_groups, got {width} and "
                    f"{self.norm_num_groups}"
                )

    @property
    def spatial_compression_ratio(self) -> int:
        """By what the sides of the images must be divisible."""
        return 2 ** (len(self.block_out_channels) - 1) if self.architecture == "vae" else 1

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Channels, height and width of the latents of one image of `size`."""
        if self.architecture == "mlp":
            return (self.latent_dim, 1, 1)
        return (self.latent_channels, *(side // self.spatial_compression_ratio for side in size))

    def build(self, channels: int, size: tuple[int, int]) -> VAE | MLPVAE:
        """A new model, randomly initialised, for images (channels, *size)."""
        if self.architecture == "mlp":
            return MLPVAE(image_size=size, in_channels=channels, hidden_dim=self.hidden_dim, latent_dim=self.latent_dim)
        blocks = len(self.block_out_channels)
        return VAE(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=tuple(self.block_out_channels),
            layers_per_block=self.layers_per_block,
            latent_channels=self.latent_channels,
            norm_num_groups=self.norm_num_groups,
            sample_size=max(size),
            use_quant_conv=self.use_quant_conv,
            use_post_quant_conv=self.use_quant_conv,
            mid_block_add_attention=self.mid_block_add_attention,
        )
