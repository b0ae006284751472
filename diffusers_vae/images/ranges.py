"""Value ranges: the only module that rescales pixels.

Files and data sets hold uint8 in [0, 255], models and pipelines use the model range [-1, 1], likelihoods and pictures
use [0, 1]. `ValueRange` is the range of files of any other depth.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from ..storage import write_text
from ..untrusted import read_json


def to_model_range(pixels: torch.Tensor) -> torch.Tensor:
    """Return images in [-1, 1] from uint8 pixels in [0, 255] or float pixels in [0, 1] of any shape; ValueError for
    other dtypes.
    """
    if pixels.dtype == torch.uint8:
        if not pixels.is_cpu or torch.compiler.is_compiling():
            return pixels.float() / 127.5 - 1
        # numpy uses one thread; torch's threads would wait for cores that are busy reading images
        images = torch.empty_like(pixels, dtype=torch.float32)  # aligned: the rounding of MKL depends on it
        np.divide(pixels.numpy(), np.float32(127.5), out=images.numpy(), dtype=np.float32)
        np.subtract(images.numpy(), np.float32(1), out=images.numpy())
        return images
    if not pixels.is_floating_point():
        raise ValueError(f"pixels must be uint8 in [0, 255] or floating point in [0, 1], got {pixels.dtype}")
    return pixels * 2 - 1


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """Return pixels in [0, 1] from images in [-1, 1] of any shape, without clamping."""
    return (images + 1) / 2


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 pixels in [0, 255] from images in [-1, 1] of any shape, clamped and rounded."""
    return (to_unit_range(images.float()).clamp(0, 1) * 255).round().to(torch.uint8)


RANGE_FILE = "value_range.json"
EXACT = 2**24
"""Widest integer range that float32 represents exactly: it has 2^23 + 1 values from 0.5 to 1."""


@dataclass(frozen=True)
class ValueRange:
    """Values that are -1 and 1 in model range; ValueError unless both are finite and increasing."""

    low: float
    high: float

    def __post_init__(self):
        if not (self.low < self.high and math.isfinite(self.high - self.low)):
            raise ValueError(f"a range of values must be two finite increasing numbers, got {self}")

    def __str__(self) -> str:
        return f"[{self.low:.15g}, {self.high:.15g}]"

    def to_unit(self, values: np.ndarray) -> torch.Tensor:
        """Return float32 in [0, 1] from real values of any shape; `from_model_range` restores integers exactly.

        Raises:
            ValueError: For values that are out of range or not finite, and for integers in a range wider than `EXACT`.
        """
        self._check(values.dtype)
        lowest, highest = values.min(), values.max()  # NaN is neither less nor greater than a bound
        inside = self._bounds(values.dtype)
        if not (inside[0] <= lowest and highest <= inside[1]) or not np.isfinite([lowest, highest]).all():
            wrong = highest if inside[0] <= lowest else lowest
            raise ValueError(f"values must be finite and lie in {self}, which data.value_range states, got {wrong}")
        unit = (values.astype(np.float64) - self.low) / (self.high - self.low)
        return torch.from_numpy(unit.astype(np.float32)).clamp(0, 1)  # only rounding could exceed the bounds

    def from_model_range(self, images: torch.Tensor, dtype: np.dtype | str) -> np.ndarray:
        """Return values of `dtype`, rounded for integers, from images in [-1, 1] of any shape, clamped to the range and
        to what `dtype` can hold.

        Raises:
            ValueError: For images that are not finite, and for integers in a range wider than `EXACT`.
        """
        dtype = np.dtype(dtype)
        self._check(dtype)
        if not images.isfinite().all():
            raise ValueError("images must be finite to become values of a file")
        unit = (images.detach().float().cpu().numpy().astype(np.float64) + 1) / 2
        values = self.low + unit * (self.high - self.low)
        inside = self._bounds(dtype)
        if dtype.kind != "f":
            return values.round().clip(*inside).astype(dtype)
        return values.clip(self.low, self.high).astype(dtype).clip(*inside)

    def save(self, folder: Path) -> None:
        """Write the range beside a model's config.json, which has no key for it."""
        write_text(folder / RANGE_FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> ValueRange | None:
        """Read the range in a model's folder, if there is one; ValueError naming the file if it holds no range."""
        file = folder / RANGE_FILE
        if not file.exists():
            return None
        try:
            return cls(**read_json(file))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file} must hold a range such as {{'low': 0, 'high': 65535}}: {error}") from error

    def _check(self, dtype: np.dtype) -> None:
        if dtype.kind not in "biuf":
            raise ValueError(f"values must be real numbers, got {dtype}")
        if dtype.kind != "f" and self.high - self.low > EXACT:
            raise ValueError(
                f"float32 cannot represent all integers in {self}: a range of {dtype} must be at most 2^24 = "
                f"{EXACT:,} wide; state a narrower data.value_range, or store the values as floats"
            )

    def _bounds(self, dtype: np.dtype) -> tuple[float, float]:
        """Return the smallest and the largest value of `dtype` in the range."""
        if dtype.kind == "f":  # the closest numbers that a file can hold
            with np.errstate(over="ignore"):
                return dtype.type(self.low), dtype.type(self.high)
        held = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        return max(math.ceil(self.low), held[0]), min(math.floor(self.high), held[1])
