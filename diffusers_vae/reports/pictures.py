"""Pictures of a model's behaviour on images: PIL images for files, trackers and reports."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from ..data import ImageSet, image_batches
from ..images.grid import to_pil
from ..losses.objective import rate_per_unit
from ..models import decode, encode
from ..models.stock import ModelMixin
from .charts import loss_picture, nats, rate_distortion_picture, rate_picture
from .pages import PAGE_WIDTH, columns_for, new_figure, page, render, rows_for, steps_for, titled

AMPLIFICATION = 4  # factor on differences
DIFFERENCE = "grey where none, brighter where too bright"
CAPTIONS = {
    "reconstructions": (
        "Reconstructions",
        "Rows of images, reconstructions from the mode of the posterior, and amplified differences: grey for none, "
        "bright where the reconstruction is too bright, dark where it is too dark.",
    ),
    "samples": (
        "Samples from the prior",
        "Decoded samples from N(0, I). If latents have many positions, sample whole images with a diffusion model over "
        "the latents instead.",
    ),
    "traversals": (
        "Traversals",
        "One channel of an image's latents changes from left to right, the others are fixed. In a row without changes, "
        "the decoder ignores the channel.",
    ),
    "interpolations": (
        "Interpolations",
        "Spherical interpolation between the latents of two images, from left to right.",
    ),
    "manifold": ("Manifold", "The decoded plane of the two latent units, evenly spaced in the prior's probability."),
    "latents": ("Latents", "Posterior means of images in a plane, coloured by label if there are labels."),
    "rates": (
        "Rates",
        "Rate of each channel and each position of the latents, in nats per image. Red channels are unused: swapping "
        "them with another image's hardly changes the reconstruction.",
    ),
    "loss": ("Training", "Loss, its two terms and the learning rate over the images seen."),
    "rate_distortion": (
        "Rate and distortion",
        "Path of the run, coloured by images seen. Points on a dashed line have the same elbo; further down and "
        "left is better.",
    ),
}
"""Heading and caption of each picture of `draw_all`."""


@torch.no_grad()
def _posterior(model: ModelMixin, images: torch.Tensor, batch_size: int) -> DiagonalGaussianDistribution:
    moments = [encode(model, part.to(model.device)).parameters.cpu() for part in images.split(batch_size)]
    return DiagonalGaussianDistribution(torch.cat(moments))


@torch.no_grad()
def _decode(model: ModelMixin, latents: torch.Tensor, batch_size: int) -> torch.Tensor:
    decoded = [decode(model, part.to(model.device)) for part in latents.split(batch_size)]
    return torch.cat([part.clamp(-1, 1).cpu() for part in decoded])


def reconstruction_picture(model: ModelMixin, images: torch.Tensor, batch_size: int) -> Image.Image:
    """Return rows of originals, reconstructions and differences, for images (B, C, H, W) in [-1, 1].

    Differences are signed and amplified: grey for none, bright where the reconstruction is too bright.
    """
    columns = min(columns_for(images.shape[-1]), len(images))
    images = images[: len(images) // columns * columns]
    reconstructions = _decode(model, _posterior(model, images, batch_size).mode(), batch_size)
    images = images.float().cpu()
    rows = [images, reconstructions, AMPLIFICATION * (reconstructions - images)]
    triples = zip(*(part.split(columns) for part in rows), strict=True)
    labels = ["original", "reconstruction", f"difference x{AMPLIFICATION}"] * (len(images) // columns)
    title = f"Images, their reconstructions, and {AMPLIFICATION} times the difference: {DIFFERENCE}"
    return page(torch.cat([torch.cat(triple) for triple in triples]), columns, title, labels)


def sample_picture(
    model: ModelMixin, latent_shape: tuple[int, ...], batch_size: int, seed: int, count: int
) -> Image.Image:
    """Return decoded samples from the prior N(0, I) over latents of `latent_shape`, (channels, height, width)."""
    latents = torch.randn(count, *latent_shape, generator=torch.Generator().manual_seed(seed))
    samples = _decode(model, latents, batch_size)
    title = "Samples from the prior N(0, I)"
    if latent_shape[1] * latent_shape[2] > 1:
        title += (
            f", sampled independently at each of the {latent_shape[1]}x{latent_shape[2]} positions. To sample whole "
            "images, train a diffusion model over the latents"
        )
    return page(samples, min(count, columns_for(samples.shape[-1])), title)


def slerp(first: torch.Tensor, second: torch.Tensor, steps: int) -> torch.Tensor:
    """Return latents (B, steps, ...) from `first` to `second`, (B, ...) each, at equal angles on the great circle
    between their directions, with norms in equal steps: Shoemake 1985, the formula in section 3.3.

    All latents of an image are one vector. If no great circle is unique, between parallel or opposite vectors and from
    the origin, the path is straight.
    """
    ends = torch.stack([first, second]).double().flatten(2)
    norms = ends.norm(dim=-1, keepdim=True)
    (start, end), weights = ends, torch.linspace(0, 1, steps, dtype=torch.float64)[:, None]
    directions = ends / norms.clamp_min(1e-300)
    # accurate for small angles, unlike the arccosine of the product
    difference, total = directions[1] - directions[0], directions[1] + directions[0]
    angle = 2 * torch.atan2(difference.norm(dim=-1), total.norm(dim=-1))[:, None, None]
    from_first, to_second = torch.sin((1 - weights) * angle), torch.sin(weights * angle)
    sine = torch.sin(angle)
    turned = (from_first * directions[0][:, None] + to_second * directions[1][:, None]) / sine
    turned = turned * ((1 - weights) * norms[0][:, None] + weights * norms[1][:, None])
    straight = (1 - weights) * start[:, None] + weights * end[:, None]
    singled_out = (sine > 1e-6) & (norms > 0).all(0)[:, None]
    return torch.where(singled_out, turned, straight).view(len(first), steps, *first.shape[1:]).to(first.dtype)


def interpolate(
    model: ModelMixin, first: torch.Tensor, second: torch.Tensor, steps: int, batch_size: int
) -> torch.Tensor:
    """Return decoded latents (B * steps, C, H, W), in [-1, 1], on the great circle between the posterior means of each
    pair of images (B, C, H, W) in [-1, 1]. The ends are the reconstructions.

    The circle is around `config.shift_factor`, the mean of the latents, if it is set. The path is then that between
    scaled latents, because a common factor changes neither angles nor ratios of norms.
    """
    ends = _posterior(model, torch.cat([first, second]), batch_size).mode()
    centre = model.config.get("shift_factor") or 0.0
    start, end = (ends - centre).chunk(2)
    latents = slerp(start, end, steps) + centre
    return _decode(model, latents.flatten(0, 1), batch_size)


def interpolation_picture(model: ModelMixin, first: torch.Tensor, second: torch.Tensor, batch_size: int) -> Image.Image:
    """Return one row of `interpolate` per pair of images, (B, C, H, W) in [-1, 1] each."""
    steps = steps_for(first.shape[-1])
    title = (
        "Spherical interpolation between the latents of two images, whose reconstructions are the first and the last "
        "of a row"
    )
    return page(interpolate(model, first, second, steps, batch_size), steps, title)


def traversal_picture(
    model: ModelMixin, images: torch.Tensor, batch_size: int, reach: float = 3.0, max_channels: int = 10
) -> Image.Image:
    """Return the first of images (B, C, H, W) in [-1, 1], decoded while one latent channel changes and the others are
    fixed, for the `max_channels` channels of the largest rate. If these are few, more images follow.

    A latent unit takes values from -reach to reach, standard deviations of the prior. A channel with several positions
    is shifted at all of them by -reach to reach of its standard deviations. Rates and standard deviations are those
    over `images`.
    """
    posterior = _posterior(model, images, batch_size)
    mean, unit = posterior.mean, posterior.mean[0, 0].numel() == 1
    rate = rate_per_unit(posterior).mean(0).sum((1, 2))
    std = (mean.var((0, 2, 3), correction=0) + posterior.var.mean((0, 2, 3))).sqrt()
    steps = steps_for(images.shape[-1])
    channels = rate.argsort(descending=True, stable=True)[: min(max_channels, steps)].tolist()
    count = min(len(images), max(1, min(steps, 8) // len(channels)))
    shown = mean[:: len(images) // count][:count]
    values = torch.linspace(-reach, reach, steps)
    rows, labels = [], []
    for channel in channels:
        for latents in shown:
            row = latents.repeat(steps, 1, 1, 1)
            row[:, channel] = values[:, None, None] if unit else row[:, channel] + values[:, None, None] * std[channel]
            rows.append(row)
            labels.append(f"{'unit' if unit else 'channel'} {channel}\n{nats(rate[channel].item())} nats")
    change = "unit set to the values above" if unit else "channel shifted by multiples of its standard deviation"
    left_out = f", for the {len(channels)} of {len(rate)} with the largest rate" if len(channels) < len(rate) else ""
    title = f"Latents of an image decoded with one {change} and the others kept{left_out}"
    columns = [f"{value:+.3g}" if abs(value) > 1e-3 else "0" for value in values.tolist()]
    return page(_decode(model, torch.cat(rows), batch_size), steps, title, labels, columns)


def manifold_picture(model: ModelMixin, batch_size: int, side: int = 20) -> Image.Image:
    """Return 2-D latents decoded on a grid, evenly spaced in the prior's probability: Kingma & Welling 2014,
    figure 4.
    """
    quantiles = torch.special.ndtri(torch.linspace(0.02, 0.98, side, dtype=torch.float64)).float()
    rows, columns = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    latents = torch.stack([columns, rows], -1).view(-1, 2, 1, 1)
    decoded = _decode(model, latents, batch_size)
    low, high = quantiles[0], quantiles[-1]
    title = f"Decoded latents, both units from {low:.2f} to {high:.2f} in equal steps of the prior's probability"
    return page(decoded, side, title)


@torch.no_grad()
def latent_picture(model: ModelMixin, image_set: ImageSet, batch_size: int, max_images: int | None) -> Image.Image:
    """Return a chart of the posterior means of the first `max_images` images, coloured by label: 2-D latents directly,
    others by their first two principal components.
    """
    indices, batches = [], []
    for _, chosen, images in image_batches(image_set, batch_size, max_images, model.device):
        indices += chosen
        batches.append(_posterior(model, images, batch_size).mode().flatten(1))
    means = torch.cat(batches).numpy()
    units = means.shape[1]
    if units == 2:
        points, title, axis = means, "Posterior means", "latent unit"
    else:
        from sklearn.decomposition import PCA

        pca = PCA(2, svd_solver="randomized", random_state=0).fit(means)
        points, axis = pca.transform(means), "principal component"
        explained = 100 * pca.explained_variance_ratio_.sum()
        title = f"Posterior means, PCA of {units} units to 2 ({explained:.0f} % of variance)"
    figure = new_figure(7, 6)
    axes = figure.add_subplot()
    size = max(6, min(30, 6000 // len(points)))
    if image_set.labels is None:
        axes.scatter(*points.T, s=size, alpha=0.6, color="tab:blue", linewidths=0)
    else:
        from matplotlib import colormaps

        labels = image_set.labels[indices].numpy()
        palette: Any = colormaps["tab10" if labels.max() < 10 else "tab20"]
        colours = palette.colors
        for label in sorted(set(labels.tolist())):
            chosen, colour = points[labels == label], colours[label % len(colours)]
            axes.scatter(*chosen.T, s=size, alpha=0.6, color=colour, label=str(label), linewidths=0)
        if labels.max() < 20:
            axes.legend(title="label", markerscale=2.5, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    first = 0 if units == 2 else 1  # channels count from 0 as in tensors, components from 1
    axes.set_xlabel(f"{axis} {first}")
    axes.set_ylabel(f"{axis} {first + 1}")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(alpha=0.25)
    return render(figure)


def comparison_picture(
    images: torch.Tensor,
    reconstructions_a: torch.Tensor,
    reconstructions_b: torch.Tensor,
    labels: tuple[str, str],
    captions: Sequence[str],
) -> Image.Image:
    """Return one row per image, in the given order: original, then reconstruction and difference of each of two models;
    all (B, C, H, W) in [-1, 1], with a caption per row and a label per model.

    Differences are as in `reconstruction_picture`. Large images are cropped to the part where the reconstructions
    differ most.
    """
    side = PAGE_WIDTH // 5 // 8 * 8
    height, width = images.shape[-2:]
    parts = [part.float().cpu().clamp(-1, 1) for part in (images, reconstructions_a, reconstructions_b)]
    title = f"{labels[0]} and {labels[1]}, each with {AMPLIFICATION} times its difference: {DIFFERENCE}"
    if max(height, width) > side:
        size = min(height, side), min(width, side)
        parts = [torch.stack(windows) for windows in zip(*map(partial(_window, size), *parts), strict=True)]
        title += f"; of {height}x{width} pixels those {size[0]}x{size[1]} where the two differ most"
    original, a, b = parts
    cells = torch.stack([original, a, AMPLIFICATION * (a - original), b, AMPLIFICATION * (b - original)], 1)
    headings = ["original", labels[0], "difference", labels[1], "difference"]
    return page(cells.flatten(0, 1), 5, title, captions, headings, min(side, 128))


def _window(size: tuple[int, int], image: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the part of three images (C, H, W), of the given (height, width), in which a and b differ most."""
    sums = torch.nn.functional.avg_pool2d((a - b).abs().mean(0)[None, None], size, stride=8)[0, 0]
    top, left = (8 * corner for corner in divmod(sums.argmax().item(), sums.shape[1]))
    return tuple(part[:, top : top + size[0], left : left + size[1]] for part in (image, a, b))


