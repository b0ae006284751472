"""One image in an autoencoder: its reconstruction, the latent directions that change it most, ways to another image."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from ..evaluation.metrics import psnr
from ..evaluation.reconstruct import padded, read_pixels
from ..images.fit import Fit
from ..images.ranges import ValueRange, to_model_range, to_uint8, to_unit_range
from ..models import MLPVAE, decode, encode
from ..models.scaling import LatentScaling, unmeasured
from ..models.stock import ModelMixin
from .pictures import interpolate

MOST_MODELS = 4  # side by side
LARGEST = 768  # pixels of the longer side: on a CPU, an f8 model takes seconds for it
INTERPOLATED = 256  # the same of images between which is interpolated: there are several steps
WINDOW = 16  # positions of the latents at which directions are looked for
BATCH = 8


@dataclass(frozen=True)
class Explored:
    """An autoencoder to look at."""

    name: str
    model: ModelMixin
    value_range: ValueRange | None = None
    """Value range that the model was trained with; None for 8-bit images."""


@dataclass(frozen=True)
class Reconstruction:
    """An image and what a model makes of it."""

    image: torch.Tensor
    """(1, C, H, W) in [-1, 1]."""
    posterior: DiagonalGaussianDistribution
    reconstruction: torch.Tensor
    """(1, C, H, W) in [-1, 1], from the mode of the posterior."""
    psnr: float
    """PSNR in dB."""
    seconds: float
    """Time to encode and decode the image once."""
    note: str
    """What was done to the image so that the model can take it; empty if nothing was."""


def read_for(explored: Explored, file: Path, largest: int = LARGEST) -> tuple[torch.Tensor, str]:
    """Read an image file for a model: (1, C, H, W) in [-1, 1], and what was done to it. A fully connected model takes
    its own size only: larger and smaller images are scaled and their centre is cropped. For others, images with a side
    of more than `largest` pixels are scaled down.

    Raises:
        ValueError: naming the file, when it cannot be read or its values are outside of the model's range.
    """
    model = explored.model
    pixels, _ = read_pixels(model, file, explored.value_range)
    height, width = pixels.shape[-2:]
    size, done = (height, width), "scaled"
    if isinstance(model, MLPVAE):
        size, done = model.image_shape[1:], "scaled and cropped"
    elif max(size) > largest:
        size = max(1, height * largest // max(size)), max(1, width * largest // max(size))
    note = "" if size == (height, width) else f"{done} from {width}x{height} to {size[1]}x{size[0]} pixels"
    return to_model_range(Fit(size).resize(pixels)[None]), note


@torch.no_grad()
def reconstruct_file(explored: Explored, file: Path) -> Reconstruction:
    """Encode and decode an image file, and time it; ValueError as `read_for`."""
    model = explored.model
    image, note = read_for(explored, file)
    if model.device.type != "cpu":  # the first pass at a size loads kernels
        _through(model, image)
    posterior, reconstruction, seconds = _through(model, image)
    if explored.value_range is None:
        reconstruction = to_model_range(to_uint8(reconstruction))
    return Reconstruction(image, posterior, reconstruction, psnr(image, reconstruction).item(), seconds, note)


def _through(model: ModelMixin, image: torch.Tensor) -> tuple[DiagonalGaussianDistribution, torch.Tensor, float]:
    """Return the posterior of an image, its reconstruction, and the seconds that both took."""
    start = time.perf_counter()
    posterior = encode(model, padded(model, image).to(model.device))
    reconstruction = _cropped(decode(model, posterior.mode()), image)  # waits for the device
    return posterior, reconstruction, time.perf_counter() - start


def _cropped(decoded: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    return decoded[..., : image.shape[-2], : image.shape[-1]].clamp(-1, 1).cpu()


@dataclass(frozen=True)
class Directions:
    """Directions in the channels of a model's latents, the one that changes the picture most first."""

    vectors: torch.Tensor
    """(K, C): what is added to the channels, at all positions alike, for one standard deviation along each."""
    weights: torch.Tensor
    """(K, C), rows of norm 1: the vectors in standard deviations of the channels."""
    shares: torch.Tensor
    """(K,): the part of the squared change of the picture that is each direction's."""


