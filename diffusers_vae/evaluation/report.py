"""Report of an evaluation: its fields, and evaluation.json."""

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
"""Version of evaluation.json, which docs/evaluation.md describes. In version 1, some figures had other meanings."""


@dataclass(frozen=True)
class LatentSummary:
    """Latents of the measured images; see `LatentStatistics`."""

    mean: list[float]
    """Mean of each channel."""
    std: list[float]
    """Std of each channel."""
    shift_factor: float
    """Mean over all channels and positions."""
    scaling_factor: float
    """1 / std over all channels and positions."""


@dataclass(frozen=True)
class ModelSummary:
    """Description of the measured model."""

    name: str
    """Repository or folder of the model."""
    class_name: str
    """Name of its Python class."""
    parameters: int
    """Number of parameter values."""
    latent_shape: list[int]
    """Shape (C, h, w) of the latents of one image."""
    scaling_factor: float | None
    """scaling_factor in its config: in a run, measured on the training images; None if unknown."""
    shift_factor: float | None
    """shift_factor in its config, like scaling_factor."""
    weights_sha256: str
    """SHA-256 of all weights with their names, independent of the file format."""


@dataclass(frozen=True)
class Protocol:
    """Everything that the figures depend on besides the model."""

    data: str | None
    """Name of the set or of the folder; None for images from another source."""
    split: str | None
    """held-out, training or all; None for images from another source."""
    images: int
    """Number of measured images."""
    fingerprint: str
    """SHA-256 of the set's pixels; for sets too large for memory, of their files' names, sizes and contents: of the
    whole contents up to 4 GiB, otherwise of samples."""
    resolution: list[int]
    """Height and width of the images."""
    channels: int
    """Number of channels of the images."""
    resize: str | None
    """Description of how files of another size were resized to `resolution`."""
    value_range: str
    """Value range of images and reconstructions when they are compared."""
    round_to_8_bit: bool
    """Whether reconstructions were rounded before the comparison."""
    reconstruction: str
    """Decoded latents: mode or sample of the posterior."""
    draws: int
    """Number of posterior samples per image, for distortion and bounds."""
    seed: int
    """Seed of the samples."""
    dtype: str
    """Dtype of the model; objective and metrics use at least float32."""
    device: str
    """Device of the model."""
    networks: dict[str, str]
    """SHA-256 of the weights of LPIPS and rFID, by name of the network."""
    versions: dict[str, str]
    """Versions of the libraries involved."""
    batch_size: int | None = None
    """Images per forward: fewer than evaluation.batch_size if memory ran out. It changes figures only by rounding; None
    in older reports."""


@dataclass(frozen=True)
class FineTuning:
    """Changes that a run made to the autoencoder that it began with, on the same images by the same protocol."""

    source: str
    """Repository, folder or file of the original autoencoder, as given."""
    revision: str | None
    """Revision of the repository."""
    weights_sha256: str
    """SHA-256 of all its weights."""
    encoder_sha256: str
    """SHA-256, after the run, of the weights that determine the latents: encoder and quant_conv."""
    latents_unchanged: bool
    """Whether these weights are unchanged, so that diffusion models and stored latents still fit."""
    differences: dict[str, list[float]]
    """Mean over the images of after minus before, with its 95 % confidence interval, for each figure."""
    repository: str | None = None
    """Hub repository that the autoencoder was loaded from or, for a folder of the Hub's cache, downloaded from; None
    for another folder or file, and in older runs, which did not record it."""


