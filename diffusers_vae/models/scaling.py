"""Scaling of latents to the inputs of a diffusion model, and back."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .stock import ModelMixin, signature_of

logger = logging.getLogger(__name__)

DEFAULTS = (0.18215, 1.0)  # default scaling_factor of a `VAE` or stock `AutoencoderKL`, and of an `MLPVAE`
DEFAULTED = "_use_default_values"
"""Key under which diffusers (checked with 0.36 and 0.42) stores the names of arguments that were not passed to the
constructor. It is not saved, and `from_config` ignores the values of these arguments."""


def unmeasured(config: Mapping[str, Any]) -> str | None:
    """Return why the scaling_factor in an autoencoder's `config` does not describe its latents, or None if it does.

    A constructor's default was not measured. It is valid for a published config.json that lacks the key, as in the
    first Stable Diffusion repositories: `from_pretrained` records its source, and a stock `from_single_file` keeps the
    class name of the published config.
    """
    factor = config.get("scaling_factor")
    published = "_name_or_path" in config or config.get("_class_name") == "AutoencoderKL"
    default = factor in DEFAULTS and "scaling_factor" in config.get(DEFAULTED, ()) and not published
    if factor is not None and not default:
        return None
    return (
        f"scaling_factor must be 1 / std of the model's own latents, got {factor}"
        f"{', the default of a new model' if default else ''}: call diffusers_vae.measure_latents(vae, images) to "
        "measure it and write it into the model's config or, if you know it, "
        "vae.register_to_config(scaling_factor=..., shift_factor=...)"
    )


def is_local(source: str | PathLike[str]) -> bool:
    """Return whether a model's `_name_or_path` is a folder or file rather than a Hub repository."""
    source = str(source)
    return source.count("/") != 1 or source.startswith((".", "/", "~")) or Path(source).exists()


def compression_ratio(block_out_channels: Sequence[int]) -> int:
    """Return image height / latent height: each block except the last halves it."""
    return 2 ** (len(block_out_channels) - 1)


class KeepsScaling(ModelMixin if TYPE_CHECKING else object):
    """Mixin of `VAE` and `MLPVAE` that handles scaling_factor and the path of the source."""

    def register_to_config(self, **kwargs: Any) -> None:
        """Set config values as if they had been passed to the constructor."""
        defaulted = getattr(self, "config", {}).get(DEFAULTED, [])
        remaining = {DEFAULTED: [name for name in defaulted if name not in kwargs]} if defaulted else {}
        super().register_to_config(**(remaining | kwargs))

    @signature_of(ModelMixin.save_pretrained)
    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Save as in diffusers, with a warning if the scaling_factor was not measured."""
        if self.config.get("scaling_factor") is not None and (reason := unmeasured(self.config)):
            logger.warning("config.json is saved with a scaling_factor that was not measured: %s", reason)
        super().save_pretrained(save_directory, **kwargs)

    def to_json_string(self) -> str:
        """Return the config as JSON, without the path of a local folder or file that the model was loaded from."""
        config = json.loads(super().to_json_string())
        if is_local(config.get("_name_or_path", "")):
            config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


@dataclass(frozen=True)
class LatentScaling:
    """Scaling of latents (B, C, h, w) to about mean 0 and std 1. Shape, dtype and device do not change. `scale` and
    `unscale` are inverses up to rounding, and compute in the order of stock pipelines, so that results are
    bit-identical.
    """

    factor: float = 1.0
    """1 / std of the latents over the data set."""
    shift: float = 0.0
    """Mean of the latents over the data set."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    """Mean and std of each channel, instead of `shift`."""

    def __post_init__(self):
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean and std must be given together, got {self.mean} and {self.std}")
        if self.mean is not None and (self.shift or len(self.mean) != len(self.std or ())):
            raise ValueError(
                "mean and std must have one value per channel and replace shift, got "
                f"{self.mean}, {self.std} and the shift {self.shift}"
            )
        if not self.factor:
            raise ValueError(f"factor must be a number other than 0, got {self.factor}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], use_shift: bool = True, per_channel: bool = True) -> LatentScaling:
        """Return the scaling of an autoencoder's `config`: scaling_factor with latents_mean and latents_std if it has
        both and `per_channel` is set, otherwise with shift_factor (None is 0) if `use_shift` is set. ValueError if the
        scaling_factor is None, or a default that was neither measured nor published.
        """
        if reason := unmeasured(config):
            raise ValueError(reason)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if per_channel and mean is not None and std is not None:
            return cls(config["scaling_factor"], mean=tuple(mean), std=tuple(std))
        return cls(config["scaling_factor"], (config.get("shift_factor") or 0.0) if use_shift else 0.0)

    def scale(self, latents: torch.Tensor) -> torch.Tensor:
        """Return (latents - shift) * factor, or by channel (latents - mean) * factor / std."""
        if self.mean is None or self.std is None:
            return (latents - self.shift) * self.factor
        return (latents - self._by_channel(self.mean, latents)) * self.factor / self._by_channel(self.std, latents)

    def unscale(self, scaled_latents: torch.Tensor) -> torch.Tensor:
        """Return scaled_latents / factor + shift, or by channel scaled_latents * std / factor + mean."""
        if self.mean is None or self.std is None:
            return scaled_latents / self.factor + self.shift
        mean, std = (self._by_channel(values, scaled_latents) for values in (self.mean, self.std))
        return scaled_latents * std / self.factor + mean

    def _by_channel(self, values: tuple[float, ...], latents: torch.Tensor) -> torch.Tensor:
        if latents.ndim != 4 or latents.shape[1] != len(values):
            raise ValueError(
                f"latents must have the shape (batch, {len(values)}, height, width), one channel per value of "
                f"latents_mean, got {tuple(latents.shape)}"
            )
        return torch.tensor(values).view(1, -1, 1, 1).to(latents)
