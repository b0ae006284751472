"""Model and images to pictures: PIL images, for files, trackers and reports alike."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from .data import SIGNATURE, ImageSet, image_batches
from .images import shown_channels, to_pil
from .losses.objective import rate_per_unit
from .models import decode, encode

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# matplotlib and scikit-learn are imported where something is drawn: `--help` and `import *` need not wait for them
DPI = 120
PAGE_WIDTH = 1056  # pixels of images side by side: 16 of 64 with lines between them
AMPLIFICATION = 4  # of differences
DIFFERENCE = "grey where none, brighter where too bright"
TSNE_POINTS = 2000
VERDICT_COLOURS = {
    "healthy": "tab:green",
    "partly collapsed": "tab:orange",
    "collapsed": "tab:red",
    "poor reconstruction": "tab:brown",
    "exploding": "tab:purple",
}


CAPTIONS = {
    "reconstructions": (
        "Reconstructions",
        "Images, under each its reconstruction from the mode of the posterior, and under that the amplified "
        "difference: grey where there is none, bright where the reconstruction is too bright, dark where too dark.",
    ),
    "samples": (
        "Samples from the prior",
        "Latents drawn from N(0, I) and decoded. With many positions, whole images come from a diffusion model over "
        "the latents, not from this.",
    ),
    "traversals": (
        "Traversals",
        "One channel of an image's latents changes from left to right, the others are kept. A row in which nothing "
        "changes is of a channel that the decoder ignores.",
    ),
    "interpolations": (
        "Interpolations",
        "From left to right on the sphere between the latents of two images.",
    ),
    "manifold": ("Manifold", "The decoded plane of the two latent units, evenly spaced in the prior's probability."),
    "latents": ("Latents", "Posterior means of images in a plane, coloured by label where there are labels."),
    "rates": (
        "Rates",
        "Rate of each channel and each position of the latents, in nats per image. Red channels are unused: taking "
        "them from another image hardly changes the reconstruction.",
    ),
    "loss": ("Training", "Loss, its two terms and the learning rate over the images seen."),
    "rate_distortion": (
        "Rate and distortion",
        "The way of the run, coloured by images seen. Points on a dashed line have the same elbo; further down and "
        "left is better.",
    ),
}
"""Heading and caption of each picture of `draw_all`."""


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # inches
    FigureCanvasAgg(figure)
    return figure


def _render(figure: Figure) -> Image.Image:
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def _titled(
    picture: Image.Image, title: str, row_labels: Sequence[str] = (), column_labels: Sequence[str] = ()
) -> Image.Image:
    """`picture`, pixel for pixel, under a title, beside one label per row and under one per column."""
    font, small, margin = ImageFont.load_default(18), ImageFont.load_default(14), 12
    lines = [line for label in row_labels for line in label.splitlines()]
    left = margin + max((round(small.getlength(line)) + 8 for line in lines), default=0)
    letters = 0.95 * picture.width * len(title) / font.getlength(title)
    title = "\n".join(textwrap.wrap(title, max(36, int(letters))))
    _, _, title_width, title_height = ImageDraw.Draw(picture).multiline_textbbox((0, 0), title, font)
    width = left + max(picture.width, round(title_width)) + margin
    top = 2 * margin + round(title_height) + (20 if column_labels else 0)
    page = Image.new("RGB", (width, top + picture.height + margin), "white")
    draw = ImageDraw.Draw(page)
    draw.multiline_text((left, margin), title, "black", font)
    for row, label in enumerate(row_labels):
        place = (left - 8, top + (row + 0.5) * picture.height / len(row_labels))
        draw.multiline_text(place, label, "black", small, anchor="rm", align="right")
    for column, label in enumerate(column_labels):
        room = picture.width / len(column_labels)
        while len(label) > 4 and small.getlength(label) > room:  # of a path, the end is what tells
            label = "..." + label.removeprefix("...")[1:]
        place = (left + (column + 0.5) * room, top - 4)
        draw.text(place, label, "black", small, anchor="ms")
    page.paste(picture, (left, top))
    return page


def _page(
    images: torch.Tensor,
    columns: int,
    title: str,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    side: int = 64,
) -> Image.Image:
    """Images (B, C, H, W) in [-1, 1] in a titled grid; small ones are enlarged to `side` pixels, and what is wider than
    a page all together is made smaller, which the title says.
    """
    height, width = images.shape[-2:]
    smaller = math.ceil(columns * width / PAGE_WIDTH)
    if smaller > 1:
        images = torch.nn.functional.avg_pool2d(images.float(), smaller)
    notes = [shown_channels(images.shape[1]), f"each side at 1/{smaller} of its size" if smaller > 1 else ""]
    title = "; ".join([title, *filter(None, notes)])
    return _titled(to_pil(images, columns, max(1, side // max(height, width))), title, row_labels, column_labels)


def _nats(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _columns(width: int) -> int:
    """How many images of `width` pixels go side by side on a page."""
    return max(1, min(16, PAGE_WIDTH // max(width, 64)))


def _rows(height: int) -> int:
    """How many times original, reconstruction and difference, of `height` pixels each, go below each other."""
    return max(2, min(4, 2400 // (3 * height)))


def _steps(width: int) -> int:
    """How many images show a way through the latents: an odd number, so that one is in the middle."""
    return max(5, min(11, (_columns(width) - 1) // 2 * 2 + 1))


@torch.no_grad()
def _posterior(model: ModelMixin, images: torch.Tensor, batch_size: int) -> DiagonalGaussianDistribution:
    moments = [encode(model, part.to(model.device)).parameters.cpu() for part in images.split(batch_size)]
    return DiagonalGaussianDistribution(torch.cat(moments))


@torch.no_grad()
def _decode(model: ModelMixin, latents: torch.Tensor, batch_size: int) -> torch.Tensor:
    decoded = [decode(model, part.to(model.device)) for part in latents.split(batch_size)]
    return torch.cat([part.clamp(-1, 1).cpu() for part in decoded])


def reconstruction_picture(model: ModelMixin, images: torch.Tensor, batch_size: int) -> Image.Image:
    """Rows of originals, of their reconstructions and of the differences, of images (B, C, H, W) in [-1, 1].

    Differences are signed and amplified: grey where there is none, bright where the reconstruction is too bright.
    """
    columns = min(_columns(images.shape[-1]), len(images))
    images = images[: len(images) // columns * columns]
    reconstructions = _decode(model, _posterior(model, images, batch_size).mode(), batch_size)
    images = images.float().cpu()
    rows = [images, reconstructions, AMPLIFICATION * (reconstructions - images)]
    triples = zip(*(part.split(columns) for part in rows), strict=True)
    labels = ["original", "reconstruction", f"difference x{AMPLIFICATION}"] * (len(images) // columns)
    title = f"Images, their reconstructions, and {AMPLIFICATION} times the difference: {DIFFERENCE}"
    return _page(torch.cat([torch.cat(triple) for triple in triples]), columns, title, labels)


def save_signed(picture: Image.Image, path: Path) -> None:
    """Save a picture as a PNG file that is not taken for an image of a set."""
    signature = PngInfo()
    signature.add_text("Software", SIGNATURE)
    picture.save(path, "PNG", pnginfo=signature)


def contact_sheet(images: torch.Tensor, name: str) -> Image.Image:
    """The images (B, C, H, W) in [-1, 1] of a set with this name."""
    return _page(images, min(len(images), _columns(images.shape[-1])), f"{name}: as a training sees it")


def sample_picture(
    model: ModelMixin, latent_shape: tuple[int, ...], batch_size: int, seed: int, count: int
) -> Image.Image:
    """Decoded draws from the prior N(0, I) over latents of `latent_shape`, (channels, height, width)."""
    latents = torch.randn(count, *latent_shape, generator=torch.Generator().manual_seed(seed))
    samples = _decode(model, latents, batch_size)
    title = "Samples from the prior N(0, I)"
    if latent_shape[1] * latent_shape[2] > 1:
        title += (
            f", drawn for each of the {latent_shape[1]}x{latent_shape[2]} positions by itself: parts that do not know "
            "of each other. A diffusion model over the latents is what samples whole images"
        )
    return _page(samples, min(count, _columns(samples.shape[-1])), title)


def slerp(first: torch.Tensor, second: torch.Tensor, steps: int) -> torch.Tensor:
    """Latents (B, steps, ...) from `first` to `second`, (B, ...) each, on the great circle between their directions in
    equal angles, while their norms change in equal steps: Shoemake 1985, the formula in section 3.3.

    The whole of an image's latents is one vector. Where no great circle is singled out, between parallel and between
    opposite vectors and from the origin, the way is straight.
    """
    ends = torch.stack([first, second]).double().flatten(2)
    norms = ends.norm(dim=-1, keepdim=True)
    (start, end), weights = ends, torch.linspace(0, 1, steps, dtype=torch.float64)[:, None]
    directions = ends / norms.clamp_min(1e-300)
    # accurate for small angles, where the arccosine of the product is not
    difference, total = directions[1] - directions[0], directions[1] + directions[0]
    angle = 2 * torch.atan2(difference.norm(dim=-1), total.norm(dim=-1))[:, None, None]
    from_first, to_second = torch.sin((1 - weights) * angle), torch.sin(weights * angle)
    sine = torch.sin(angle)
    turned = (from_first * directions[0][:, None] + to_second * directions[1][:, None]) / sine
    turned = turned * ((1 - weights) * norms[0][:, None] + weights * norms[1][:, None])
    straight = (1 - weights) * start[:, None] + weights * end[:, None]
    singled_out = (sine > 1e-6) & (norms > 0).all(0)[:, None]
    return torch.where(singled_out, turned, straight).view(len(first), steps, *first.shape[1:]).to(first.dtype)


def interpolation_picture(model: ModelMixin, first: torch.Tensor, second: torch.Tensor, batch_size: int) -> Image.Image:
    """One row per pair of images, (B, C, H, W) in [-1, 1] each: from the reconstruction of the first, through the
    decoded latents on the great circle between the posterior means, to that of the second.

    The circle is around `config.shift_factor`, the mean of the latents, where there is one: the way is that between
    scaled latents, since a common factor changes neither angles nor ratios of norms.
    """
    steps = _steps(first.shape[-1])
    ends = _posterior(model, torch.cat([first, second]), batch_size).mode()
    centre = model.config.get("shift_factor") or 0.0
    latents = slerp(*(ends - centre).chunk(2), steps) + centre
    title = (
        "Spherical interpolation between the latents of two images, whose reconstructions are the first and the last "
        "of a row"
    )
    return _page(_decode(model, latents.flatten(0, 1), batch_size), steps, title)


def traversal_picture(
    model: ModelMixin, images: torch.Tensor, batch_size: int, reach: float = 3.0, max_channels: int = 10
) -> Image.Image:
    """The first of images (B, C, H, W) in [-1, 1], decoded while one channel of its latents changes and the others
    stay, for the `max_channels` channels of the largest rate; when these are few, some more of the images.

    A latent unit takes the values from -reach to reach, standard deviations of the prior. A channel with several
    positions is shifted at all of them, by -reach to reach of its own standard deviations. Rates and standard
    deviations are those over `images`.
    """
    posterior = _posterior(model, images, batch_size)
    mean, unit = posterior.mean, posterior.mean[0, 0].numel() == 1
    rate = rate_per_unit(posterior).mean(0).sum((1, 2))
    std = (mean.var((0, 2, 3), correction=0) + posterior.var.mean((0, 2, 3))).sqrt()
    steps = _steps(images.shape[-1])
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
            labels.append(f"{'unit' if unit else 'channel'} {channel}\n{_nats(rate[channel])} nats")
    change = "unit set to the values above" if unit else "channel shifted by so many of its standard deviations"
    left_out = f", for the {len(channels)} of {len(rate)} with the largest rate" if len(channels) < len(rate) else ""
    title = f"Latents of an image decoded with one {change} and the others kept{left_out}"
    columns = [f"{value:+.3g}" if abs(value) > 1e-3 else "0" for value in values.tolist()]
    return _page(_decode(model, torch.cat(rows), batch_size), steps, title, labels, columns)


def manifold_picture(model: ModelMixin, batch_size: int, side: int = 20) -> Image.Image:
    """2-D latents decoded on a grid, evenly spaced in the prior's probability: Kingma & Welling 2014, figure 4."""
    quantiles = torch.special.ndtri(torch.linspace(0.02, 0.98, side, dtype=torch.float64)).float()
    rows, columns = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    latents = torch.stack([columns, rows], -1).view(-1, 2, 1, 1)
    decoded = _decode(model, latents, batch_size)
    low, high = quantiles[0], quantiles[-1]
    title = f"Decoded latents, both units from {low:.2f} to {high:.2f} in equal steps of the prior's probability"
    return _page(decoded, side, title)


