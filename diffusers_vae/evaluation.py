"""Model and held-out images to numbers, with all that is needed to get the same numbers again."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_utils import ModelMixin
from tqdm import tqdm

from .data import DataConfig, ImageSet, image_batches
from .images import to_model_range, to_uint8
from .latents import LatentStatistics, PosteriorHealth, SwapCosts, draw, measure_swaps, total
from .losses.objective import Bernoulli, VAEObjective
from .losses.perceptual import LPIPS, InceptionFeatures
from .metrics import frechet_distance, mean_interval, psnr, ssim
from .models import decode, decode_logits, encode, unmeasured, weights_hash
from .precision import PrecisionReport, measure_precision
from .processes import gather_parts, in_parts, largest_part, process_share
from .storage import digest_of
from .untrusted import check_type, read_text
from .values import ValueRange

PACKAGES = (
    "diffusers-vae", "diffusers", "torch", "torchvision", "torchmetrics", "torch-fidelity", "numpy", "scipy", "pillow",
)  # fmt: skip
FORMAT = 2
"""Version of evaluation.json, which docs/evaluation.md describes. In 1, figures had other meanings: CHANGELOG.md."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Measuring and picturing, in a run always with the EMA weights when there are any."""

    every: int | None = None
    """Images between two evaluations in a run; by default there is one, at the end."""
    max_images: int | None = None
    """At most this many held-out images are measured, and as many training images for the statistics of the latents,
    always the same; by default all."""
    batch_size: int = 64
    """Maximum number of images per forward, also for pictures; halved as often as memory requires."""
    seed: int = 0
    """Seed of the noise in the latents and of the samples from the prior."""
    reconstruction: Literal["mode", "sample"] = "mode"
    """What PSNR, SSIM, LPIPS and rFID are of: the decoded mode of the posterior, or one draw from it."""
    round_to_8_bit: bool = True
    """Whether PSNR, SSIM and LPIPS are of reconstructions as 8-bit files would hold them; with data.value_range they
    never are, and the PSNR is over that range. The rFID always is of 8-bit values."""
    draws: int = 1
    """Draws from the posterior per image. Distortion is their mean; of two or more there is the importance-weighted
    bound too."""
    lpips: tuple[Literal["alex", "vgg", "squeeze"], ...] = ()
    """Networks whose features LPIPS compares; their published weights are downloaded to
    `$TORCH_HOME/hub/checkpoints` if they are not there."""
    rfid: bool = False
    """Frechet inception distance between the images and their reconstructions; its weights are found as those of
    `lpips`."""
    projection: Literal["pca", "tsne"] = "pca"
    """Of latents of more than two dimensions, to picture them."""
    fp16: bool = False
    """Whether float16 is tried too: the largest activations of each block, and whether force_upcast can be false."""

    def __post_init__(self):
        for name in ("every", "max_images", "batch_size", "draws"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"evaluation.{name} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"evaluation.seed must lie in [0, 2^31), got {self.seed}")
        for name, choices in (("reconstruction", ("mode", "sample")), ("projection", ("pca", "tsne"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"evaluation.{name} must be {' or '.join(choices)}, got {getattr(self, name)}")
        if wrong := [name for name in self.lpips if name not in ("alex", "vgg", "squeeze")]:
            raise ValueError(f"evaluation.lpips must name alex, vgg or squeeze, or several, got {wrong[0]}")


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
            kinds = (LatentSummary, PosteriorHealth, ModelSummary, Protocol)
            parts = dict(zip(("latents", "posterior", "model", "protocol"), kinds, strict=True))
            if swaps := values["posterior"]["swaps"]:
                values["posterior"] |= {"swaps": SwapCosts(**swaps)}
            optional = {"fp16": PrecisionReport, "fine_tuning": FineTuning}
            parts |= {name: kind for name, kind in optional.items() if values[name] is not None}
            return cls(**values | {name: kind(**values[name]) for name, kind in parts.items()})
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


Judges = tuple[dict[str, LPIPS], InceptionFeatures | None]


def load_judges(config: EvaluationConfig, channels: int, size: tuple[int, int]) -> Judges:
    """The networks that `config` asks for.

    Raises:
        FileNotFoundError: when weights are not there and cannot be downloaded.
        ValueError: when they cannot see images of `channels` and `size`.
    """
    lpips = {name: LPIPS(name) for name in config.lpips}
    inception = InceptionFeatures() if config.rfid else None
    for network in (*lpips.values(), *([inception] if inception else [])):
        network.check(channels, size)
    return lpips, inception


def log_prior_ratio(posterior: DiagonalGaussianDistribution, latents: torch.Tensor) -> torch.Tensor:
    """log p(latents) - log q(latents | image) per image (B,), nats; minus its mean over draws is the rate."""
    ratio = 0.5 * (((latents - posterior.mean) / posterior.std) ** 2 + posterior.logvar - latents**2)
    return ratio.flatten(1).sum(1)


def reconstruct(
    model: ModelMixin, images: torch.Tensor, indices: Sequence[int], config: EvaluationConfig
) -> torch.Tensor:
    """Reconstructions (B, C, H, W), in [-1, 1], of the images `indices`, as `config` says."""
    posterior = encode(model, images)
    latents = posterior.mode()
    if config.reconstruction == "sample":
        latents = next(draw(posterior, indices, config.seed, 1))
    return _as_compared(decode(model, latents), config)


def _as_compared(reconstructions: torch.Tensor, config: EvaluationConfig) -> torch.Tensor:
    clamped = reconstructions.clamp(-1, 1)
    if not config.round_to_8_bit:
        return clamped
    return to_model_range(to_uint8(clamped)).where(clamped.isfinite(), clamped)  # not a number must not pass for black


@torch.no_grad()
def evaluate(
    model: ModelMixin,
    image_set: ImageSet,
    objective: VAEObjective,
    config: EvaluationConfig,
    data: DataConfig | None = None,
    split: str | None = None,
    name: str = "",
    progress: bool = False,
) -> EvaluationReport:
    """The report of `model`, in eval mode, over the images: any autoencoder of diffusers with `encode(...).latent_dist`
    and `decode(...).sample`. The draws for an image depend on the seed and its index.

    Under torch.distributed all processes must call it, with the same model; they share the work, and the report is
    that of one process, bit by bit.

    Args:
        model: on the device where it is to run, in the dtype in which it is to be measured.
        image_set: the images.
        objective: whose terms are measured.
        config: what is measured, and how.
        data: where the images came from, and
        split: which part of it they are, for the protocol.
        name: of the model, for the report.
        progress: show a bar.

    Raises:
        FileNotFoundError: when weights for LPIPS or rFID are not there.
        ValueError: when there is no image that can be read, the model does not take such images, or float16 is to be
            tried and not even float32 gives finite activations.
    """
    if not len(image_set):
        raise ValueError("there must be at least one image to evaluate, got none")
    if config.rfid and min(len(image_set), config.max_images or 2) < 2:
        raise ValueError("the FID compares spreads: it needs at least two images, got one")
    stated = None if data is None or data.value_range is None else ValueRange(*data.value_range)
    if stated:
        config = replace(config, round_to_8_bit=False)
    rank, processes = process_share()
    parts, statistics, networks = [], {}, {}
    judges: Judges | None = None
    count = min(len(image_set), config.max_images or len(image_set))
    with tqdm(total=count, desc="evaluation", unit="img", disable=not progress or rank > 0, leave=False) as bar:
        for part, indices, images in image_batches(
            image_set, config.batch_size, config.max_images, model.device, rank, processes
        ):
            if judges is None:
                judges = load_judges(config, images.shape[1], tuple(images.shape[2:]))
                named = judges[0] | ({"inception": judges[1]} if judges[1] else {})
                networks = {name: weights_hash(network.to(model.device)) for name, network in named.items()}
            measured = in_parts(model, partial(_measure, model, objective, config, judges), images, indices)
            for counted, *_ in measured:
                statistics.setdefault(part, LatentStatistics()).add(counted)
            figures = {name: torch.cat([each[1][name] for each in measured]) for name in measured[0][1]}
            features = judges[1] and tuple(torch.cat([each[2][which] for each in measured]) for which in (0, 1))
            table = torch.stack([values.cpu().double() for values in figures.values()]).T.numpy()
            parts.append((indices[0], indices, list(figures), table, features, tuple(images.shape[1:])))
            bar.set_postfix({term: f"{figures[term].mean():.4g}" for term in ("distortion", "rate")}, refresh=False)
            bar.update(min(len(indices) * processes, count - bar.n))
    parts = gather_parts(parts)
    if not parts:
        raise ValueError("no image to evaluate can be read")
    statistics = total(statistics)
    indices = [index for part in parts for index in part[1]]
    table = np.concatenate([part[3] for part in parts])
    figures = {name: np.ascontiguousarray(table[:, column]) for column, name in enumerate(parts[0][2])}
    means = {name: float(values.sum() / len(values)) for name, values in figures.items()}
    channels, height, width = parts[0][5]
    per_dim, (per_unit, unit) = -1 / (math.log(2) * channels * height * width), _unit(objective, stated)
    intervals = {}
    if len(indices) > 1:
        intervals = {name: list(mean_interval(values)) for name, values in figures.items()}
        intervals["bits_per_dim"] = [bound * per_dim + per_unit for bound in intervals["elbo"][::-1]]
    rfid = None
    if config.rfid:
        rfid = frechet_distance(*(torch.cat([part[4][which] for part in parts]) for which in (0, 1)))
    precision = None
    if config.fp16:
        precision = measure_precision(model, image_set, config.batch_size, config.max_images, progress)
    swaps = measure_swaps(model, image_set, config.batch_size, config.max_images)
    described = getattr(model, "config", {})
    return EvaluationReport(
        images=len(indices),
        bits_per_dim=means["elbo"] * per_dim + per_unit,
        density=objective.likelihood.density + unit,
        kl_weight=objective.kl_weight,
        scale=objective.scale,
        rfid=rfid,
        intervals=intervals,
        latents=LatentSummary(
            mean=statistics.latents_mean,
            std=statistics.latents_std,
            shift_factor=statistics.mean,
            scaling_factor=statistics.scaling_factor,
        ),
        posterior=statistics.health(swaps),
        model=ModelSummary(
            name=name,
            class_name=type(model).__qualname__,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            latent_shape=list(statistics.sums.shape[1:]),
            scaling_factor=None if unmeasured(described) else described["scaling_factor"],
            shift_factor=None if unmeasured(described) else described.get("shift_factor"),
            weights_sha256=weights_hash(model),
        ),
        protocol=Protocol(
            data=None if data is None else data.described,
            split=split,
            images=len(indices),
            fingerprint=image_set.contents() or image_set.fingerprint(),
            resolution=[height, width],
            channels=channels,
            resize=None if data is None else data.resize,
            value_range=f"[-1, 1], which stands for {stated} in the files" if stated else "[-1, 1]",
            round_to_8_bit=config.round_to_8_bit,
            reconstruction=config.reconstruction,
            draws=config.draws,
            seed=config.seed,
            dtype=str(model.dtype).removeprefix("torch."),
            device=model.device.type,
            networks=networks,
            versions={"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
            batch_size=largest_part(model, config.batch_size),
        ),
        fp16=precision,
        per_image=PerImage(indices, [image_set.name(index) for index in indices], figures),
        **dict.fromkeys(("importance_weighted_bound", "lpips_alex", "lpips_vgg", "lpips_squeeze")) | means,
    )


def _unit(objective: VAEObjective, stated: ValueRange | None) -> tuple[float, str]:
    """Bits that the unit of the density adds to each value in bits/dim, and that unit in words."""
    if isinstance(objective.likelihood, Bernoulli):  # a probability, in no unit
        return 0.0, ""
    if stated:
        return 0.0, "; bits/dim per unit of [-1, 1]"
    return math.log2(255 / 2), "; bits/dim per 8-bit level (2/255)"


def _measure(
    model: ModelMixin,
    objective: VAEObjective,
    config: EvaluationConfig,
    judges: Judges,
    images: torch.Tensor,
    indices: list[int],
) -> tuple[LatentStatistics, dict[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]:
    """Statistics of the latents, the figures of each image, (B,) by name, and the features of images and
    reconstructions if asked for.
    """
    posterior, statistics = encode(model, images), LatentStatistics()
    statistics.update(posterior)
    distortions, log_weights, reconstructions = [], [], None
    for latents in draw(posterior, indices, config.seed, config.draws):
        if isinstance(objective.likelihood, Bernoulli):
            logits = decode_logits(model, latents)
            decoded = to_model_range(logits.sigmoid())
            terms = objective(images, decoded, posterior, logits=logits)
        else:
            decoded = decode(model, latents)
            terms = objective(images, decoded, posterior)
        distortions.append(terms.distortion)
        log_weights.append(log_prior_ratio(posterior, latents).cpu().double() - terms.distortion.cpu().double())
        if reconstructions is None and config.reconstruction == "sample":
            reconstructions = decoded
    if reconstructions is None:
        reconstructions = decode(model, posterior.mode())
    reconstructions = _as_compared(reconstructions, config)
    distortion, rate = torch.stack(distortions).mean(0), terms.rate
    left_out = objective.left_out() * images[0].numel()
    figures = {
        "loss": distortion - left_out + objective.kl_weight * rate,
        "distortion": distortion,
        "rate": rate,
        "elbo": -(distortion + rate),
        "psnr": psnr(images, reconstructions),
        "ssim": ssim(images, reconstructions),
    }
    if config.draws > 1:
        bound = torch.stack(log_weights).logsumexp(0) - math.log(config.draws)
        figures["importance_weighted_bound"] = bound
    for name, network in judges[0].items():
        figures[f"lpips_{name}"] = network(images, reconstructions)
    inception = judges[1]
    return statistics, figures, inception and (inception(images).cpu(), inception(reconstructions).cpu())


@dataclass(frozen=True)
class Figure:
    """How a number of the report is shown to people."""

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
        "IW bound", "nats/image", "a tighter bound of log p(image), of several draws", 2
    ),
    "bits_per_dim": Figure(
        "bits/dim", "bits/value", "-ELBO per channel of a pixel, in the unit of the density; lower is better", 4
    ),
    "loss": Figure("loss", "nats/image", "the objective: distortion without its constant + kl_weight * rate", 3),
}
"""By the key in evaluation.json, in the order in which people are shown them."""

HIGHER_IS_BETTER = {
    "psnr": True, "ssim": True, "elbo": True, "importance_weighted_bound": True,
    "distortion": False, "lpips_alex": False, "lpips_vgg": False, "lpips_squeeze": False,
}  # fmt: skip


TARGET_TOLERANCE = 0.05
"""Largest difference between a rate and its target, relative to the target, at which the target counts as reached."""


def missed_target(report: Mapping[str, Any]) -> str:
    """What to say of a `target_rate` that the rate in `report`, which is what evaluation.json holds, has missed, and
    what to do; nothing if it was reached or there is none.
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
    """The repository that a run was fine-tuned from, or the name of the folder or file without its path."""
    if repository := fine_tuning.get("repository"):
        return repository
    given = fine_tuning["source"]
    source = PureWindowsPath(given) if PureWindowsPath(given).drive else PurePosixPath(given)  # of another machine
    return (source.parent if source.name in ("model", "vae") else source).name or source.name or given


def changed_figures(differences: Mapping[str, Sequence[float]]) -> list[tuple[Figure, str, str, str]]:
    """Of `FineTuning.differences`, each figure with mean and ends of the interval, with their signs, as people read
    them; without those that are 0: a rate that no weight has changed is no news.
    """
    return [
        (figure, *(f"{value:+,.{figure.digits}f}" for value in differences[name]))
        for name, figure in FIGURES.items()
        if any(differences.get(name, ()))
    ]


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
            "most_different": [self.first.per_image.names[place] for place in self.most_different],
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
    differences = {}
    for name in (name for name in first.per_image.figures if name in second.per_image.figures):
        values = second.per_image.figures[name] - first.per_image.figures[name]
        better = None
        if name in HIGHER_IS_BETTER:
            better = float(np.mean(values > 0 if HIGHER_IS_BETTER[name] else values < 0))
        interval = list(mean_interval(values)) if len(values) > 1 else []
        differences[name] = Difference(float(values.mean()), interval, better)
    psnr_difference = np.abs(second.per_image.figures["psnr"] - first.per_image.figures["psnr"])
    order = np.argsort(-psnr_difference, kind="stable")[:show]
    return Comparison(first, second, differences, order.tolist())
