"""Model settings, and the model that they build."""

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
    """Architecture of a new model, or a published model to train further.

    Fields of the other architecture must be null. A null field of the chosen architecture gets the value in its
    description, and the run's config.yaml records it. With `pretrained`, the fields of both must be null.
    """

    architecture: Literal["vae", "mlp"] = "vae"
    """vae: convolutional, loads in stock diffusers; mlp: fully connected, loads only with this package."""
    latent_channels: int | None = only_with(None, at_least=1, architecture=("vae",), pretrained=False)
    """vae: number of latent channels; null: 4."""
    block_out_channels: tuple[int, ...] | None = only_with(None, at_least=1, architecture=("vae",), pretrained=False)
    """vae: width per resolution; n widths make latents 2^(n-1) times smaller per side; null: [16, 32, 64]."""
    layers_per_block: int | None = only_with(None, at_least=1, architecture=("vae",), pretrained=False)
    """vae: number of residual layers per resolution, with one more in the decoder; null: 1."""
    norm_num_groups: int | None = only_with(None, at_least=1, architecture=("vae",), pretrained=False)
    """vae: number of group norm groups, a divisor of every width; null: 8."""
    mid_block_add_attention: bool | None = only_with(None, architecture=("vae",), pretrained=False)
    """vae: add self-attention at the lowest resolution; null: true."""
    use_quant_conv: bool | None = only_with(None, architecture=("vae",), pretrained=False)
    """vae: add 1x1 convolutions around the latents, as in Stable Diffusion 1, 2 and XL; null: false."""
    hidden_dim: int | None = only_with(None, at_least=1, architecture=("mlp",))
    """mlp: width of the hidden layers; null: 400."""
    latent_dim: int | None = only_with(None, at_least=1, architecture=("mlp",))
    """mlp: number of latent units; null: 20."""
    pretrained: str | None = only_with(None, "free", "local", architecture=("vae",))
    """Autoencoder to fine-tune: folder of a model, run or pipeline, Hub repository, or original .ckpt or .safetensors
    checkpoint (docs/fine_tuning.md)."""
    subfolder: str | None = only_with(None, "free", "local", pretrained=True)
    """Subfolder of model.pretrained that holds the model, such as vae in a pipeline's repository."""
    revision: str | None = only_with(None, "free", "local", pretrained=True)
    """Branch, tag or commit of the repository model.pretrained."""
    train: Literal["decoder", "all"] | tuple[str, ...] = only_with("all", pretrained=True)
    """Part of model.pretrained to train: all; decoder, which keeps the latents; or patterns of parameter names
    (docs/fine_tuning.md)."""
    lora_rank: int | None = only_with(None, at_least=1, pretrained=True, train=("decoder",))
    """Rank of LoRA adapters to train instead of the decoder's weights; needs model.train decoder and peft
    (docs/fine_tuning.md)."""
    latents: str | None = only_with(None, "local", pretrained=True)
    """Folder of cached latents of the training images, used instead of running a frozen encoder
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
                raise ValueError(f"model.latents needs a frozen encoder: set model.train to decoder, got {self.train}")
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
        """Return patterns of the names of the parameters to train."""
        if isinstance(self.train, str):
            return {"all": ("*",), "decoder": ("decoder.*", "post_quant_conv.*")}[self.train]
        return tuple(self.train)

    @cached_property
    def trains_encoder(self) -> bool:
        """Return whether training changes weights that determine the latents; ValueError if `pretrained` holds no
        AutoencoderKL.
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
        """Return the config of `pretrained`, read once; ValueError if it holds no AutoencoderKL."""
        try:
            assert self.pretrained is not None
            return filled_in(self.source.config(["AutoencoderKL"]), self.pretrained)
        except (OSError, ValueError) as error:
            raise ValueError(f"model.pretrained: {error}") from error

    def made(self, folder: Path) -> None:
        """If `pretrained` is gone, take its config from `folder`, which holds the model made from it."""
        try:
            _ = self._source
        except ValueError:
            if not (folder / "config.json").exists():
                raise
            self.__dict__["_source"] = filled_in(Source(str(folder)).config(), str(folder))

    @property
    def width(self) -> int:
        """Return the number of channels of the feature maps at full size; 1 for an MLP, which has none."""
        if self.architecture == "mlp":
            return 1
        return (self.block_out_channels or self._source["block_out_channels"])[0]

    @property
    def image_channels(self) -> set[int]:
        """Return the numbers of channels of the images that `pretrained` takes and returns."""
        return {self._source["in_channels"], self._source["out_channels"]}

    @property
    def spatial_compression_ratio(self) -> int:
        """Return image height / latent height; ValueError if `pretrained` holds no AutoencoderKL."""
        if self.architecture == "mlp":
            return 1
        return compression_ratio(self.block_out_channels or self._source["block_out_channels"])

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of the latents of an image of `size`; ValueError if `pretrained` holds no
        AutoencoderKL.
        """
        if self.architecture == "mlp":
            return (self.latent_dim or 0, 1, 1)
        channels, ratio = self.latent_channels or self._source["latent_channels"], self.spatial_compression_ratio
        return channels, size[0] // ratio, size[1] // ratio

    def build(self, channels: int, size: tuple[int, int]) -> VAE | MLPVAE:
        """Return a new model for images (channels, *size), randomly initialised or from `pretrained`, in float32. Only
        parameters selected by `train` and `lora_rank` require a gradient. Under `torch.device("meta")` no weights are
        read.

        Raises:
            ValueError: If `pretrained` holds no AutoencoderKL, its images have another number of channels, or a pattern
                in `train` matches no parameter.
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
                    f"model.train: {pattern} matches no parameter; examples of names: {', '.join(names[::24])}"
                )
        for name, parameter in vae.named_parameters():
            parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in self._patterns))
        if self.lora_rank is not None:
            add_lora(vae, self.lora_rank)
        return vae.train()


def add_lora(vae: VAE, rank: int) -> None:
    """Freeze `vae` and add low-rank adapters (LoRA, Hu et al. 2021) to the convolutions and attention of its decoder,
    to be trained instead of its weights. A layer computes W + B A with B = 0 at first, so nothing changes before
    training.

    `vae.save_lora_adapter(folder)` saves only the adapters, for `load_lora_adapter(folder, prefix=None,
    use_safetensors=True)` of a stock `AutoencoderKL`. Raise an ImportError without peft.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("model.lora_rank needs PEFT: pip install peft") from error
    layers = vae.decoder.named_modules(prefix="decoder")
    adapted = [name for name, layer in layers if isinstance(layer, (nn.Conv2d, nn.Linear))]
    vae.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=adapted))  # freezes everything else