@dataclass(frozen=True)
class PerImage:
    """Figures of each image."""

    indices: list[int]
    """Index of each image in the set."""
    names: list[str]
    """File or number of each image."""
    figures: dict[str, np.ndarray]
    """Figures by name, (N,) each."""

    def to_csv(self) -> str:
        """Return a header and one line per image."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image", *self.figures])
        writer.writerows(zip(self.names, *(values.tolist() for values in self.figures.values()), strict=True))
        return text.getvalue()


@dataclass(frozen=True)
class EvaluationReport:
    """Means over the images. Distortion, rate, elbo and loss are those of samples from the posterior. The other figures
    are those of reconstructions by the protocol, clamped to [-1, 1].
    """

    images: int
    """Number of measured images."""
    loss: float
    """Objective without perceptual and adversarial terms: distortion, without the part of its constant that training
    cannot change, + kl_weight * rate, nats per image."""
    distortion: float
    """-log p(image | latents) with its constant, nats per image."""
    rate: float
    """KL to the prior, nats per image."""
    elbo: float
    """-(distortion + rate), nats per image."""
    importance_weighted_bound: float | None
    """log of the mean of p(image, latents) / q(latents | image) over the samples, nats per image: Burda et al. 2016,
    equation 8. Closer to log p(image) than elbo; None for one sample."""
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
    """Learned perceptual image patch similarity, 0 is best; None if not enabled."""
    lpips_vgg: float | None
    """LPIPS with VGG, like lpips_alex."""
    lpips_squeeze: float | None
    """LPIPS with SqueezeNet, like lpips_alex."""
    rfid: float | None
    """Frechet inception distance between all images and all reconstructions; None if not enabled."""
    intervals: dict[str, list[float]]
    """95 % confidence intervals of the figures, Student's t over the images; none for the rFID, which is one figure for
    all images, and none for one image."""
    latents: LatentSummary
    posterior: PosteriorHealth
    model: ModelSummary
    protocol: Protocol
    kl_weight: float
    """Weight of the rate in loss; the final one in a run with a target rate."""
    scale: float | None
    """Scale of the likelihood in model range; the final one in a run that learns it. None for bernoulli."""
    target_rate: float | None = None
    """Target rate of the run, nats per image; None without a target and outside of runs."""
    fine_tuning: FineTuning | None = None
    """Comparison with the original autoencoder, in a run that began with one."""
    fp16: PrecisionReport | None = None
    """Float16 safety of the model; None if not measured."""
    per_image: PerImage | None = field(default=None, compare=False, repr=False)
    """Figures of each image, stored in evaluation.csv rather than evaluation.json."""

    @property
    def measured(self) -> PerImage:
        """Return `per_image` of a report that was just measured."""
        assert self.per_image is not None, "a report read from a file has no figures per image"
        return self.per_image

    def to_json(self) -> str:
        """Return the report as the content of evaluation.json; ValueError if a number in it is not finite."""
        values = asdict(replace(self, per_image=None))
        del values["per_image"]
        if bad := _not_finite(values):
            raise ValueError(f"the model gives figures that are not finite: {', '.join(bad)}")
        values = {"format": FORMAT} | values
        return json.dumps(values | {"sha256": report_digest(values)}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> EvaluationReport:
        """Return the report from the output of `to_json`; ValueError if it is invalid."""
        try:
            values = json.loads(text)
            digest = report_digest(values)
            if (found := values.pop("format")) != FORMAT:
                raise ValueError(
                    f"its format is {found} and must be {FORMAT}, since figures have changed their meaning"
                )
            if values.pop("sha256") != digest:
                raise ValueError("its SHA-256 must match its figures, which were changed after they were measured")
            check_type(values, cls, "report")
            pairs = values["model"]["latent_shape"], values["protocol"]["resolution"], *values["intervals"].values()
            if any(len(pair) != (3 if index == 0 else 2) for index, pair in enumerate(pairs)):
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
    """Return the SHA-256 of the rest of an evaluation.json: it detects accidental changes, not deliberate ones."""
    return digest_of({name: value for name, value in values.items() if name != "sha256"})


def read_report(path: Path) -> EvaluationReport:
    """Return the report in an evaluation.json; ValueError naming it if it is invalid."""
    try:
        return EvaluationReport.from_json(read_text(path))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged or of another version: {error}. Delete it and run the training command again, which "
            "only measures the model again, or run `diffusers-vae evaluate`. For a run with a learned or optimal "
            "scale, or with a target_rate, evaluate then needs --objective.scale VALUE or --objective.kl_weight VALUE"
        ) from error


def _not_finite(values: dict[str, Any]) -> list[str]:
    """Return the names of numbers, and of lists with numbers, that are not finite."""
    bad = []
    for name, value in values.items():
        if isinstance(value, dict):
            bad += [f"{name}.{inner}" for inner in _not_finite(value)]
        elif not np.isfinite([x for x in np.ravel(value) if isinstance(x, float)] or 0).all():
            bad.append(name)
    return bad
