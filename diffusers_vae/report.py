"""Figures and pictures to something a person reads: one self-contained HTML page, or a table in a terminal."""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from jinja2 import Environment, StrictUndefined, Template
from PIL import Image

from .data import ImageSet, Look
from .evaluation.evaluate import EvaluationConfig
from .evaluation.figures import FIGURES, Figure, changed_figures, missed_target, source_name
from .evaluation.float16 import LARGEST
from .evaluation.report import EvaluationReport
from .messages import showable
from .pictures import CAPTIONS, draw_all

PNG_BYTES = 400_000  # above, a picture is a JPEG of quality 95 if that is smaller
JPEG_QUALITIES = (95, 90, 80)  # the first that makes a picture no larger than the limit, or the last
JPEG_BYTES = 700_000
SETTINGS = ("kl_weight", "scale", "target_rate")  # numbers of the report that are no figures
LISTED = 10  # names and kinds, in a table of a set
POINTS = 5000  # images in the picture of the latents, at most


def draw_report(
    model: ModelMixin, image_set: ImageSet, metrics: Path | None, config: EvaluationConfig, report: EvaluationReport
) -> dict[str, Image.Image]:
    """The pictures of a report, by name: of the model, the measured images and, in a run, its metrics.jsonl."""
    shown = min(POINTS, config.max_images or POINTS)
    posterior = report.posterior
    rates = posterior.rate_per_channel, posterior.rate_per_position, posterior.unused_channels
    return draw_all(model, image_set, metrics, config.batch_size, shown, config.seed, *rates, config.projection)


def report_html(report: Mapping[str, Any], pictures: Mapping[str, Image.Image], title: str) -> str:
    """A page that needs no other file and no network: the figures of `report`, which is what evaluation.json holds,
    and the pictures by name.
    """
    shown = []
    for name, picture in pictures.items():
        heading, caption = CAPTIONS.get(name, (_words(name).capitalize(), ""))
        shown.append(
            {
                "name": name,
                "heading": heading,
                "caption": caption,
                "source": _data_uri(picture),
                "width": picture.width,
                "height": picture.height,
            }
        )
    return _template().render(
        title=title,
        report=report,
        figures=list(_figures(report)),
        changes=_changes(report),
        channels=_channels(report),
        missed_target=missed_target(report),
        pictures=shown,
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "value": _value, "words": _words}
    environment.filters |= {"precision": _precision_note, "origin": _origin, "weight": _weight}
    environment.filters["compatibility"] = _compatibility
    text = resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(text)


def report_table(report: Mapping[str, Any]) -> str:
    """The figures of `report`, which is what evaluation.json holds, in lines of at most 100 columns, for a terminal."""
    rows = [
        (label, _number(value), f"[{_number(low)}, {_number(high)}]" if interval else "", unit)
        for label, value, interval, unit, _ in _figures(report)
        for low, high in [interval or (0, 0)]
    ]
    lines = _aligned([("", "mean", "95 % interval", ""), *rows], "<><<")
    posterior = report.get("posterior", {})
    notes = [
        f"{report['images']:,} images; distortion, elbo and bits/dim are of the {report['density']}{_weight(report)}."
    ]
    if missed := missed_target(report):
        notes.append(missed)
    if posterior:
        notes.append(
            f"Latents: {posterior['verdict']}; {posterior['active_units']:,} of {posterior['units']:,} units active."
            + (f" {posterior['advice']}" if posterior.get("advice") else "")
        )
    if report.get("fp16"):
        notes.append(_precision_note(report["fp16"]))
    text = [*lines, "", *(line for note in notes for line in _wrapped(note))]
    if tuning := report.get("fine_tuning"):
        changes = [(label, change, f"[{low}, {high}]", unit) for label, change, low, high, unit in _changes(report)]
        text += ["", *_wrapped(f"{_origin(tuning)} After minus before, in pairs:")]
        text += _aligned([("", "difference", "95 % interval", ""), *changes], "<><<")
        text += ["", *_wrapped(" ".join(_compatibility(report)))]
    return "\n".join(text) + "\n"


