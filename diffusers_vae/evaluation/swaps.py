"""Loss of reconstruction quality when latents are swapped between images."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..data import ImageSet, kept_images
from ..latents.statistics import SwapCosts
from ..models import decode, encode
from ..models.stock import ModelMixin
from ..processes import gather, gather_parts, process_share
from ..silence import alone, report_progress
from .metrics import psnr

SWAPPED = 64
"""Maximum number of images that `measure_swaps` reconstructs."""
FAINT_COLOUR = 4 / 255
"""Root mean square of the colour of all images, in model range, below which they count as grey."""


@torch.no_grad()
def measure_swaps(
    model: ModelMixin, image_set: ImageSet, batch_size: int, max_images: int | None = None
) -> SwapCosts | None:
    """Measure what reconstructions of `model`, in eval mode, lose if latents come from another image; None if fewer
    than two images can be read.

    At most `SWAPPED` images are used, spread evenly over the first `max_images`. Each takes latents from the image half
    the list away. Each is encoded once, and decoded twice plus once per channel. Under torch.distributed, all processes
    must call it with the same model; they share the work.
    """
    count = len(image_set) if max_images is None else min(max_images, len(image_set))
    indices = np.unique(np.linspace(0, count - 1, min(count, SWAPPED)).astype(int)).tolist()
    with alone("reading images"):
        read = image_set.read(indices)
    kept, images = kept_images(image_set, indices, read, torch.device("cpu"))  # moved to the device in batches
    on_all = set(indices).intersection(*gather(kept))  # one process may fail to read an image that another could read
    images = images[[position for position, index in enumerate(kept) if index in on_all]]
    if len(images) < 2:
        return None
    modes = torch.cat([encode(model, part.to(model.device)).mode() for part in images.split(batch_size)])
    others = modes.roll(len(modes) // 2, 0)

    def figures(latents: torch.Tensor) -> tuple[float, float]:
        """Return the mean PSNR, and the mean squared error of the colours, of reconstructions."""
        ratios, errors = [], 0.0
        for shown, part in zip(images.split(batch_size), latents.split(batch_size), strict=True):
            shown, reconstructions = shown.to(model.device), decode(model, part).clamp(-1, 1)
            ratios += psnr(shown, reconstructions).tolist()
            errors += (_colour(shown) - _colour(reconstructions)).square().mean((1, 2, 3)).sum().item()
            report_progress()
        return sum(ratios) / len(ratios), errors / len(images)

    (unchanged, unchanged_colour), (other, other_colour) = figures(modes), figures(others)
    rank, processes = process_share()
    costs = []
    for channel in range(rank, modes.shape[1], processes):
        mixed = modes.clone()
        mixed[:, channel] = others[:, channel]
        costs.append((channel, unchanged - figures(mixed)[0]))
    colour = sum(_colour(part).square().sum().item() for part in images.split(batch_size)) / images.numel()
    colourful = colour**0.5 > FAINT_COLOUR
    return SwapCosts(
        images=len(images),
        all=unchanged - other,
        colour=10 * math.log10(max(other_colour, 1e-12) / unchanged_colour) if colourful and unchanged_colour else None,
        channels=[cost for _, cost in gather_parts(costs)],
    )


def _colour(images: torch.Tensor) -> torch.Tensor:
    """Return the colours of images (B, C, H, W): each channel minus the mean of the channels."""
    return images - images.mean(1, keepdim=True)