@torch.no_grad()
def telling_directions(model: ModelMixin, posterior: DiagonalGaussianDistribution, count: int = 6) -> Directions:
    """Find the `count` directions in the channels of an image's latents along which its reconstruction changes most.

    Each channel is shifted by one standard deviation up and down, at all positions alike, and decoded. The directions
    are the principal ones of these changes: the eigenvectors of the channels' matrix of inner products. Of latents with
    more than `WINDOW` positions a side, the centre alone is decoded.
    """
    latents, std = posterior.mode(), channel_std(model, posterior)
    height, width = latents.shape[-2:]
    top, left = max(0, (height - WINDOW) // 2), max(0, (width - WINDOW) // 2)
    centre = latents[..., top : top + WINDOW, left : left + WINDOW]
    shifts = torch.diag(std)[:, :, None, None]
    moved = torch.cat([centre + shifts, centre - shifts])
    decoded = torch.cat([decode(model, part).clamp(-1, 1) for part in moved.split(BATCH)])
    up, down = decoded.double().cpu().flatten(1).chunk(2)
    changes = (up - down) / 2
    values, vectors = torch.linalg.eigh(changes @ changes.T)
    weights = vectors.T.flip(0)[:count]
    largest = weights.gather(1, weights.abs().argmax(1, keepdim=True))
    weights = weights * torch.where(largest < 0, -1.0, 1.0)  # the sign of an eigenvector is arbitrary
    shares = values.clamp_min(0).flip(0) / values.clamp_min(0).sum().clamp_min(1e-12)
    return Directions((weights * std.double().cpu()).float(), weights.float(), shares[:count].float())


def channel_std(model: ModelMixin, posterior: DiagonalGaussianDistribution) -> torch.Tensor:
    """Return the standard deviation (C,) of each latent channel over the data set, from the model's config. If the
    config states none, compute it over the positions of this posterior or, with one position, return the prior's, 1.
    """
    mean = posterior.mean
    if unmeasured(model.config) is None:
        scaling, one = LatentScaling.from_config(model.config), torch.ones_like(mean[:1, :, :1, :1])
        return (scaling.unscale(one) - scaling.unscale(0 * one)).flatten()
    if mean[0, 0].numel() == 1:
        return torch.ones_like(mean[0, :, 0, 0])
    return (mean.var((0, 2, 3), correction=0) + posterior.var.mean((0, 2, 3))).sqrt()


@torch.no_grad()
def moved(model: ModelMixin, made: Reconstruction, directions: Directions, amounts: list[float]) -> torch.Tensor:
    """Decode the latents of an image, shifted by `amounts` standard deviations along the first directions."""
    vectors = directions.vectors[: len(amounts)]
    shift = torch.tensor(amounts[: len(vectors)], dtype=torch.float32) @ vectors
    latents = made.posterior.mode()
    return _cropped(decode(model, latents + shift.to(latents)[:, None, None]), made.image)


@torch.no_grad()
def between(explored: Explored, first: Path, second: Path, steps: int = 7) -> torch.Tensor:
    """Decode `steps` latents (steps, C, H, W) on the way from one image to another, which is scaled and cropped to
    the size of the first.

    Raises:
        ValueError: as `read_for`.
    """
    start, end = (read_for(explored, file, INTERPOLATED)[0] for file in (first, second))
    start = padded(explored.model, start)
    end = to_model_range(Fit((start.shape[-2], start.shape[-1])).resize(to_unit_range(end)))
    return interpolate(explored.model, start, end, steps, BATCH)


@torch.no_grad()
def prior_samples(model: MLPVAE, count: int, seed: int) -> torch.Tensor:
    """Decode samples from the prior: (count, C, H, W) in [-1, 1]."""
    noise = torch.randn(count, model.config.latent_dim, 1, 1, generator=torch.Generator().manual_seed(seed))
    return decode(model, noise.to(model.device)).cpu()