def look_table(found: Look) -> str:
    """What there is in a set of images, as text for a terminal."""

    def listed(counts: Mapping[str, int]) -> str:
        first = [f"{showable(name)} {count:,}" for name, count in list(counts.items())[:LISTED]]
        return ", ".join(first) + (f" and {len(counts) - LISTED} more" if len(counts) > LISTED else "")

    def named(names: Sequence[str]) -> str:
        more = [f"{'':14}and {len(names) - LISTED} more"] if len(names) > LISTED else []
        return "\n".join([f"{len(names):,}", *(f"{'':14}{showable(name)}" for name in names[:LISTED]), *more])

    source = "the set's own parts" if found.split else "cut here"
    rows = [("images", ", ".join(f"{count:,} {part}" for part, count in found.parts.items()) + f" ({source})")]
    rows += [("note", showable(note)) for note in found.notes]
    rows += [("classes", f"{len(found.classes)}: {listed(found.classes)}")] if found.classes else []
    rows += [("captions", showable(found.captions, lines=True))] if found.files else []
    if files := found.files:
        rows += [("formats", listed(files.formats)), ("modes", listed(files.modes))]
        if found.proposed:
            low, high = found.proposed
            note = f"{found.value_range}, proposed since 16-bit files hold {low:,} to {high:,}: without"
            rows += [("value range", note), ("", "data.value_range they are divided by 257, and nearly black")]
        if not found.value_range and any(";16" in mode for mode in files.modes):
            rows += [("", "16-bit values are scaled to 8 bits, unless data.value_range states what they mean")]
        rows += [("sizes", f"{listed(files.sizes)} (height x width)")]
        rows += [("shorter side", f"{files.sides[0]:,} to {files.sides[2]:,} pixels, median {files.sides[1]:,}")]
        groups = [
            " = ".join(group[:3]) + f" = {len(group) - 3:,} more" * (len(group) > 3) for group in files.duplicates
        ]
        rows += [("duplicates", named(groups) if groups else "none")]
        if files.leaks:
            rows += [("", f"{files.leaks:,} held-out files are trained on, too: figures will be too good")]
    rows += [("unreadable", named(found.unreadable) if found.unreadable else "none")]
    if found.left_out:
        rows += [("left out", named(found.left_out))]
    if found.files and found.files.paged:
        count, *names = named(found.files.paged).split("\n")
        rows += [("pages", "\n".join([f"{count} files hold several, of which only the first is read", *names]))]
    rows += [("decoded", f"{found.measured:,} of the training images")]
    rows += [(name, "  ".join(f"{value:.4f}" for value in getattr(found, name))) for name in ("mean", "std")]
    if stated := found.value_range:
        width = stated.high - stated.low
        rows += [("in files", f"{stated} is [0, 1] above")]
        rows += [("mean", "  ".join(_number(stated.low + width * value) for value in found.mean))]
        rows += [("std", "  ".join(_number(width * value) for value in found.std))]
    rows += [("constant", named(found.constant) if found.constant else "none")]
    return "\n".join(f"{label:<14}{text}" for label, text in rows)


def precision_table(precision: Mapping[str, Any]) -> str:
    """What evaluation.json holds as fp16, as text for a terminal: blocks in the order in which they run."""
    rows = [("", "largest", "of 65,504")]
    rows += [(name, _number(value), f"{value / LARGEST:.3%}") for name, value in precision["blocks"].items()]
    note = f"{precision['images']:,} images. {_precision_note(precision)}"
    return "\n".join([*_aligned(rows, "<>>"), "", *_wrapped(note)]) + "\n"


def _precision_note(precision: Mapping[str, Any]) -> str:
    """The verdict on float16, and how close it comes to float32."""
    closest = precision["fp16_psnr"]
    exactness = "" if closest is None else f" PSNR against float32's reconstructions: {closest:.2f} dB or more."
    return precision["advice"] + exactness


def _weight(report: Mapping[str, Any]) -> str:
    """That of the rate in the loss, where the report says it."""
    weight = report.get("kl_weight")
    return "" if weight is None else f"; the loss has kl_weight {weight:.4g}"


def _origin(tuning: Mapping[str, Any]) -> str:
    """What a fine-tuned model was made from."""
    return f"Fine-tuned from {source_name(tuning)}{', revision ' + tuning['revision'] if tuning['revision'] else ''}."


def _compatibility(report: Mapping[str, Any]) -> tuple[str, str]:
    """Whether what was made for the source of a fine-tuned model still fits, and why."""
    tuning = report["fine_tuning"]
    unknown = (report.get("model") or {}).get("scaling_factor", 1) is None
    if tuning["latents_unchanged"]:
        return (
            "Latents unchanged: existing diffusion models keep working.",
            f"The encoder's weights are bit for bit those of {source_name(tuning)} (SHA-256 "
            f"{tuning['encoder_sha256']}); "
            + (
                "its scaling_factor is unknown, and null in config.json."
                if unknown
                else "so are scaling_factor, shift_factor, latents_mean and latents_std."
            ),
        )
    return (
        "Latents changed:",
        f"the encoder was trained, so diffusion models that were made for {source_name(tuning)}, and latents that it "
        "encoded, no longer fit. scaling_factor and shift_factor were measured again; latents_mean and latents_std are "
        "null.",
    )


