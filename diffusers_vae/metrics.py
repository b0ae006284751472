"""How close reconstructions come to images: pure functions, one value per image."""

from __future__ import annotations

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure


def psnr(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio (B,), dB, of (B, C, H, W) in [-1, 1]; reconstructions are clamped, not rounded.

    At most 100 dB, a mean squared error of 1e-10 of the squared range: an exact copy would make every mean infinite.
    """
    ratio = peak_signal_noise_ratio(
        reconstructions.clamp(-1, 1), images, data_range=2.0, reduction="none", dim=(1, 2, 3)
    )
    return ratio.clamp(max=100.0)


def ssim(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Structural similarity (B,), at most 1, of (B, C, H, W) in [-1, 1] with sides of at least 6; Wang et al. 2004,
    with their Gaussian window of 11 pixels and std 1.5. Reconstructions are clamped, not rounded.
    """
    similarity = structural_similarity_index_measure(
        reconstructions.clamp(-1, 1), images, data_range=2.0, reduction="none"
    )
    return similarity.view(len(images))