def prompt_picture(images: torch.Tensor, prompts: Sequence[str], guidance: Sequence[float], how: str) -> Image.Image:
    """Return pictures (guidance scales, prompts, seeds, C, H, W) in [-1, 1] of a text-to-image model as a page: one row
    per prompt, one column per seed, guidance scales side by side. `how` describes in the title how they were generated.
    """
    labels = ["\n".join(textwrap.wrap(prompt, 28, max_lines=3, placeholder=" ...")) for prompt in prompts]
    headings = [f"guidance {scale:g}" + " (none)" * (scale == 1) for scale in guidance]
    scale = max(1, 64 // max(images.shape[-2:]))
    blocks = [to_pil(block.flatten(0, 1), images.shape[2], scale) for block in images]
    gap = 16
    picture = Image.new("RGB", (sum(block.width + gap for block in blocks) - gap, blocks[0].height), "white")
    for index, block in enumerate(blocks):
        picture.paste(block, (index * (block.width + gap), 0))
    return titled(picture, f"One row a prompt, one column a seed; {how}", labels, headings)


def draw_all(
    model: ModelMixin,
    image_set: ImageSet,
    metrics: Path | None,
    batch_size: int,
    max_images: int | None,
    seed: int,
    rate_per_channel: Sequence[float] | None = None,
    rate_per_position: Sequence[Sequence[float]] | None = None,
    unused: Collection[int] = (),
) -> dict[str, Image.Image]:
    """Return all possible pictures by name: of `model` in eval mode, at most `max_images` images, the metrics.jsonl of
    its run, and measured rates with the `unused` channels.
    """
    _, _, images = next(image_batches(image_set, 64, None, model.device))
    columns, rows = columns_for(images.shape[-1]), rows_for(images.shape[-2])
    images = images[: max(8, rows * columns)]
    latent_shape = tuple(_posterior(model, images[:1], 1).mean.shape[1:])
    pictures = {
        "reconstructions": reconstruction_picture(model, images[: rows * columns], batch_size),
        "samples": sample_picture(model, latent_shape, batch_size, seed, rows * columns),
        "traversals": traversal_picture(model, images, batch_size),
    }
    pairs = images[: min(len(images) // 2 * 2, 2 * (steps_for(images.shape[-1]) - 3))]
    if len(pairs):
        pictures["interpolations"] = interpolation_picture(model, pairs[0::2], pairs[1::2], batch_size)
    if latent_shape == (2, 1, 1):
        pictures["manifold"] = manifold_picture(model, batch_size)
    # some images of a set read on demand may be unreadable
    if min(len(images), len(image_set), max_images or len(image_set)) > 2 and math.prod(latent_shape) > 1:
        pictures["latents"] = latent_picture(model, image_set, batch_size, max_images)
    if rate_per_channel is not None and rate_per_position is not None:
        pictures["rates"] = rate_picture(rate_per_channel, rate_per_position, unused)
    if metrics is not None:
        pictures["loss"] = loss_picture(metrics)
        pictures["rate_distortion"] = rate_distortion_picture(metrics)
    return pictures
