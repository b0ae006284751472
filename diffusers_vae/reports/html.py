"""Self-contained HTML report of figures and pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from PIL import Image

from ..data import ImageSet
from ..evaluation.evaluate import EvaluationConfig
from ..evaluation.figures import missed_target
from ..evaluation.report import EvaluationReport
from ..models.stock import ModelMixin
from .pictures import CAPTIONS, draw_all
from .wording import (
    changes_of,
    compatibility,
    figures_of,
    number,
    origin,
    precision_note,
    value_text,
    weight_text,
    words,
)

PNG_BYTES = 400_000  # a larger picture becomes a JPEG of quality 95 if that is smaller
JPEG_QUALITIES = (95, 90, 80)  # the first that meets the limit, or the last
JPEG_BYTES = 700_000
POINTS = 5000  # maximum number of images in the picture of the latents


def draw_report(
    model: ModelMixin, image_set: ImageSet, metrics: Path | None, config: EvaluationConfig, report: EvaluationReport
) -> dict[str, Image.Image]:
    """Return the pictures of a report by name: of the model, the measured images and, in a run, its metrics.jsonl."""
    shown = min(POINTS, config.max_images or POINTS)
    posterior = report.posterior
    rates = posterior.rate_per_channel, posterior.rate_per_position, posterior.unused_channels
    return draw_all(model, image_set, metrics, config.batch_size, shown, config.seed, *rates)


def report_html(report: Mapping[str, Any], pictures: Mapping[str, Image.Image], title: str) -> str:
    """Return a page that needs no other file and no network, with the figures of `report`, the content of
    evaluation.json, and the pictures by name.
    """
    shown: list[dict[str, str | int]] = []
    for name, picture in pictures.items():
        heading, caption = CAPTIONS.get(name, (words(name).capitalize(), ""))
        named = {"name": name, "heading": heading, "caption": caption}
        shown.append({**named, "source": _data_uri(picture), "width": picture.width, "height": picture.height})
    return _template().render(
        title=title,
        report=report,
        figures=list(figures_of(report)),
        changes=changes_of(report),
        channels=_channels(report),
        missed_target=missed_target(report),
        pictures=shown,
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    filters: dict[str, Any] = environment.filters
    filters |= {"number": number, "value": value_text, "words": words, "compatibility": compatibility}
    filters |= {"precision": precision_note, "origin": origin, "weight": weight_text}
    text = resources.files("diffusers_vae.reports").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(text)


def _channels(report: Mapping[str, Any]) -> list[tuple[int | float | None, ...]]:
    """Return number, mean, std, rate, information and swap cost of each latent channel."""
    latents, posterior = (report.get(name, {}) for name in ("latents", "posterior"))
    columns = [latents.get("mean"), latents.get("std")]
    columns += [posterior.get(f"{name}_per_channel") for name in ("rate", "information")]
    columns.append((posterior.get("swaps") or {}).get("channels"))
    count = max((len(column) for column in columns if isinstance(column, list)), default=0)
    columns = [column if isinstance(column, list) else [None] * count for column in columns]
    return [(number, *values) for number, values in enumerate(zip(*columns, strict=True))]


def _data_uri(picture: Image.Image) -> str:
    buffer, kind = io.BytesIO(), "png"
    picture.save(buffer, "PNG")
    if buffer.tell() > PNG_BYTES:
        smaller = io.BytesIO()
        for quality in JPEG_QUALITIES:
            smaller = io.BytesIO()
            picture.convert("RGB").save(smaller, "JPEG", quality=quality, subsampling=0)
            if smaller.tell() <= JPEG_BYTES:
                break
        if smaller.tell() < buffer.tell():
            buffer, kind = smaller, "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
