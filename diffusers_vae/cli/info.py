"""`info`: describes a model or a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from diffusers import AutoencoderKLFlux2

from ..evaluation.report import read_report
from ..messages import quoted, showable
from ..models import VAE, LatentScaling, Source, unmeasured, weights_hash
from ..models.stock import ModelMixin
from ..pipelines import latent_scaling
from ..reports.tables import report_table
from .arguments import MODEL, add_source, latent_shape, parse, size_of
from .parser import command_parser


def run_info(arguments: Sequence[str]) -> int:
    """Describe a model, and the evaluation of its run."""
    parser = command_parser(
        "info",
        "MODEL",
        "Describe a model: class, size, latents and how to load it; for a run, also its figures.",
        "diffusers-vae info runs/digits",
    )
    parser.add_argument("model", help=MODEL)
    add_source(parser)
    parsed = parse(parser, arguments)
    source = Source(parsed.model, parsed.subfolder, parsed.revision)
    model = source.model()
    config, shape = model.config, latent_shape(model)
    height, width = size_of(model)
    name = "AutoencoderKL" if isinstance(model, VAE) else type(model).__name__
    facts = {
        "class": name,
        "load it": _load_line(name, source),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "images": f"{config.in_channels}x{height}x{width}" + ("" if "image_size" in config else " or other sizes"),
        "latents": f"{'x'.join(map(str, shape))}, {height // shape[1]} times smaller per side",
        **_scaled_latents(model),
        "weights": f"SHA-256 {weights_hash(model)}",
    }
    if stated := source.value_range():
        facts["values"] = f"in files {stated}, mapped to [-1, 1]"
    print("\n".join(showable(f"{name:<16}{value}") for name, value in facts.items()))
    evaluation = Path(parsed.model) / "evaluation.json"
    if evaluation.exists():
        print(report_table(json.loads(read_report(evaluation).to_json())))
    return 0


def _load_line(name: str, source: Source) -> str:
    """Return code that loads the model, of the class `name`, from any working directory."""
    path = Path(source.name)
    if path.is_file():
        return (
            f"from diffusers_vae.models import load_autoencoder; vae = load_autoencoder({quoted(str(path.absolute()))})"
        )
    location, further = source.name, {"subfolder": source.inside, "revision": source.revision}
    if path.exists():
        location, further = str(path.absolute() / (source.inside or "")), {}
    options = "".join(f", {key}={quoted(value)}" for key, value in further.items() if value)
    package = "diffusers_vae" if name == "MLPVAE" else "diffusers"
    return f"from {package} import {name}; vae = {name}.from_pretrained({quoted(location)}{options})"


def _scaled_latents(model: ModelMixin) -> dict[str, str]:
    """Return the formula for scaled latents, and the formulas of stock pipelines that differ from it."""
    config = model.config
    if isinstance(model, AutoencoderKLFlux2):
        formula = f"(patches - vae.bn.running_mean) / sqrt(vae.bn.running_var + {config.batch_norm_eps:g})"
        return {"scaled latents": f"{formula}, per channel of the patches; each 2x2 square of latents is one patch"}
    if unmeasured(config):
        factor = config.get("scaling_factor")
        return {"scaled latents": f"unknown: scaling_factor {factor} was not measured or published for this model"}
    formula = _formula(LatentScaling.from_config(config))
    others: dict[str, list[str]] = {}
    for name, pipeline in PIPELINES.items():
        try:
            other = _formula(latent_scaling(pipeline, cast(VAE, model)))
        except (TypeError, ValueError):  # the pipeline cannot scale with this config
            continue
        if other != formula:
            others.setdefault(other, []).append(name)
    listed = "; ".join(f"{', '.join(names)}: {other}" for other, names in others.items())
    return {"scaled latents": formula} | ({"in pipelines of": listed} if listed else {})


PIPELINES = {
    "Stable Diffusion": "StableDiffusionPipeline",
    "SDXL": "StableDiffusionXLPipeline",
    "Stable Diffusion 3": "StableDiffusion3Pipeline",
    "FLUX.1": "FluxPipeline",
    "DiT": "DiTPipeline",
}
"""One pipeline of each family. All pipelines of a family scale latents in the same way."""


def _formula(scaling: LatentScaling) -> str:
    if scaling.mean is None or scaling.std is None:
        shifted = f"(latents {-scaling.shift:+.6g})" if scaling.shift else "latents"
        return f"{shifted} * {scaling.factor:.6g}"
    mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (scaling.mean, scaling.std))
    return f"(latents - mean) * {scaling.factor:.6g} / std, per channel: mean {mean}; std {std}"
