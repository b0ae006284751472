"""From settings to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..fields import at_home, check, only_with
from .load import LATENT_PARTS, Source, filled_in
from .mlp import MLPVAE
from .scaling import compression_ratio
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
    """Architecture of a new model, or the published one to train further.

    Fields of the other architecture must be null. Those of the chosen one that are null get the value in their
    description, which the run's config.yaml then states. With `pretrained`, the fields of both must be null.
    """

    architecture: Literal["vae", "mlp"] = "vae"
    """vae: convolutional, loads in stock diffusers; mlp: fully connected, loads only with this package."""
    latent_channels: int | None = only_with(None, at_least=1, architecture=("vae",), pretrained=False)
    """vae: number of latent channels; null: 4."""
    block_out_channels: tuple[int, ...] | None = only_with(None, at_least=1, architecture=("vae",), pretrained=False)
    """vae: width per resolution, of which n make latents 2^(n-1) times smaller per side; null: [16, 32, 64]."""
    layers_per_block: int | None = only_with(None, at_least=1, architecture=("vae",), pretrained=False)
    """vae: residual layers per resolution, with one more in the decoder; null: 1."""
    norm_num_groups: int | None = only_with(None, at_least=1, architecture=("vae",), pretrained=False)
    """vae: number of groups of the group norms, a divisor of every width; null: 8."""
    mid_block_add_attention: bool | None = only_with(None, architecture=("vae",), pretrained=False)
    """vae: add self-attention at the lowest resolution; null: true."""
    use_quant_conv: bool | None = only_with(None, architecture=("vae",), pretrained=False)
    """vae: add 1x1 convolutions around the latents, as in Stable Diffusion 1 to XL; null: false."""
    hidden_dim: int | None = only_with(None, at_least=1, architecture=("mlp",))
    """mlp: width of the hidden layers; null: 400."""
    latent_dim: int | None = only_with(None, at_least=1, architecture=("mlp",))
    """mlp: number of latent units; null: 20."""
    pretrained: str | None = only_with(None, "free", "local", architecture=("vae",))
    """Autoencoder to fine-tune: folder of a model, run or pipeline, Hub repository, or original checkpoint, .ckpt or
    .safetensors (docs/fine_tuning.md)."""
    subfolder: str | None = only_with(None, "free", "local", pretrained=True)
    """Subfolder of `pretrained` that holds the model, such as vae in a pipeline's repository."""
    revision: str | None = only_with(None, "free", "local", pretrained=True)
    """Branch, tag or commit of the repository `pretrained`."""
    train: Literal["decoder", "all"] | tuple[str, ...] = only_with("all", pretrained=True)
    """Part of `pretrained` to train: all; decoder, which keeps the latents; or patterns of parameter names
    (docs/fine_tuning.md)."""
    lora_rank: int | None = only_with(None, at_least=1, pretrained=True, train=("decoder",))
    """Rank of low-rank adapters (LoRA) to train instead of the decoder's weights; needs train decoder and peft
    (docs/fine_tuning.md)."""
    latents: str | None = only_with(None, "local", pretrained=True)
    """Folder of cached latents of the training images, with which a frozen encoder does not run
    (docs/fine_tuning.md)."""

    def __post_init__(self):
        at_home(self, "pretrained", "latents")
        if self.pretrained == "":
            raise ValueError("model.pretrained must name a folder, a repository or a file, got an empty name")
        check("model", self)
        if self.pretrained is not None:
            if not self.train:
                raise ValueError("model.train must hold at least one pattern, got an empty list")
            if self.latents is not None and self.trains_encoder:
                raise ValueError(
                    "model.latents are those of an encoder that is not trained: set model.train to decoder, got "
                    f"{self.train}"
                )
            return
        for name, default in _DEFAULTS[self.architecture].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for width in self.block_out_channels or ():
            if width % (self.norm_num_groups or 1):
                raise ValueError(
                    f"model.block_out_channels must be divisible by model.norm_num_groups, got {width} and "
                    f"{self.norm_num_groups}"
                )

    @property
    def _patterns(self) -> tuple[str, ...]:
        """Patterns of the names of the parameters to train."""
        if isinstance(self.train, str):
            return {"all": ("*",), "decoder": ("decoder.*", "post_quant_conv.*")}[self.train]
        return tuple(self.train)

    @cached_property
    def trains_encoder(self) -> bool:
        """Whether weights that determine the latents are trained; ValueError when there is no AutoencoderKL in
        `pretrained`.
        """
        if self.train in ("all", "decoder"):
            return self.train == "all"
        with torch.device("meta"):
            names = VAE.from_config(self._source).state_dict()
        of_encoder = [name for name in names if name.startswith(LATENT_PARTS)]
        return any(fnmatchcase(name, pattern) for name in of_encoder for pattern in self._patterns)

    @property
    def source(self) -> Source:
        assert self.pretrained is not None
        return Source(self.pretrained, self.subfolder, self.revision)

    @cached_property
    def _source(self) -> Mapping[str, Any]:
        """The config of `pretrained`, read once; ValueError when it holds no AutoencoderKL."""
        try:
            assert self.pretrained is not None
            return filled_in(self.source.config(["AutoencoderKL"]), self.pretrained)
        except (OSError, ValueError) as error:
            raise ValueError(f"model.pretrained: {error}") from error

    def made(self, folder: Path) -> None:
        """If `pretrained` is gone, take its config from `folder`, which holds the model that was made of it."""
        try:
            _ = self._source
        except ValueError:
            if not (folder / "config.json").exists():
                raise
            self.__dict__["_source"] = filled_in(Source(str(folder)).config(), str(folder))

    @property
    def width(self) -> int:
        """Channels of the feature maps at full size; 1 of a perceptron, which has none."""
        if self.architecture == "mlp":
            return 1
        return (self.block_out_channels or self._source["block_out_channels"])[0]

    @property
    def image_channels(self) -> set[int]:
        """Numbers of channels of the images that `pretrained` takes and gives."""
        return {self._source["in_channels"], self._source["out_channels"]}

    @property
    def spatial_compression_ratio(self) -> int:
        """Ratio of the sides of images and latents; ValueError when there is no AutoencoderKL in `pretrained`."""
        if self.architecture == "mlp":
            return 1
        return compression_ratio(self.block_out_channels or self._source["block_out_channels"])

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of the latents of an image of `size`; ValueError when there is no AutoencoderKL in
        `pretrained`.
        """
        if self.architecture == "mlp":
            return (self.latent_dim or 0, 1, 1)
        channels, ratio = self.latent_channels or self._source["latent_channels"], self.spatial_compression_ratio
        return channels, size[0] // ratio, size[1] // ratio

    def build(self, channels: int, size: tuple[int, int]) -> VAE | MLPVAE:
        """A new model for images (channels, *size): randomly initialised, or `pretrained`, in float32, in which only
        what `train` and `lora_rank` say requires a gradient. Under `torch.device("meta")` weights are not read.

        Raises:
            ValueError: when `pretrained` holds no AutoencoderKL, one of images with other channels, or no parameter
                that a pattern of `train` matches.
        """
        if self.pretrained is not None:
            return self._build_pretrained(channels)
        options: dict[str, Any] = {name: getattr(self, name) for name in _DEFAULTS[self.architecture]}
        if self.architecture == "mlp":
            return MLPVAE(size, channels, **options)
        widths = options["block_out_channels"] = tuple(options["block_out_channels"])
        return VAE(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            sample_size=max(size),
            use_post_quant_conv=options["use_quant_conv"],
            **options,
        )

    def _build_pretrained(self, channels: int) -> VAE:
        if self.image_channels != {channels}:
            wanted = " and ".join(map(str, self.image_channels))
            raise ValueError(f"data.channels must be {wanted}, as the images of {self.pretrained} have, got {channels}")
        on_meta = torch.empty(0).device.type == "meta"  # get_default_device of torch 2.7 ignores `with torch.device`
        vae = VAE.from_config(self._source) if on_meta else self.source.model()
        assert isinstance(vae, VAE)
        names = [name for name, _ in vae.named_parameters()]
        for pattern in self._patterns:
            if not isinstance(self.train, str) and not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"model.train: {pattern} matches no parameter; some of their names: {', '.join(names[::24])}"
                )
        for name, parameter in vae.named_parameters():
            parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in self._patterns))
        if self.lora_rank is not None:
            add_lora(vae, self.lora_rank)
        return vae.train()


def add_lora(vae: VAE, rank: int) -> None:
    """Freeze `vae` and add low-rank adapters to the convolutions and attention of its decoder, to be trained instead of
    its weights: LoRA, Hu et al. 2021, W + B A with B = 0 at first, so that nothing changes before training.

    `vae.save_lora_adapter(folder)` saves them alone, for `load_lora_adapter(folder, prefix=None,
    use_safetensors=True)` of a stock `AutoencoderKL`. Without peft, raise an ImportError.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("model.lora_rank needs PEFT: pip install peft") from error
    layers = vae.decoder.named_modules(prefix="decoder")
    adapted = [name for name, layer in layers if isinstance(layer, (nn.Conv2d, nn.Linear))]
    vae.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=adapted))  # which freezes all else
