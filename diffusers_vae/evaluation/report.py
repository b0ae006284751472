"""The report of an evaluation: its fields, and evaluation.json."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..latents.statistics import PosteriorHealth, SwapCosts
from ..storage import digest_of
from ..untrusted import check_type, read_text
from .float16 import PrecisionReport

FORMAT = 2
"""Version of evaluation.json, which docs/evaluation.md describes. In 1, some figures had other meanings."""


@dataclass(frozen=True)
class LatentSummary:
    """The latents of the measured images; see `LatentStatistics`."""

    mean: list[float]
    """Per channel."""
    std: list[float]
    """Per channel."""
    shift_factor: float
    """Mean over all channels and positions."""
    scaling_factor: float
    """1 / std over all channels and positions."""


@dataclass(frozen=True)
class ModelSummary:
    """What was measured."""

    name: str
    """Repository, or folder."""
    class_name: str
    """Of which it is in Python."""
    parameters: int
    """Number of values."""
    latent_shape: list[int]
    """Channels, height and width of the latents of one image."""
    scaling_factor: float | None
    """As its config states: in a run, measured on the training images; None where it is unknown."""
    shift_factor: float | None
    """Likewise."""
    weights_sha256: str
    """Of all weights with their names, the same however they were saved."""


@dataclass(frozen=True)
class Protocol:
    """All that the figures depend on besides the model."""

    data: str | None
    """Name of the set, or of the folder; None when the images came from elsewhere."""
    split: str | None
    """held-out, training or all; None likewise."""
    images: int
    """How many were measured."""
    fingerprint: str
    """SHA-256 of the set's pixels; of sets too large for memory, of their files' names, sizes and contents: of the
    whole contents up to 4 GiB, else of samples."""
    resolution: list[int]
    """Height and width of the images."""
    channels: int
    """Of the images."""
    resize: str | None
    """How files of another size were brought to `resolution`."""
    value_range: str
    """Of images and reconstructions where they are compared."""
    round_to_8_bit: bool
    """Whether reconstructions were rounded before they were compared."""
    reconstruction: str
    """mode or sample of the posterior."""
    draws: int
    """From the posterior, per image, for distortion and bounds."""
    seed: int
    """Seed of the draws."""
    dtype: str
    """Of the model; objective and metrics are float32 at least."""
    device: str
    """On which it ran."""
    networks: dict[str, str]
    """SHA-256 of the weights by which LPIPS and rFID judge, by name of the network."""
    versions: dict[str, str]
    """Of the libraries that take part."""
    batch_size: int | None = None
    """Images per forward: fewer than evaluation.batch_size if memory did not suffice. It changes figures by rounding at
    most; None in reports of before."""


@dataclass(frozen=True)
class FineTuning:
    """What a run has made of the autoencoder that it began with, measured on the same images by the same protocol."""

    source: str
    """Repository, folder or file of that autoencoder, as given."""
    revision: str | None
    """Of the repository."""
    weights_sha256: str
    """Of all its weights."""
    encoder_sha256: str
    """Of the weights that decide the latents, encoder and quant_conv, after the run."""
    latents_unchanged: bool
    """Whether they are those from before it, so that diffusion models and stored latents still fit."""
    differences: dict[str, list[float]]
    """Of each figure: mean over the images of after minus before, and its 95 % confidence interval, in pairs."""
    repository: str | None = None
    """Repository on the Hub that the autoencoder was loaded from or, for a folder of the Hub's cache, downloaded from;
    None for another folder or file, and for a run of a version that did not record it."""


@dataclass(frozen=True)
class PerImage:
    """The figures of each image."""

    indices: list[int]
    """Of each in the image set."""
    names: list[str]
    """File or number of each."""
    figures: dict[str, np.ndarray]
    """By name, (N,) each."""

    def to_csv(self) -> str:
        """A line per image."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image", *self.figures])
        writer.writerows(zip(self.names, *(values.tolist() for values in self.figures.values()), strict=True))
        return text.getvalue()