def _changes(report: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Label, difference, ends of its interval and unit of every figure that fine-tuning has changed."""
    differences = (report.get("fine_tuning") or {}).get("differences", {})
    return [(figure.label, mean, low, high, figure.unit) for figure, mean, low, high in changed_figures(differences)]


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """The differences of `comparison`, which is what comparison.json holds, as text for a terminal."""
    first, second = comparison["first"], comparison["second"]
    rows = [("", "first", "second", "second - first", "95 % interval", "unit", "second is better")]
    for name, difference in comparison["differences"].items():
        interval = f"[{', '.join(map(_number, difference['interval']))}]" if difference["interval"] else ""
        share = difference["second_is_better"]
        better = "" if share is None else f"in {100 * share:.0f} % of images"
        values = [_number(value) for value in (first[name], second[name], difference["mean"])]
        rows.append((FIGURES[name].label, *values, interval, FIGURES[name].unit, better))
    if first["rfid"] is not None and second["rfid"] is not None:
        values = first["rfid"], second["rfid"], second["rfid"] - first["rfid"]
        rows.append((FIGURES["rfid"].label, *map(_number, values), "", "", ""))
    names = [
        f"{place}: {showable(report['model']['name'])}" for place, report in (("first", first), ("second", second))
    ]
    notes = [
        _protocol(first["protocol"]),
        "Differences are second minus first, image by image, with Student's t intervals of their mean. Distortion and "
        f"elbo are of the {first['density']}{_weight(first)}.",
    ]
    lines = [line for note in notes for line in _wrapped(note)]
    return "\n".join([*names, "", *lines, "", *_aligned(rows, "<>>><<<")]) + "\n"


def _protocol(protocol: Mapping[str, Any]) -> str:
    """Sentences on the images and on how they were reconstructed."""
    rounding = "rounded to 8 bits" if protocol["round_to_8_bit"] else "not rounded to 8 bits"
    channels = f"{protocol['channels']} channel{'s' if protocol['channels'] > 1 else ''}"
    return (
        f"{protocol['images']:,} images of {protocol['data']}, split {protocol['split']}, at "
        f"{_value(protocol['resolution'])}, {channels}. Reconstructions are decoded from the posterior's "
        f"{protocol['reconstruction']}, {rounding}; {protocol['dtype']} on {protocol['device']}."
    )


def _aligned(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Columns of one width each, aligned to the `sides` < and >."""
    rows = [[showable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)] for row in rows]
    return ["  ".join(row).rstrip() for row in cells]


def _wrapped(text: str) -> list[str]:
    """Lines of at most 100 columns."""
    return textwrap.wrap(showable(text), 100)


def _figures(report: Mapping[str, Any]) -> Iterator[tuple[str, float, tuple[float, float] | None, str, str]]:
    """Label, value, interval, unit and explanation of every number of the report that was measured."""
    intervals = report.get("intervals") or {}
    known = [name for name in FIGURES if name in report]
    others = [name for name, value in report.items() if name not in (*FIGURES, *SETTINGS) and isinstance(value, float)]
    for name in known + others:
        if report[name] is not None:
            interval = intervals.get(name)
            figure = FIGURES.get(name) or Figure(_words(name), "", "", 4)
            yield figure.label, report[name], tuple(interval) if interval else None, figure.unit, figure.meaning


def _channels(report: Mapping[str, Any]) -> list[tuple[int | float | None, ...]]:
    """Number, mean, std, rate, information and cost of a swap of each channel of the latents."""
    latents, posterior = (report.get(name, {}) for name in ("latents", "posterior"))
    columns = [
        latents.get("mean"),
        latents.get("std"),
        posterior.get("rate_per_channel"),
        posterior.get("information_per_channel"),
        (posterior.get("swaps") or {}).get("channels"),
    ]
    count = max((len(column) for column in columns if isinstance(column, list)), default=0)
    columns = [column if isinstance(column, list) else [None] * count for column in columns]
    return [(number, *values) for number, values in enumerate(zip(*columns, strict=True))]


def _number(value: float) -> str:
    """Rounded for reading: 4 to 6 significant digits."""
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    size = abs(value)
    if value and not 1e-3 <= size < 1e7:
        return f"{value:.3e}"
    return f"{value:,.{1 if size >= 1000 else 2 if size >= 10 else 4}f}"


def _value(value: Any) -> str:
    """Anything of evaluation.json in a line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        sizes = len(value) in (2, 3) and all(type(item) is int and item > 0 for item in value)
        return ("x" if sizes else ", ").join(_value(item) for item in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _data_uri(picture: Image.Image) -> str:
    buffer, kind = io.BytesIO(), "png"
    picture.save(buffer, "PNG")
    if buffer.tell() > PNG_BYTES:
        for quality in JPEG_QUALITIES:
            smaller = io.BytesIO()
            picture.convert("RGB").save(smaller, "JPEG", quality=quality, subsampling=0)
            if smaller.tell() <= JPEG_BYTES:
                break
        if smaller.tell() < buffer.tell():
            buffer, kind = smaller, "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
