"""Wording of reports, shared by the page and the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ..evaluation.figures import FIGURES, Figure, changed_figures, source_name

SETTINGS = ("kl_weight", "scale", "target_rate")  # numbers of the report that are not figures


def precision_note(precision: Mapping[str, Any]) -> str:
    """Return the verdict on float16, and how close it is to float32."""
    closest = precision["fp16_psnr"]
    exactness = "" if closest is None else f" PSNR against float32's reconstructions: {closest:.2f} dB or more."
    return precision["advice"] + exactness


def weight_text(report: Mapping[str, Any]) -> str:
    """Return the weight of the rate in the loss, if the report has it."""
    weight = report.get("kl_weight")
    return "" if weight is None else f"; the loss has kl_weight {weight:.4g}"


def origin(tuning: Mapping[str, Any]) -> str:
    """Return a sentence on what a fine-tuned model was made from."""
    return f"Fine-tuned from {source_name(tuning)}{', revision ' + tuning['revision'] if tuning['revision'] else ''}."


def compatibility(report: Mapping[str, Any]) -> tuple[str, str]:
    """Return whether models made for the source of a fine-tuned model still fit, and why."""
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


def changes_of(report: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Return label, difference, ends of its interval and unit of every figure that fine-tuning changed."""
    differences = (report.get("fine_tuning") or {}).get("differences", {})
    return [(figure.label, mean, low, high, figure.unit) for figure, mean, low, high in changed_figures(differences)]


def figures_of(report: Mapping[str, Any]) -> Iterator[tuple[str, float, tuple[float, float] | None, str, str]]:
    """Yield label, value, interval, unit and explanation of every measured number of the report."""
    intervals = report.get("intervals") or {}
    named = [name for name in FIGURES if name in report]
    others = [name for name, value in report.items() if name not in (*FIGURES, *SETTINGS) and isinstance(value, float)]
    for name in named + others:
        if report[name] is not None:
            interval = intervals.get(name)
            figure = FIGURES.get(name) or Figure(words(name), "", "", 4)
            yield figure.label, report[name], tuple(interval) if interval else None, figure.unit, figure.meaning


def number(value: float) -> str:
    """Return a number rounded for reading: 4 to 6 significant digits."""
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    size = abs(value)
    if value and not 1e-3 <= size < 1e7:
        return f"{value:.3e}"
    return f"{value:,.{1 if size >= 1000 else 2 if size >= 10 else 4}f}"


def value_text(value: Any) -> str:
    """Return any value of evaluation.json as one line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {value_text(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        sizes = len(value) in (2, 3) and all(type(item) is int and item > 0 for item in value)
        return ("x" if sizes else ", ").join(value_text(item) for item in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def words(name: str) -> str:
    """Return a name with spaces instead of underscores."""
    return name.replace("_", " ")
