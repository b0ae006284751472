"""Latents to what a diffusion model sees, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LatentScaling:
    """How latents (B, C, h, w) become scaled latents, about mean 0 and std 1, of the same shape, dtype and device.

    `scale` and `unscale` are inverses up to rounding. They compute in the order of stock pipelines, so that bits agree.
    """

    factor: float = 1.0
    """1 / std of the latents over the data set."""
    shift: float = 0.0
    """Mean of the latents over the data set."""
    mean: tuple[float, ...] | None = None
    """Of each channel, instead of `shift`."""
    std: tuple[float, ...] | None = None
    """Of each channel, beside `mean`."""

    def __post_init__(self):
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean and std must be given together, got {self.mean} and {self.std}")
        if self.mean is not None and (self.shift or len(self.mean) != len(self.std)):
            raise ValueError(
                "mean and std must have one value per channel and take the place of shift, got "
                f"{self.mean}, {self.std} and the shift {self.shift}"
            )
        if not self.factor:
            raise ValueError(f"factor must be a number other than 0, got {self.factor}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], use_shift: bool = True, per_channel: bool = True) -> LatentScaling:
        """That of an autoencoder's `config`: latents_mean and latents_std where it has both, else shift_factor (None
        is 0), and scaling_factor.

        Args:
            config: of an `AutoencoderKL`.
            use_shift: whether shift_factor counts.
            per_channel: whether latents_mean and latents_std count.
        """
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if per_channel and mean is not None and std is not None:
            return cls(config["scaling_factor"], mean=tuple(mean), std=tuple(std))
        return cls(config["scaling_factor"], (config.get("shift_factor") or 0.0) if use_shift else 0.0)

    def scale(self, latents: torch.Tensor) -> torch.Tensor:
        """(latents - shift) * factor, or by channel (latents - mean) * factor / std."""
        if self.mean is None:
            return (latents - self.shift) * self.factor
        return (latents - self._by_channel(self.mean, latents)) * self.factor / self._by_channel(self.std, latents)

    def unscale(self, scaled_latents: torch.Tensor) -> torch.Tensor:
        """scaled_latents / factor + shift, or by channel scaled_latents * std / factor + mean."""
        if self.mean is None:
            return scaled_latents / self.factor + self.shift
        mean, std = (self._by_channel(values, scaled_latents) for values in (self.mean, self.std))
        return scaled_latents * std / self.factor + mean

    def _by_channel(self, values: tuple[float, ...], latents: torch.Tensor) -> torch.Tensor:
        if latents.ndim != 4 or latents.shape[1] != len(values):
            raise ValueError(
                f"latents must have the shape (batch, {len(values)}, height, width), with a channel for each value of "
                f"latents_mean, got {tuple(latents.shape)}"
            )
        return torch.tensor(values).view(1, -1, 1, 1).to(latents)
