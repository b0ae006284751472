"""Two models on the same images, in pairs."""

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
    """Of one figure, second model minus first, image by image."""

    mean: float
    """Over the images."""
    interval: list[float]
    """95 % confidence interval of the mean of the differences, Student's t; empty of one image."""
    second_is_better: float | None
    """Share of the images where it is; None for figures of which neither more nor less is better."""


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images."""

    first: EvaluationReport
    second: EvaluationReport
    differences: dict[str, Difference]
    """By the name of the figure, for means over the images."""
    most_different: list[int]
    """Places, in evaluation.csv, of the images whose PSNR differs most, in falling order."""

    def to_json(self) -> str:
        """The comparison as comparison.json holds it."""
        values = {
            "format": FORMAT,
            "differences": {name: asdict(difference) for name, difference in self.differences.items()},
            "most_different": [self.first.measured.names[place] for place in self.most_different],
            "first": json.loads(self.first.to_json()),
            "second": json.loads(self.second.to_json()),
        }
        return json.dumps(values, indent=2, allow_nan=False) + "\n"


def compare(first: EvaluationReport, second: EvaluationReport, show: int = 8) -> Comparison:
    """The difference between two fresh reports (of `evaluate`), paired per image; the `show` images that differ most.

    Raises:
        ValueError: when they are not of the same images under the same protocol.
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