@torch.no_grad()
def latent_picture(
    model: ModelMixin,
    image_set: ImageSet,
    batch_size: int,
    max_images: int | None,
    projection: Literal["pca", "tsne"] = "pca",
    tsne_points: int = TSNE_POINTS,
) -> Image.Image:
    """Posterior means of the first `max_images` images, coloured by label: 2-D latents as they are, others by their
    first two principal components, or by t-SNE (van der Maaten & Hinton 2008) of at most `tsne_points` images.
    """
    if projection == "tsne":
        max_images = min(max_images or tsne_points, tsne_points)
    indices, batches = [], []
    for _, chosen, images in image_batches(image_set, batch_size, max_images, model.device):
        indices += chosen
        batches.append(_posterior(model, images, batch_size).mode().flatten(1))
    means = torch.cat(batches).numpy()
    units = means.shape[1]
    if units == 2:
        points, title, axis = means, "Posterior means", "latent unit"
    elif projection == "tsne":
        from sklearn.manifold import TSNE

        perplexity = min(30, (len(means) - 1) / 3)
        points = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(means)
        title = f"Posterior means of {len(means):,} images, t-SNE of {units} units to 2"
        axis = "t-SNE"
    else:
        from sklearn.decomposition import PCA

        pca = PCA(2, svd_solver="randomized", random_state=0).fit(means)
        points, axis = pca.transform(means), "principal component"
        explained = 100 * pca.explained_variance_ratio_.sum()
        title = f"Posterior means, PCA of {units} units to 2 ({explained:.0f} % of variance)"
    figure = _figure(7, 6)
    axes = figure.add_subplot()
    size = max(6, min(30, 6000 // len(points)))
    if image_set.labels is None:
        axes.scatter(*points.T, s=size, alpha=0.6, color="tab:blue", linewidths=0)
    else:
        from matplotlib import colormaps

        labels = image_set.labels[indices].numpy()
        colours = colormaps["tab10" if labels.max() < 10 else "tab20"].colors
        for label in sorted(set(labels.tolist())):
            chosen, colour = points[labels == label], colours[label % len(colours)]
            axes.scatter(*chosen.T, s=size, alpha=0.6, color=colour, label=str(label), linewidths=0)
        if labels.max() < 20:
            axes.legend(title="label", markerscale=2.5, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    first = 0 if units == 2 else 1  # channels are counted as in tensors, components as people do
    axes.set_xlabel(f"{axis} {first}")
    axes.set_ylabel(f"{axis} {first + 1}")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(alpha=0.25)
    return _render(figure)


def rate_picture(
    rate_per_channel: Sequence[float], rate_per_position: Sequence[Sequence[float]], unused: Collection[int] = ()
) -> Image.Image:
    """The rate per channel of the latents, the largest first when they are many, beside that per position, where there
    are several; nats per image.
    """
    from matplotlib.ticker import EngFormatter, ScalarFormatter

    rates, positions = np.asarray(rate_per_channel, dtype=float), np.asarray(rate_per_position, dtype=float)
    many, several_positions = len(rates) > 10, positions.size > 1
    order = np.argsort(-rates, kind="stable") if many else np.arange(len(rates))
    figure = _figure(10 if several_positions else 7, 4)
    left, *right = figure.subplots(1, 2 if several_positions else 1, squeeze=False)[0]
    kind = "channel" if several_positions else "unit"
    red = [channel in unused for channel in order.tolist()]
    bars = left.bar(range(len(rates)), rates[order], color=["tab:red" if marked else "tab:blue" for marked in red])
    if not many:
        left.bar_label(bars, [_nats(rate) for rate in rates.tolist()], fontsize=8, padding=2)
        left.margins(y=0.1)
    left.set_ylim(bottom=min(0, rates.min()))
    if len(rates) <= 32:
        left.set_xticks(range(len(rates)), [str(channel) for channel in order.tolist()], fontsize=8)
        for tick, marked in zip(left.get_xticklabels(), red, strict=True):  # whose bars may be too low to be seen
            tick.set_color("tab:red" if marked else "black")
    left.set_xlabel(f"latent {kind}" + (", the largest rate first" if many else ""), fontsize=9)
    left.set_title(
        f"rate per {kind}, nats per image\n{_nats(rates.sum())} in all; unused (red): {sum(red)} of {len(rates)}",
        fontsize=10,
        loc="left",
    )
    left.tick_params(axis="y", labelsize=8)
    left.yaxis.set_major_formatter(EngFormatter(sep="") if rates.max() >= 1e4 else ScalarFormatter())
    left.grid(axis="y", alpha=0.25)
    left.set_axisbelow(True)
    for axes in right:
        shown = axes.imshow(positions, cmap="viridis", interpolation="nearest")
        figure.colorbar(shown, ax=axes, shrink=0.85).ax.tick_params(labelsize=8)
        height, width = positions.shape
        axes.set_title(f"rate per position ({height}x{width}), nats per image", fontsize=10, loc="left")
        axes.set_xticks([])
        axes.set_yticks([])
    return _render(figure)


def _records(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


PANELS = {
    "loss": "loss, nats per image",
    "distortion": "distortion, nats per image",
    "rate": "rate, nats per image",
    "perceptual": "LPIPS",
    "generator": "generator's loss",
    "discriminator": "discriminator's loss",
    "adversarial_weight": "weight of the generator's loss",
    "kl_weight": "kl_weight",
    "scale": "scale of the likelihood",
    "learning_rate": "learning rate",
}


def loss_picture(metrics: Path, panels: dict[str, str] = PANELS) -> Image.Image:
    """Values of a run's metrics.jsonl over images seen, each with its title: the `panels` that were logged."""
    training = [record for record in _records(metrics) if record["kind"] == "train"]
    logged = {name for record in training for name, value in record.items() if value is not None}
    return runs_picture({"training": metrics}, {name: title for name, title in panels.items() if name in logged})


def runs_picture(metrics: dict[str, Path], panels: dict[str, str]) -> Image.Image:
    """Values of the metrics.jsonl of runs, given by name, over images seen, a panel with its title for each: lines are
    of training, dots of held-out images.
    """
    from matplotlib.ticker import EngFormatter

    runs = {name: _records(path) for name, path in metrics.items()}
    rows = max(1, math.ceil(len(panels) / 2))
    figure = _figure(10, 3 * rows)
    grid = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.axis("off")
    for axes, (key, title) in zip(grid, panels.items(), strict=False):
        shown = []
        for number, (name, records) in enumerate(runs.items()):
            for kind in ("train", "evaluation"):
                chosen = [record for record in records if record["kind"] == kind and record.get(key) is not None]
                seen, values = ([record[which] for record in chosen] for which in ("images_seen", key))
                alone = len(runs) == 1 and kind == "evaluation"
                axes.plot(
                    seen,
                    values,
                    color=f"C{number + alone}",
                    linewidth=1.2,
                    linestyle="-" if kind == "train" or alone else "",
                    marker="o" if values and (kind == "evaluation" or len(values) == 1) else None,
                    label="held-out" if alone and values else name if kind == "train" else None,
                )
                shown += values[len(values) // 10 :] if kind == "train" else values
        if key != "learning_rate" and shown and max(shown) > min(shown):
            if key == "adversarial_weight" and max(shown) > 0:  # moves by factors
                axes.set_yscale("log")
            else:
                # the first steps of training are far off and would flatten all that follows
                margin = 0.1 * (max(shown) - min(shown))
                axes.set_ylim(min(shown) - margin, max(shown) + margin)
        axes.set_xlabel("images seen", fontsize=8)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.set_title(title, fontsize=10, loc="left")
        if key == "learning_rate":
            axes.set_ylim(bottom=0)
        elif len(runs) == 1:
            axes.legend(fontsize=8)
    if len(runs) > 1:  # above the panels, where it hides nothing
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, fontsize=8)
    return _render(figure)


def rate_distortion_picture(metrics: Path) -> Image.Image:
    """The way of a run through the plane of rate and distortion, coloured by images seen, from its metrics.jsonl. All
    points of a dashed line have the same elbo.
    """
    from matplotlib.ticker import EngFormatter

    figure = _figure(7.5, 5)
    axes = figure.add_subplot()
    records = [record for record in _records(metrics) if record.get("rate") is not None]
    train, heldout = ([r for r in records if r["kind"] == kind] for kind in ("train", "evaluation"))
    scale = {"vmin": 0, "vmax": max((record["images_seen"] for record in train + heldout), default=1)}
    left_out = len(train) // 10
    points = None
    for chosen, label in ((train, "training"), (heldout, "held-out")):
        if not chosen:
            continue
        seen, rates, distortions = ([record[key] for record in chosen] for key in ("images_seen", "rate", "distortion"))
        if label == "training":
            axes.plot(rates, distortions, color="0.75", linewidth=1, zorder=1)
            style = {"s": 22, "linewidths": 0, "zorder": 2}
        else:
            style = {"s": 90, "marker": "D", "edgecolors": "black", "linewidths": 1.2, "zorder": 3}
        points = axes.scatter(rates, distortions, c=seen, cmap="viridis", label=label, **style, **scale)
    shown = train[left_out:] + heldout
    if shown:
        for name, set_limits in (("rate", axes.set_xlim), ("distortion", axes.set_ylim)):
            # as in the loss curves, the first steps would flatten all that follows
            values = [record[name] for record in shown]
            margin = 0.08 * (max(values) - min(values)) or 0.05 * max(abs(values[0]), 1)
            set_limits(min(values) - margin, max(values) + margin)
        _elbo_lines(axes)
        bar = figure.colorbar(points, ax=axes, format=EngFormatter(sep=""))
        bar.set_label("images seen", fontsize=9)
        bar.ax.tick_params(labelsize=8)
        axes.legend(fontsize=8)
    axes.set_xlabel("rate, nats per image", fontsize=9)
    axes.set_ylabel("distortion, nats per image", fontsize=9)
    axes.set_title("Rate and distortion during training; dashed: the same elbo", fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    return _render(figure)


def _elbo_lines(axes) -> None:
    """Dashed lines of the same rate + distortion through the part of the plane that is shown."""
    from matplotlib.ticker import MaxNLocator

    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for total in MaxNLocator(9).tick_values(left + bottom, right + top):
        axes.plot([left, right], [total - left, total - right], "--", color="0.85", linewidth=0.8, zorder=0)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)


def rate_distortion_curve(points: Sequence[tuple[str, float, float, str]]) -> Image.Image:
    """Several models in the plane of rate and distortion, nats per image, joined in the order of their rates: label,
    rate, distortion and verdict of each.
    """
    from matplotlib.ticker import EngFormatter

    points = sorted(points, key=lambda point: point[1])
    figure = _figure(7.5, 5)
    axes = figure.add_subplot()
    rates, distortions = ([point[place] for point in points] for place in (1, 2))
    axes.plot(rates, distortions, color="0.75", linewidth=1.2, zorder=1)
    for verdict in dict.fromkeys(point[3] for point in points):
        chosen = [point for point in points if point[3] == verdict]
        colour = VERDICT_COLOURS.get(verdict, "tab:blue")
        axes.scatter(*zip(*(point[1:3] for point in chosen), strict=True), s=55, color=colour, label=verdict, zorder=2)
    if max(rates) > 30 * max(min(rates), 1):
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(0.18, 0.12)
    axes.set_title("Rate and distortion of each model", fontsize=10, loc="left")
    axes.set_xlabel("rate, nats per image", fontsize=9)
    axes.set_ylabel("distortion, nats per image", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.draw_without_rendering()  # which sets the scales that the labels are placed by
    _label_points(axes, [(point[0], *point[1:3]) for point in points])
    return _render(figure)


def _label_points(axes, points: Sequence[tuple[str, float, float]]) -> None:
    """A text beside each point, at the first of some places where it covers no point and no text."""
    from matplotlib.transforms import Bbox

    places = axes.transData.transform([point[1:] for point in points])
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in places]
    for (label, *point), own in zip(points, list(taken), strict=True):
        for shift in [(9, 6, "left"), (-9, 6, "right"), (9, -14, "left"), (-9, -14, "right"), (9, 22, "left"),
                      (-9, -28, "right"), (9, 38, "left"), (-9, -44, "right")]:  # fmt: skip
            text = axes.annotate(
                label, point, shift[:2], textcoords="offset points", ha=shift[2], fontsize=8.5, annotation_clip=False
            )
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken if other is not own):
                break
            text.remove()
        else:
            axes.add_artist(text)
        taken.append(box)


def comparison_picture(
    images: torch.Tensor,
    reconstructions_a: torch.Tensor,
    reconstructions_b: torch.Tensor,
    labels: tuple[str, str],
    captions: Sequence[str],
) -> Image.Image:
    """Rows of one image each, in the order given: original, reconstruction and difference of the one model, those of
    the other; all (B, C, H, W) in [-1, 1], with a caption per row and a label per model.

    Differences as in `reconstruction_picture`. Of large images, that part is shown pixel by pixel in which the
    reconstructions differ most.
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
    return _page(cells.flatten(0, 1), 5, title, captions, headings, min(side, 128))


def _window(
    size: tuple[int, int], image: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """That part of three images (C, H, W), (height, width) in size, in which a and b differ most."""
    sums = torch.nn.functional.avg_pool2d((a - b).abs().mean(0)[None, None], size, stride=8)[0, 0]
    top, left = (8 * place for place in divmod(sums.argmax().item(), sums.shape[1]))
    return tuple(part[:, top : top + size[0], left : left + size[1]] for part in (image, a, b))


def prompt_picture(images: torch.Tensor, prompts: Sequence[str], guidance: Sequence[float], how: str) -> Image.Image:
    """Pictures (guidance scales, prompts, seeds, C, H, W) in [-1, 1] of a text-to-image model: one row a prompt, one
    column a seed, the guidance scales side by side; `how` they were made goes into the title.
    """
    labels = ["\n".join(textwrap.wrap(prompt, 28, max_lines=3, placeholder=" ...")) for prompt in prompts]
    headings = [f"guidance {scale:g}" + " (none)" * (scale == 1) for scale in guidance]
    scale = max(1, 64 // max(images.shape[-2:]))
    blocks = [to_pil(block.flatten(0, 1), images.shape[2], scale) for block in images]
    gap = 16
    picture = Image.new("RGB", (sum(block.width + gap for block in blocks) - gap, blocks[0].height), "white")
    for place, block in enumerate(blocks):
        picture.paste(block, (place * (block.width + gap), 0))
    return _titled(picture, f"One row a prompt, one column a seed; {how}", labels, headings)


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
    projection: Literal["pca", "tsne"] = "pca",
) -> dict[str, Image.Image]:
    """Every picture that there can be, by name: of `model` in eval mode, at most `max_images` images, the
    metrics.jsonl of its run, and measured rates with the channels that are `unused`.
    """
    _, _, images = next(image_batches(image_set, 64, None, model.device))
    columns, rows = _columns(images.shape[-1]), _rows(images.shape[-2])
    images = images[: max(8, rows * columns)]
    latent_shape = tuple(_posterior(model, images[:1], 1).mean.shape[1:])
    pictures = {
        "reconstructions": reconstruction_picture(model, images[: rows * columns], batch_size),
        "samples": sample_picture(model, latent_shape, batch_size, seed, rows * columns),
        "traversals": traversal_picture(model, images, batch_size),
    }
    pairs = images[: min(len(images) // 2 * 2, 2 * (_steps(images.shape[-1]) - 3))]
    if len(pairs):
        pictures["interpolations"] = interpolation_picture(model, pairs[0::2], pairs[1::2], batch_size)
    if latent_shape == (2, 1, 1):
        pictures["manifold"] = manifold_picture(model, batch_size)
    # some of a set that is read on demand may be unreadable
    if min(len(images), len(image_set), max_images or len(image_set)) > 2 and math.prod(latent_shape) > 1:
        pictures["latents"] = latent_picture(model, image_set, batch_size, max_images, projection)
    if rate_per_channel is not None and rate_per_position is not None:
        pictures["rates"] = rate_picture(rate_per_channel, rate_per_position, unused)
    if metrics is not None:
        pictures["loss"] = loss_picture(metrics)
        pictures["rate_distortion"] = rate_distortion_picture(metrics)
    return pictures
