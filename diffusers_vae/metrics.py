"""How close reconstructions come to images, one value per image, and the values of all processes together."""

from __future__ import annotations

import torch
import torch.distributed as dist
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


def process_share() -> tuple[int, int]:
    """The number of this process and how many measure together: (0, 1) unless torch.distributed was started."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather_parts(parts: list[tuple]) -> list[tuple]:
    """The parts (place, ...) of all processes in the order of their places: nothing is padded or counted twice, and a
    sum over them does not depend on how many processes there were. All processes must call it.
    """
    if process_share()[1] > 1:
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, parts)
        parts = [part for own in everyone for part in own]
    return sorted(parts, key=lambda part: part[0])
