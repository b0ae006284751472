"""Names, rounding and explanations of the figures of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any


@dataclass(frozen=True)
class Figure:
    """Presentation of a number of the report."""

    label: str
    unit: str
    meaning: str
    digits: int


FIGURES = {
    "psnr": Figure("PSNR", "dB", "peak signal-to-noise ratio; higher is better", 2),
    "ssim": Figure("SSIM", "", "structural similarity, 1 for a copy; higher is better", 4),
    "lpips_alex": Figure("LPIPS (alex)", "", "perceptual distance, 0 for a copy; lower is better", 4),
    "lpips_vgg": Figure("LPIPS (vgg)", "", "perceptual distance, 0 for a copy; lower is better", 4),
    "lpips_squeeze": Figure("LPIPS (squeeze)", "", "perceptual distance, 0 for a copy; lower is better", 4),
    "rfid": Figure("rFID", "", "distance of all reconstructions to all images; lower is better, at equal counts", 2),
    "rate": Figure("rate", "nats/image", "KL to the prior: what the latents say about an image", 2),
    "distortion": Figure("distortion", "nats/image", "-log p(image | latents); lower is better", 2),
    "elbo": Figure("ELBO", "nats/image", "-(distortion + rate), a lower bound of log p(image); higher is better", 2),
    "importance_weighted_bound": Figure(
        "IW bound", "nats/image", "a tighter bound of log p(image), from several samples", 2
    ),
    "bits_per_dim": Figure(
        "bits/dim", "bits/value", "-ELBO per channel of a pixel, in the unit of the density; lower is better", 4
    ),
    "loss": Figure("loss", "nats/image", "the objective: distortion without its constant + kl_weight * rate", 3),
}
"""Figures by key in evaluation.json, in display order."""
TARGET_TOLERANCE = 0.05
"""Maximum relative difference between a rate and its target at which the target counts as reached."""


def missed_target(report: Mapping[str, Any]) -> str:
    """Return a message, with advice, if the rate in `report`, the content of evaluation.json, missed its `target_rate`;
    empty if it was reached or there is none.
    """
    target, rate = report.get("target_rate"), report["rate"]
    if target is None or abs(rate - target) <= TARGET_TOLERANCE * target:
        return ""
    what = f"target_rate {target:g} was not reached: the rate is {rate:.4g} nats ({100 * (rate / target - 1):+.0f} %)."
    if rate > target:
        return f"{what} Train on more images, or start with a larger objective.kl_weight or objective.scale."
    return (
        f"{what} Train on more images, or start with a smaller objective.kl_weight or objective.scale; if the rate "
        "stays the same, the model cannot use more."
    )


def source_name(fine_tuning: Mapping[str, Any]) -> str:
    """Return the repository that a run was fine-tuned from, or the name of the folder or file without its path."""
    if repository := fine_tuning.get("repository"):
        return repository
    given = fine_tuning["source"]
    # may be a path of another machine
    source = PureWindowsPath(given) if PureWindowsPath(given).drive else PurePosixPath(given)
    return (source.parent if source.name in ("model", "vae") else source).name or source.name or given


def changed_figures(differences: Mapping[str, Sequence[float]]) -> list[tuple[Any, ...]]:
    """Return each figure of `FineTuning.differences` with formatted mean and ends of the interval, with signs.
    Differences of 0, such as the rate if its weights did not change, are omitted.
    """
    return [
        (figure, *(f"{value:+,.{figure.digits}f}" for value in differences[name]))
        for name, figure in FIGURES.items()
        if any(differences.get(name, ()))
    ]
