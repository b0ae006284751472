"""Convolutional KL autoencoder, interchangeable with diffusers' `AutoencoderKL`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from os import PathLike
from typing import Any, TypeVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput, DiagonalGaussianDistribution, Encoder
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .posterior import VAEOutput, check_batch, check_dtype, in_dtype_of, posterior_from_moments, take_latents
from .scaling import DEFAULTED, KeepsScaling, LatentScaling, compression_ratio, is_local, unmeasured
from .stock import (
    AttentionMixin,
    AutoencoderKL,
    AutoencoderMixin,
    ConfigMixin,
    FromOriginalModelMixin,
    ModelMixin,
    PeftAdapterMixin,
    borrow,
    signature_of,
)

M = TypeVar("M", bound=ModelMixin)
LEAST_TILE = 256
"""Smallest default side of tiles in pixels: borders and group norms of smaller tiles are visible."""


class VAE(
    KeepsScaling, ModelMixin, AttentionMixin, AutoencoderMixin, ConfigMixin, FromOriginalModelMixin, PeftAdapterMixin
):
    """KL autoencoder with the constructor, config keys and weights of diffusers' `AutoencoderKL`.

    It saves itself under that name, so a saved `VAE` loads in stock diffusers, and a stock `AutoencoderKL` loads as a
    `VAE`. Differences: the posterior is float32, wrong input raises a ValueError, and `forward` can return the
    posterior, so that training is one call of the (wrapped) module.

    Args:
        in_channels: Number of channels of the images.
        out_channels: Number of channels of the reconstructions.
        down_block_types: One diffusers block name per resolution of the encoder.
        up_block_types: One diffusers block name per resolution of the decoder.
        block_out_channels: Width per resolution; n entries give a spatial compression ratio of 2^(n-1).
        layers_per_block: Number of residual layers per resolution in the encoder; the decoder has one more.
        act_fn: Activation function.
        latent_channels: Number of channels of the latents.
        norm_num_groups: Number of groups of the group norms; must divide every width.
        sample_size: Side in pixels of the training images, and of tiles, which have at least 256.
        scaling_factor: 1 / std of the latents over the training set. The default is Stable Diffusion's;
            `diffusers_vae.measure_latents` sets the value for this model.
        shift_factor: Mean of the latents over the training set.
        latents_mean: Per-channel mean, for pipelines that standardise by channel.
        latents_std: Per-channel std, for pipelines that standardise by channel.
        force_upcast: Whether float16 pipelines run the autoencoder in float32.
        use_quant_conv: Whether to apply a 1x1 convolution to the moments.
        use_post_quant_conv: Whether to apply a 1x1 convolution to the latents before the decoder.
        mid_block_add_attention: Whether to add self-attention at the lowest resolution.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = borrow("_no_split_modules")
    _group_offload_block_modules = borrow("_group_offload_block_modules")

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ):
        super().__init__()
        if type(self) is VAE:
            self.__module__ = "diffusers"  # of this object only: see VAE.__name__ below
        blocks: dict[str, Any] = {
            "block_out_channels": block_out_channels,
            "layers_per_block": layers_per_block,
            "act_fn": act_fn,
            "norm_num_groups": norm_num_groups,
            "mid_block_add_attention": mid_block_add_attention,
        }
        self.encoder = Encoder(
            in_channels=in_channels, out_channels=latent_channels, down_block_types=down_block_types, **blocks
        )
        self.decoder = Decoder(
            in_channels=latent_channels, out_channels=out_channels, up_block_types=up_block_types, **blocks
        )
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None

        # attributes that stock's tiling and slicing read
        self.use_slicing = False
        self.use_tiling = False
        side = sample_size[0] if isinstance(sample_size, (list, tuple)) else sample_size
        self.tile_sample_min_size = max(side, LEAST_TILE)
        self.tile_latent_min_size = int(self.tile_sample_min_size / self.spatial_compression_ratio)
        self.tile_overlap_factor = 0.25

    # Identical to stock.
    set_default_attn_processor = borrow("set_default_attn_processor")
    fuse_qkv_projections = borrow("fuse_qkv_projections")
    unfuse_qkv_projections = borrow("unfuse_qkv_projections")
    blend_v = borrow("blend_v")
    blend_h = borrow("blend_h")
    tiled_decode = borrow("tiled_decode")
    _tiled_encode = borrow("_tiled_encode")
    _encode = borrow("_encode")
    _decode = borrow("_decode")

    @property
    def spatial_compression_ratio(self) -> int:
        """Return image height / latent height."""
        return compression_ratio(self.config.block_out_channels)

    @apply_forward_hook
    def encode(
        self, x: torch.Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Return the float32 posterior over latents (B, latent_channels, h, w) of images `x` as `latent_dist`.

        Args:
            x: Images (B, in_channels, H, W) in [-1, 1], H and W divisible by `spatial_compression_ratio`, in the
                model's dtype (under autocast, in any that it casts); ValueError for others.
            return_dict: Whether to return an `AutoencoderKLOutput` rather than a tuple.
        """
        check_batch(x, self.config.in_channels, "images")
        height, width = x.shape[-2:]
        ratio = self.spatial_compression_ratio
        if height < ratio or width < ratio or height % ratio or width % ratio:
            raise ValueError(f"image height and width must be divisible by {ratio}, got {height}x{width}")
        check_dtype(self, x)

        slices = x.split(1) if self.use_slicing and len(x) > 1 else (x,)
        posterior = posterior_from_moments(torch.cat([self._encode(images) for images in slices]))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Return reconstructions (B, out_channels, H, W), about [-1, 1], of the unscaled latents `z` as `sample`.

        Args:
            z: Latents (B, latent_channels, h, w) of any floating dtype; ValueError for another shape or dtype.
            return_dict: Whether to return a `DecoderOutput` rather than a tuple.
            generator: Unused, but pipelines pass it.
        """
        check_batch(z, self.config.latent_channels, "latents")
        z = in_dtype_of(self, z)
        slices = z.split(1) if self.use_slicing and len(z) > 1 else (z,)
        sample = torch.cat([self._decode(latents, return_dict=False)[0] for latents in slices])
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def tiled_encode(
        self, x: torch.Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encode tile by tile, as `encode` does for large images, for any image size."""
        posterior = posterior_from_moments(self._tiled_encode(x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def forward(
        self,
        sample: torch.Tensor | None,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        return_posterior: bool = False,
        noise: torch.Tensor | None = None,
        moments: torch.Tensor | None = None,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> DecoderOutput | VAEOutput | tuple[Any, ...]:
        """Return reconstructions (B, out_channels, H, W) of the images `sample` as `sample`.

        Args:
            sample: Images, as for `encode`; may be None with `moments`.
            sample_posterior: Whether to decode a sample from the posterior instead of its mode.
            return_dict: Whether to return an output class rather than a tuple.
            generator: Generator for the sample.
            return_posterior: Whether to return a `VAEOutput` (or a tuple of two) with the posterior, as training needs
                it: only the wrapped module's `forward` synchronises gradients between processes and applies autocast.
            noise: Standard normal noise of the shape of the latents. With it, mean + std * noise is decoded instead of
                a sample, so that an image's noise does not depend on how a batch is split.
            moments: Moments (B, 2 * latent_channels, h, w), as in `encode(...).latent_dist.parameters`, instead of
                images.
            transform: Transformation of the latents before they are decoded.
        """
        if moments is None:
            assert sample is not None, "images or moments"
            posterior = self.encode(sample, return_dict=False)[0]
        else:
            check_batch(moments, 2 * self.config.latent_channels, "moments")
            posterior = posterior_from_moments(moments)
        latents = take_latents(posterior, sample_posterior, generator, noise)
        if transform is not None:
            latents = transform(latents)
        reconstructions = self.decode(latents, return_dict=False)[0]
        if return_posterior:
            return VAEOutput(reconstructions, posterior) if return_dict else (reconstructions, posterior)
        return DecoderOutput(sample=reconstructions) if return_dict else (reconstructions,)

    def train(self, mode: bool = True) -> VAE:
        """Set the mode of all parts except frozen ones, which stay in eval mode."""
        super().train(mode)
        for part in (self.encoder, self.quant_conv, self.decoder, self.post_quant_conv):
            if part is not None and not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Return scaled latents (B, latent_channels, h, w): (latents - shift_factor) * scaling_factor or, if the config
        has both, (latents - latents_mean) * scaling_factor / latents_std by channel. Stock pipelines differ: for the
        denoiser of one, use `diffusers_vae.pipelines.latent_scaling`.

        Raises:
            ValueError: For latents of another shape, and if the scaling_factor is None or the constructor's default,
                which was not measured: see `diffusers_vae.measure_latents`.
        """
        check_batch(latents, self.config.latent_channels, "latents")
        return LatentScaling.from_config(self.config).scale(latents)

    def unscale_latents(self, scaled_latents: torch.Tensor) -> torch.Tensor:
        """Return latents (B, latent_channels, h, w) for `decode`: the inverse of `scale_latents`, with its errors."""
        check_batch(scaled_latents, self.config.latent_channels, "scaled_latents")
        return LatentScaling.from_config(self.config).unscale(scaled_latents)

    def to_diffusers(self) -> AutoencoderKL:
        """Return the stock class, which pipelines accept, with the same modules: parameters are shared, not copied."""
        return _around_parts_of(self, AutoencoderKL)

    @classmethod
    def from_diffusers(cls, stock: AutoencoderKL) -> VAE:
        """Return this class with the modules of a stock `AutoencoderKL`: parameters are shared, not copied."""
        if not isinstance(stock, AutoencoderKL):
            raise TypeError(f"from_diffusers takes a diffusers AutoencoderKL, got {type(stock).__qualname__}")
        return _around_parts_of(stock, cls)

    @classmethod
    def from_single_file(cls, *args: Any, **kwargs: Any) -> VAE:
        """Load an original checkpoint by `AutoencoderKL.from_single_file`, which needs the stock class name."""
        return cls.from_diffusers(AutoencoderKL.from_single_file(*args, **kwargs))

    @signature_of(ModelMixin.save_pretrained)
    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Save as in diffusers, with loaded adapters merged into the weights."""
        super(VAE, without_adapters(self)).save_pretrained(save_directory, **kwargs)

    def to_json_string(self) -> str:
        """Return the config as JSON with the stock name, which `AutoModel` and `model_index.json` find in diffusers."""
        kept = self.config.get("_class_name", VAE.__qualname__)
        config = json.loads(super().to_json_string())
        self.config["_class_name"] = (
            kept  # diffusers changes it, and `unmeasured` would take AutoencoderKL for published
        )
        config["_class_name"] = "AutoencoderKL"
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def with_whole_tiles(stock: AutoencoderKL) -> AutoencoderKL:
    """Return `stock` with a sample_size of at least 256, which a pipeline uses only as the side of tiles."""
    size = stock.config.sample_size
    if isinstance(size, int) and size < LEAST_TILE:
        if stock.tile_sample_min_size == size:  # not set by the user
            stock.tile_sample_min_size = LEAST_TILE
            stock.tile_latent_min_size = LEAST_TILE // compression_ratio(stock.config.block_out_channels)
        stock.register_to_config(sample_size=LEAST_TILE)
    return stock


def without_adapters(vae: M) -> M:
    """Return a copy with adapters merged into the weights, which saves as stock; `vae` itself without any."""
    if not getattr(vae, "peft_config", None):
        return vae
    merged = copy.deepcopy(vae)
    merged.fuse_lora()
    merged.unload_lora()
    return merged


# A pipeline's model_index.json names a component by the `__module__` of the object and the `__name__` of its class
# (diffusers 0.36 to 0.42). Everything else, pickle too, finds this class by its own `__module__` and `__qualname__`.
VAE.__name__ = AutoencoderKL.__name__


def _around_parts_of(source: ModelMixin, kind: type[M]) -> M:
    """Return a `kind` with the modules of `source` and its current config: `from_config` alone resets registered values
    that replace a default.
    """
    of_class = [DEFAULTED, "_class_name", "_diffusers_version"]
    if is_local(source.config.get("_name_or_path", "")):  # a stock class would save the path
        of_class.append("_name_or_path")
    with torch.device("meta"):
        target = kind.from_config({name: value for name, value in source.config.items() if name not in of_class})
    if unmeasured(source.config):
        target.register_to_config(**{DEFAULTED: ["scaling_factor"]})
    for name in (
        *("encoder", "decoder", "quant_conv", "post_quant_conv", "training"),
        *("use_slicing", "use_tiling", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor"),
        *("peft_config", "_hf_peft_config_loaded"),  # while an adapter is loaded; private in diffusers 0.36 to 0.42
    ):
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))
    return target
