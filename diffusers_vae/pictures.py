"""Model and images to pictures: PIL images, for files, trackers and reports alike."""

from __future__ import annotations

import io
import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from PIL import Image, ImageDraw, ImageFont
from sklearn.decomposition import PCA

from .data import ImageSet, image_batches
from .images import to_pil
from .models import MLPVAE, VAE

DPI = 120


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _render(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.12)
    return Image.open(buffer).convert("RGB")


def _titled(picture: Image.Image, title: str, row_labels: Sequence[str] = ()) -> Image.Image:
    """`picture`, pixel for pixel, under a title and beside one label per row."""
    font, small, margin = ImageFont.load_default(18), ImageFont.load_default(13), 12
    left = margin + max((round(small.getlength(label)) + 8 for label in row_labels), default=0)
    title = "\n".join(textwrap.wrap(title, max(20, picture.width // 9)))
    _, _, title_width, title_height = ImageDraw.Draw(picture).multiline_textbbox((0, 0), title, font)
    width = left + max(picture.width, round(title_width)) + margin
    top = 2 * margin + round(title_height)
    page = Image.new("RGB", (width, top + picture.height + margin), "white")
    draw = ImageDraw.Draw(page)
    draw.multiline_text((left, margin), title, "black", font)
    for row, label in enumerate(row_labels):
        place = (left - 8, top + (row + 0.5) * picture.height / len(row_labels))
        draw.text(place, label, "black", small, anchor="rm")
    page.paste(picture, (left, top))
    return page


def _grid(images: torch.Tensor, columns: int) -> Image.Image:
    """Small images enlarged to 64 pixels."""
    return to_pil(images, columns, max(1, 64 // images.shape[-1]))


def _columns(width: int) -> int:
    """How many images of `width` pixels go side by side on a screen."""
    return max(2, min(16, 1024 // width))


@torch.no_grad()
def _decode(model: VAE | MLPVAE, latents: torch.Tensor, batch_size: int) -> torch.Tensor:
    return torch.cat([model.decode(part.to(model.device)).sample.cpu() for part in latents.split(batch_size)])


@torch.no_grad()
def reconstruction_picture(model: VAE | MLPVAE, images: torch.Tensor, batch_size: int) -> Image.Image:
    """Rows of originals, each over the row of its reconstructions, of images (B, C, H, W) in [-1, 1]."""
    columns = min(_columns(images.shape[-1]), len(images))
    images = images[: len(images) // columns * columns]
    latents = torch.cat([model.encode(part).latent_dist.mode() for part in images.split(batch_size)])
    reconstructions = _decode(model, latents, batch_size)
    pairs = zip(images.cpu().split(columns), reconstructions.split(columns), strict=True)
    stacked = torch.cat([torch.cat(pair) for pair in pairs])
    labels = ["original", "reconstruction"] * (len(images) // columns)
    return _titled(_grid(stacked, columns), "Held-out images over their reconstructions", labels)


def sample_picture(
    model: VAE | MLPVAE, latent_shape: tuple[int, ...], batch_size: int, seed: int, count: int
) -> Image.Image:
    """Decoded draws from the prior N(0, I) over latents of `latent_shape`, (channels, height, width)."""
    latents = torch.randn(count, *latent_shape, generator=torch.Generator().manual_seed(seed))
    samples = _decode(model, latents, batch_size)
    title = "Samples from the prior N(0, I)"
    if latent_shape[1] * latent_shape[2] > 1:
        title += (
            f", drawn for each of the {latent_shape[1]}x{latent_shape[2]} positions by itself: parts that do not know "
            "of each other. A diffusion model over the latents is what samples whole images."
        )
    return _titled(_grid(samples, _columns(samples.shape[-1])), title)


def manifold_picture(model: VAE | MLPVAE, batch_size: int, side: int = 20) -> Image.Image:
    """2-D latents decoded on a grid, evenly spaced in the prior's probability: Kingma & Welling 2014, figure 4."""
    quantiles = torch.special.ndtri(torch.linspace(0.02, 0.98, side, dtype=torch.float64)).float()
    rows, columns = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    latents = torch.stack([columns, rows], -1).view(-1, 2, 1, 1)
    decoded = _decode(model, latents, batch_size)
    low, high = quantiles[0], quantiles[-1]
    title = f"Decoded latents, both units from {low:.2f} to {high:.2f} in equal steps of the prior's probability"
    return _titled(_grid(decoded, side), title)


@torch.no_grad()
def latent_picture(model: VAE | MLPVAE, image_set: ImageSet, batch_size: int, max_images: int) -> Image.Image:
    """Posterior means of the first `max_images` images, coloured by label: 2-D latents as they are, others by their
    first two principal components.
    """
    indices, batches = [], []
    for _, chosen, images in image_batches(image_set, batch_size, max_images, model.device):
        indices += chosen
        batches.append(model.encode(images).latent_dist.mode().flatten(1).cpu())
    means = torch.cat(batches).numpy()
    if means.shape[1] == 2:
        points, title, axis = means, "Posterior means of held-out images", "latent unit"
    else:
        pca = PCA(2, svd_solver="randomized", random_state=0).fit(means)
        points, axis = pca.transform(means), "principal component"
        explained = 100 * pca.explained_variance_ratio_.sum()
        title = (
            f"Posterior means of held-out images, PCA of {means.shape[1]} units to 2 ({explained:.0f} % of variance)"
        )
    figure = _figure(7, 6)
    axes = figure.add_subplot()
    size = max(6, min(30, 6000 // len(points)))
    if image_set.labels is None:
        axes.scatter(*points.T, s=size, alpha=0.6, color="tab:blue", linewidths=0)
    else:
        labels = image_set.labels[indices].numpy()
        for label in sorted(set(labels.tolist())):
            chosen = points[labels == label]
            axes.scatter(*chosen.T, s=size, alpha=0.6, color=f"C{label % 10}", label=str(label), linewidths=0)
        if labels.max() < 20:
            axes.legend(title="label", markerscale=2.5, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_xlabel(f"{axis} 1")
    axes.set_ylabel(f"{axis} 2")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(alpha=0.25)
    return _render(figure)


def loss_picture(metrics: Path) -> Image.Image:
    """Loss, distortion, rate and learning rate over images seen, from a run's metrics.jsonl."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure = _figure(10, 6)
    for axes, name in zip(figure.subplots(2, 2).flat, ("loss", "distortion", "rate", "learning_rate"), strict=True):
        shown = []
        for kind, label in (("train", "training"), ("evaluation", "held-out")):
            chosen = [record for record in records if record["kind"] == kind and record.get(name) is not None]
            seen, values = ([record[key] for record in chosen] for key in ("images_seen", name))
            axes.plot(seen, values, linewidth=1.2, marker="o" if kind == "evaluation" else None, label=label)
            shown += values[len(values) // 10 :] if kind == "train" else values
        if name != "learning_rate" and shown and max(shown) > min(shown):
            # the first steps of training are far off and would flatten all that follows
            margin = 0.1 * (max(shown) - min(shown))
            axes.set_ylim(min(shown) - margin, max(shown) + margin)
        axes.set_xlabel("images seen", fontsize=8)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        if name == "learning_rate":
            axes.set_title("learning rate", fontsize=10, loc="left")
            axes.set_ylim(bottom=0)
        else:
            axes.set_title(f"{name}, nats per image", fontsize=10, loc="left")
            axes.legend(fontsize=8)
    return _render(figure)


def draw_all(
    model: VAE | MLPVAE, image_set: ImageSet, metrics: Path, batch_size: int, max_images: int, seed: int
) -> dict[str, Image.Image]:
    """Every picture of a run by name: of `model` in eval mode, at most `max_images` held-out images, metrics.jsonl."""
    _, _, images = next(image_batches(image_set, 64, None, model.device))
    images = images[: 4 * _columns(images.shape[-1])]
    with torch.no_grad():
        latent_shape = tuple(model.encode(images[:1]).latent_dist.mean.shape[1:])
    pictures = {
        "reconstructions": reconstruction_picture(model, images, batch_size),
        "samples": sample_picture(model, latent_shape, batch_size, seed, 4 * _columns(images.shape[-1])),
        "loss": loss_picture(metrics),
    }
    if min(len(image_set), max_images) > 2 and math.prod(latent_shape) > 1:
        pictures["latents"] = latent_picture(model, image_set, batch_size, max_images)
    if latent_shape == (2, 1, 1):
        pictures["manifold"] = manifold_picture(model, batch_size)
    return pictures
