"""Model and images to pictures: PIL images, for files, trackers and reports alike."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from PIL import Image
from sklearn.decomposition import PCA

from .data import ImageSet, image_batches
from .images import to_model_range, to_pil
from .models import MLPVAE, VAE

PAPER = "#ffffff"
INK = "#222222"


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=120, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _render(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.12)
    return Image.open(buffer).convert("RGB")


def _framed(picture: Image.Image, title: str, row_labels: list[str] | None = None) -> Image.Image:
    width = 8.0
    figure = _figure(width, width * picture.height / picture.width + 0.5)
    axes = figure.add_subplot()
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xticks([])
    rows = len(row_labels or [])
    axes.set_yticks([(row + 0.5) * picture.height / rows for row in range(rows)], row_labels or [], fontsize=7)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return _render(figure)


def _enlarge(images: torch.Tensor, target: int = 64) -> int:
    return max(1, target // images.shape[-1])


@torch.no_grad()
def reconstruction_picture(model: VAE | MLPVAE, images: torch.Tensor, columns: int = 16) -> Image.Image:
    """Rows of originals, each over the row of its reconstructions, of images (B, C, H, W) in [-1, 1]."""
    images = images[: max(columns, len(images) // columns * columns)]
    columns = min(columns, len(images))
    reconstructions = model.decode(model.encode(images).latent_dist.mode()).sample
    pairs = zip(images.split(columns), reconstructions.split(columns), strict=True)
    stacked = torch.cat([torch.cat(pair) for pair in pairs])
    labels = ["original", "reconstruction"] * (len(images) // columns)
    return _framed(to_pil(stacked, columns, _enlarge(images)), "Held-out images over their reconstructions", labels)


@torch.no_grad()
def sample_picture(
    model: VAE | MLPVAE, latent_shape: tuple[int, ...], seed: int, count: int = 64, columns: int = 16
) -> Image.Image:
    """Decoded draws from the prior N(0, I) over latents of `latent_shape`."""
    latents = torch.randn(count, *latent_shape, generator=torch.Generator().manual_seed(seed))
    samples = model.decode(latents.to(model.device)).sample
    title = "Samples from the prior N(0, I)"
    if latent_shape[1] * latent_shape[2] > 1:
        title += (
            f", each of {latent_shape[1]}x{latent_shape[2]} positions by itself: strokes, not whole images\n"
            "A diffusion model over the latents is what samples whole images"
        )
    return _framed(to_pil(samples, columns, _enlarge(samples)), title)


@torch.no_grad()
def manifold_picture(model: VAE | MLPVAE, side: int = 20) -> Image.Image:
    """2-D latents decoded on a grid, evenly spaced in the prior's probability: Kingma & Welling 2014, figure 4."""
    quantiles = torch.special.ndtri(torch.linspace(0.02, 0.98, side, dtype=torch.float64)).float()
    rows, columns = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    latents = torch.stack([columns, rows], -1).view(-1, 2, 1, 1)
    decoded = model.decode(latents.to(model.device)).sample
    low, high = quantiles[0], quantiles[-1]
    title = f"Decoded latents, both units from {low:.2f} to {high:.2f} in equal steps of the prior's probability"
    return _framed(to_pil(decoded, side), title)


@torch.no_grad()
def latent_picture(model: VAE | MLPVAE, images: ImageSet, batch_size: int, max_images: int = 5000) -> Image.Image:
    """Posterior means of the first `max_images` images, coloured by label: 2-D latents as they are, others by their
    first two principal components.
    """
    means = torch.cat(
        [
            model.encode(batch).latent_dist.mode().flatten(1).cpu()
            for _, batch in image_batches(images, batch_size, max_images, model.device)
        ]
    ).numpy()
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
    if images.labels is None:
        axes.scatter(*points.T, s=6, alpha=0.6, color="tab:blue", linewidths=0)
    else:
        labels = images.labels[: len(points)].numpy()
        for label in sorted(set(labels.tolist())):
            chosen = points[labels == label]
            axes.scatter(*chosen.T, s=6, alpha=0.6, color=f"C{label % 10}", label=str(label), linewidths=0)
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
        for kind, style in (("train", {"linewidth": 1}), ("evaluation", {"marker": "o", "linewidth": 1.5})):
            chosen = [record for record in records if record["kind"] == kind and name in record]
            if chosen:
                label = "training" if kind == "train" else "held-out"
                axes.plot([r["images_seen"] for r in chosen], [r[name] for r in chosen], label=label, **style)
        axes.set_title({"learning_rate": "learning rate"}.get(name, f"{name}, nats per image"), fontsize=10, loc="left")
        axes.set_xlabel("images seen", fontsize=8)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        if name == "learning_rate":
            axes.set_ylim(bottom=0)
        else:
            axes.legend(fontsize=8)
            values = [r[name] for r in records if name in r]
            if name != "distortion" and min(values) > 0 and max(values) > 20 * min(values):
                axes.set_yscale("log")
    return _render(figure)


def draw_all(
    model: VAE | MLPVAE, images: ImageSet, metrics: Path, batch_size: int, seed: int
) -> dict[str, Image.Image]:
    """Every picture of a run by name, of `model` in eval mode, the held-out `images` and metrics.jsonl."""
    count = min(64, len(images))
    first = to_model_range(images.__getitems__(range(count)).to(model.device))
    with torch.no_grad():
        latent_shape = tuple(model.encode(first[:1]).latent_dist.mean.shape[1:])
    pictures = {
        "reconstructions": reconstruction_picture(model, first),
        "samples": sample_picture(model, latent_shape, seed),
        "loss": loss_picture(metrics),
    }
    if len(images) > 2:
        pictures["latents"] = latent_picture(model, images, batch_size)
    if latent_shape == (2, 1, 1):
        pictures["manifold"] = manifold_picture(model)
    return pictures
