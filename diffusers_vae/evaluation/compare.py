"""Paired comparison of two models on the same images."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

import numpy as np

from .metrics import mean_interval
from .report import FORMAT, EvaluationReport

HIGHER_IS_BETTER = {
    "psnr": True, "ssim": True, "elbo": True, "importance_weighted_bound": True,
    "distortion": False, "lpips_alex": False, "lpips_vgg": False, "lpips_squeeze": False,
}  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """Difference of one figure, second model minus first, image by image."""

    mean: float
    """Mean over the images."""
    interval: list[float]
    """95 % confidence interval of the mean of the differences, Student's t; empty for one image."""
    second_is_better: float | None
    """Share of images for which the second model is better; None for figures without a better direction."""


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images."""

    first: EvaluationReport
    second: EvaluationReport
    differences: dict[str, Difference]
    """Differences by name of the figure, for means over the images."""
    most_different: list[int]
    """Positions, in evaluation.csv, of the images whose PSNR differs most, in descending order."""

    def to_json(self) -> str:
        """Return the comparison as the content of comparison.json."""
        values = {
            "format": FORMAT,
            "differences": {name: asdict(difference) for name, difference in self.differences.items()},
            "most_different": [self.first.measured.names[position] for position in self.most_different],
            "first": json.loads(self.first.to_json()),
            "second": json.loads(self.second.to_json()),
        }
        return json.dumps(values, indent=2, allow_nan=False) + "\n"


def compare(first: EvaluationReport, second: EvaluationReport, show: int = 8) -> Comparison:
    """Return the difference between two fresh reports of `evaluate`, paired per image, and the `show` images that
    differ most.

    Raises:
        ValueError: If they are not of the same images under the same protocol.
    """
    protocols = [
        asdict(replace(report.protocol, batch_size=None)) | {"density": report.density} for report in (first, second)
    ]
    differing = [name for name in protocols[0] if protocols[0][name] != protocols[1][name]]
    if differing:
        listed = ", ".join(f"{name}: {protocols[0][name]} and {protocols[1][name]}" for name in differing)
        raise ValueError(f"models are compared under one protocol, got two: {listed}")
    differences: dict[str, Difference] = {}
    before, after = first.measured.figures, second.measured.figures
    for name in (name for name in before if name in after):
        values = after[name] - before[name]
        better = None
        if name in HIGHER_IS_BETTER:
            better = float(np.mean(values > 0 if HIGHER_IS_BETTER[name] else values < 0))
        interval = list(mean_interval(values)) if len(values) > 1 else []
        differences[name] = Difference(float(values.mean()), interval, better)
    order = np.argsort(-np.abs(after["psnr"] - before["psnr"]), kind="stable")[:show]
    return Comparison(first, second, differences, order.tolist())