@dataclass(frozen=True)
class EvaluationReport:
    """Means over the images. Distortion, rate, elbo and loss are of draws from the posterior; the other figures of
    reconstructions as the protocol says, clamped to [-1, 1].
    """

    images: int
    """How many were measured."""
    loss: float
    """The objective: distortion, without the part of its constant that training cannot change, + kl_weight * rate, nats
    per image; without perceptual and adversarial terms."""
    distortion: float
    """-log p(image | latents) with its constant, nats per image."""
    rate: float
    """KL to the prior, nats per image."""
    elbo: float
    """-(distortion + rate), nats per image."""
    importance_weighted_bound: float | None
    """log of the mean of p(image, latents) / q(latents | image) over the draws, nats per image: Burda et al. 2016,
    equation 8. Nearer to log p(image) than elbo; None of one draw."""
    bits_per_dim: float
    """-elbo / (ln 2 * C * H * W), bits per value of an image. For a density over [-1, 1], log2(255 / 2) is added, so
    that it is per 8-bit level, as in the literature; not with data.value_range."""
    density: str
    """Density that distortion and bounds refer to, and its unit in bits_per_dim."""
    psnr: float
    """Peak signal-to-noise ratio, dB."""
    ssim: float
    """Structural similarity."""
    lpips_alex: float | None
    """Learned perceptual image patch similarity, 0 is best; None when it was not asked for."""
    lpips_vgg: float | None
    """Likewise."""
    lpips_squeeze: float | None
    """Likewise."""
    rfid: float | None
    """Frechet inception distance between images and reconstructions, of all together; None likewise."""
    intervals: dict[str, list[float]]
    """95 % confidence intervals of the figures, Student's t over the images; none for the rFID, which is one figure of
    all images, and none at all for one image."""
    latents: LatentSummary
    posterior: PosteriorHealth
    model: ModelSummary
    protocol: Protocol
    kl_weight: float
    """In loss; of a run that steers it to a target rate, the last."""
    scale: float | None
    """Of the likelihood, in model range; of a run that learns it, the last. None for one without, bernoulli."""
    target_rate: float | None = None
    """The rate that the run was asked for, nats per image; None in runs without a target and outside of runs."""
    fine_tuning: FineTuning | None = None
    """In a run that began with a trained autoencoder."""
    fp16: PrecisionReport | None = None
    """Whether the model can run in float16; None when it was not asked for."""
    per_image: PerImage | None = field(default=None, compare=False, repr=False)
    """Not in evaluation.json but in evaluation.csv."""

    @property
    def measured(self) -> PerImage:
        """`per_image` of a report that was just made."""
        assert self.per_image is not None, "a report that was read has no figures per image"
        return self.per_image

    def to_json(self) -> str:
        """The report as evaluation.json holds it; ValueError when a number in it is not finite."""
        values = asdict(replace(self, per_image=None))
        del values["per_image"]
        if bad := _not_finite(values):
            raise ValueError(f"the model gives figures that are not finite: {', '.join(bad)}")
        values = {"format": FORMAT} | values
        return json.dumps(values | {"sha256": report_digest(values)}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> EvaluationReport:
        """The report that `to_json` gave; ValueError when it is none."""
        try:
            values = json.loads(text)
            digest = report_digest(values)
            if (found := values.pop("format")) != FORMAT:
                raise ValueError(
                    f"its format is {found} and must be {FORMAT}, since figures have changed their meaning"
                )
            if values.pop("sha256") != digest:
                raise ValueError("its SHA-256 must be that of its figures, which were changed since they were measured")
            check_type(values, cls, "report")
            pairs = values["model"]["latent_shape"], values["protocol"]["resolution"], *values["intervals"].values()
            if any(len(pair) != (3 if place == 0 else 2) for place, pair in enumerate(pairs)):
                raise ValueError("a latent_shape must have 3 entries, a resolution and intervals 2 each")
            parts = {"latents": LatentSummary, "posterior": PosteriorHealth, "model": ModelSummary}
            parts |= {"protocol": Protocol, "fp16": PrecisionReport, "fine_tuning": FineTuning}
            if swaps := values["posterior"]["swaps"]:
                values["posterior"] |= {"swaps": SwapCosts(**swaps)}
            return cls(
                **values | {name: kind(**values[name]) for name, kind in parts.items() if values[name] is not None}
            )
        except (AttributeError, KeyError, RecursionError, TypeError) as error:
            raise ValueError(f"no evaluation report: {error}") from error


def report_digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of what an evaluation.json holds besides it: a guard against accidents, and no proof."""
    return digest_of({name: value for name, value in values.items() if name != "sha256"})


def read_report(path: Path) -> EvaluationReport:
    """The report in an evaluation.json; ValueError naming it when it holds none."""
    try:
        return EvaluationReport.from_json(read_text(path))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged or of another version: {error}. Delete it and run the training command again, which "
            "only measures the model again, or run `diffusers-vae evaluate`. For a run with a learned or optimal "
            "scale, or with a target_rate, evaluate then needs --objective.scale VALUE or --objective.kl_weight VALUE"
        ) from error


def _not_finite(values: dict[str, Any]) -> list[str]:
    """Names of the numbers, and of lists with numbers, that are not finite."""
    bad = []
    for name, value in values.items():
        if isinstance(value, dict):
            bad += [f"{name}.{inner}" for inner in _not_finite(value)]
        elif not np.isfinite([x for x in np.ravel(value) if isinstance(x, float)] or 0).all():
            bad.append(name)
    return bad
