"""What the demo shows of an image and its latents, as HTML."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import torch

from ..images.grid import shown_channels, to_pil
from ..losses.objective import rate_per_channel
from ..models import MLPVAE
from ..models.stock import ModelMixin
from .explore import INTERPOLATED, WINDOW, Directions, Explored, Reconstruction
from .pictures import AMPLIFICATION, DIFFERENCE

REACH = 3.0  # standard deviations, of sliders and of what is black and white
MOST_CHANNELS = 32  # more are not shown as pictures
SMALL = 160  # pixels of a side up to which an image is enlarged pixel by pixel


def figure(image: torch.Tensor, title: str = "", *lines: str) -> str:
    """Return one image (C, H, W) in [-1, 1] with a caption."""
    file = io.BytesIO()
    to_pil(image[None], 1).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    kind = ' class="small"' if max(image.shape[-2:]) <= SMALL else ""
    text = "<br>".join(html.escape(line) for line in lines if line)
    caption = f"<figcaption><b>{html.escape(title)}</b>{text}</figcaption>" if title else ""
    return f'<figure><img{kind} alt="{html.escape(title)}" src="data:image/png;base64,{data}">{caption}</figure>'


def figures(cells: Sequence[str], kind: str = "") -> str:
    """Return figures side by side: large if `kind` is wide, small if it is tight."""
    return f'<div class="dv {kind}">{"".join(cells)}</div>'


def title(text: str) -> str:
    """Return a heading."""
    return f'<p class="dv-title">{html.escape(text)}</p>'


def note(text: str) -> str:
    """Return a sentence or two below pictures."""
    return f'<p class="dv-note">{html.escape(text)}</p>'


def reconstructions(models: Sequence[Explored], made: Sequence[Reconstruction]) -> str:
    """Return the original beside each model's reconstruction and the amplified difference."""
    largest = max((one.image[0] for one in made), key=torch.Tensor.numel)
    cells = [figure(largest, "Original", shown_channels(len(largest)))]
    for explored, one in zip(models, made, strict=True):
        difference = AMPLIFICATION * (one.reconstruction - one.image)
        parts = [
            figure(one.reconstruction[0], explored.name, f"PSNR {one.psnr:.2f} dB, {one.seconds:.2g} s", one.note),
            figure(difference[0], f"{AMPLIFICATION} times the difference"),
        ]
        if one.image[0].shape != largest.shape:
            parts.append(figure(one.image[0], "Original as this model sees it"))
        cells += parts if len(made) == 1 else [f"<div>{''.join(parts)}</div>"]
    device = models[0].model.device.type
    explanation = f"Difference: {DIFFERENCE}. Seconds: encoding and decoding the image once, {device}."
    return figures(cells, "wide") + note(explanation)


def latent_channels(models: Sequence[Explored], made: Sequence[Reconstruction]) -> str:
    """Return each model's latents: a picture for each channel or, of latents with one position, a bar for each unit."""
    parts: list[str] = []
    for explored, one in zip(models, made, strict=True):
        mean, rates = one.posterior.mean[0].float().cpu(), rate_per_channel(one.posterior)[0].cpu()
        shown = sorted(rates.argsort(descending=True, stable=True)[:MOST_CHANNELS].tolist())
        left_out = f" Shown are the {len(shown)} of {len(rates)} with the largest rate." * (len(shown) < len(rates))
        parts.append(title(f"{explored.name}: latents {'x'.join(map(str, mean.shape))}"))
        if mean[0].numel() == 1:
            parts.append(_bars(mean.flatten(), one.posterior.std.flatten().cpu(), rates, shown))
            how = f"Bars reach from mean - std to mean + std of the posterior, on a scale from -{REACH:g} to {REACH:g}."
        else:
            centred = mean - mean.mean((1, 2), keepdim=True)
            deviations = centred / (REACH * mean.std((1, 2), correction=0, keepdim=True)).clamp_min(1e-6)
            nats = [f"{rates[k].item():,.1f} nats" for k in shown]
            cells = [figure(deviations[k][None], f"Channel {k}", rate) for k, rate in zip(shown, nats, strict=True)]
            parts.append(figures(cells, "tight"))
            how = (
                "Means of the posterior: grey is a channel's mean over this image, black and white are "
                f"{REACH:g} standard deviations over this image away."
            )
        parts.append(note(f"{how} Nats: the rate of this image.{left_out}"))
    return "".join(parts)


def _bars(mean: torch.Tensor, std: torch.Tensor, rates: torch.Tensor, shown: Sequence[int]) -> str:
    rows: list[str] = []
    for unit in shown:
        ends = torch.stack([mean - std, mean + std])[:, unit]
        low, high = (50 + 50 * ends / REACH).clamp(0, 100).tolist()
        low, high = min(low, 98), max(high, 2)  # something of a bar shows even far outside
        bar = f'<i><s style="left: {low:.1f}%; width: {max(2, high - low):.1f}%"></s></i>'
        rows.append(f"<span>{unit}</span>{bar}<span>{rates[unit].item():,.2f} nats</span>")
    return f'<div class="dv-units">{"".join(rows)}</div>'


def slider_words(model: ModelMixin, found: Directions, index: int) -> tuple[str, str]:
    """Return the label of the slider of a direction, and what the direction is made of."""
    weights, unit = found.weights[index], "unit" if isinstance(model, MLPVAE) else "channel"
    most = [k for k in weights.abs().argsort(descending=True)[:3].tolist() if weights[k].abs() >= 0.1]
    parts = ", ".join(f"{weights[k].item():+.2f} of {unit} {k}" for k in most)
    return f"Direction {index + 1}: {100 * found.shares[index].item():.0f} % of the change", parts


def shifted(made: Reconstruction, image: torch.Tensor) -> str:
    """Return an image (1, C, H, W) decoded from shifted latents beside the reconstruction, and what the sliders do."""
    cells = [figure(made.reconstruction[0], "Reconstruction"), figure(image[0], "With the sliders")]
    positions = made.posterior.mean.shape[-2:]
    text = (
        "Each channel of this image's latents was shifted by one standard deviation and decoded; the sliders are the "
        "principal directions of these changes of the picture, in standard deviations."
    )
    if max(positions) > 1:
        text += " They change all positions alike."
    if max(positions) > WINDOW:
        text += f" The directions are those of the central {WINDOW}x{WINDOW} positions."
    return figures(cells, "wide") + note(text)


def interpolations(models: Sequence[Explored], ways: Sequence[torch.Tensor]) -> str:
    """Return a row of pictures for each model, of the images (steps, C, H, W) on its way."""
    parts: list[str] = []
    for explored, images in zip(models, ways, strict=True):
        cells = [figure(image, f"{100 * step / (len(images) - 1):.0f} %") for step, image in enumerate(images)]
        parts += [title(explored.name), figures(cells)]
    text = (
        "Decoded latents on the great circle between those of the two images, whose reconstructions are at 0 % and "
        f"100 %. Larger images are scaled to {INTERPOLATED} pixels."
    )
    return "".join(parts) + note(text)


def samples(models: Sequence[Explored], drawn: Sequence[torch.Tensor]) -> str:
    """Return samples (count, C, H, W) of each model."""
    parts: list[str] = []
    for explored, images in zip(models, drawn, strict=True):
        parts += [title(explored.name), figures([figure(image) for image in images], "tight")]
    return "".join(parts) + note("Decoded samples from the prior N(0, I).")
