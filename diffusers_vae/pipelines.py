"""Stock pipelines around a trained VAE: how each scales latents, and whether a VAE fits one."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import nn

from .models import MLPVAE, VAE, LatentScaling, compression_ratio, unmeasured, with_whole_tiles, without_adapters
from .models.stock import AutoencoderKL


@dataclass(frozen=True)
class _Stock:
    """What a stock pipeline reads from its VAE's config besides scaling_factor, and how its denoiser takes latents."""

    denoiser: str  # unet or transformer
    use_shift: bool = False  # shift_factor counts; None is an error in the pipeline
    per_channel: bool = False  # latents_mean and latents_std count, and must have 4 channels
    packing: int = 1  # side of the square of latents that the denoiser takes as one position
    task: str = ""  # Img2Img, Inpaint, or empty: generates from noise

    def inputs(self, latent_channels: int) -> list[int]:
        """Return the possible `in_channels` of the denoiser. Inpainting may add a mask and masked latents."""
        masked = self.task == "Inpaint" and self.packing == 1
        return [latent_channels * self.packing**2] + [2 * latent_channels + 1] * masked


def _tasks(family: str, **settings: Any) -> dict[str, _Stock]:
    return {f"{family}{task}Pipeline": _Stock(task=task, **settings) for task in ("", "Img2Img", "Inpaint")}


STOCK = {
    **_tasks("StableDiffusion", denoiser="unet"),
    **_tasks("StableDiffusionXL", denoiser="unet", per_channel=True),
    **_tasks("StableDiffusion3", denoiser="transformer", use_shift=True),
    **_tasks("Flux", denoiser="transformer", use_shift=True, packing=2),
    "DiTPipeline": _Stock("transformer"),
}
"""Taken from the sources of diffusers 0.36 and 0.42; the tests compare it with the installed version. Two pipelines are
inconsistent: StableDiffusionXLInpaintPipeline ignores latents_mean and latents_std when it encodes, and
StableDiffusion3InpaintPipeline ignores shift_factor when it decodes. The values are those that their denoisers are
trained with."""


def latent_scaling(
    pipeline: DiffusionPipeline | type[DiffusionPipeline] | str, vae: VAE | AutoencoderKL
) -> LatentScaling:
    """Return the scaling that a stock pipeline applies to the latents of `vae`. Its denoiser must be trained with it.

    Stable Diffusion and DiT multiply by scaling_factor. So does Stable Diffusion XL, unless the config has latents_mean
    and latents_std, which it applies instead. Stable Diffusion 3 and FLUX subtract shift_factor first.

    Args:
        pipeline: A pipeline, a stock class or one derived from it, or the name of a stock class.
        vae: The VAE whose config is read.

    Raises:
        TypeError: If `vae` is neither a `VAE` nor a stock `AutoencoderKL`.
        ValueError: If the pipeline is unknown or cannot run with this config, or the scaling_factor was neither
            measured nor published.
    """
    _check_class(vae)
    name, stock = _look_up(pipeline)
    for problem in _not_computable(name, stock, vae):
        raise ValueError(problem)
    return LatentScaling.from_config(vae.config, stock.use_shift, stock.per_channel)


def swap_vae(pipeline: DiffusionPipeline, vae: VAE | AutoencoderKL) -> DiffusionPipeline:
    """Replace the VAE of a pipeline with a copy of `vae` as a stock `AutoencoderKL`. The saved pipeline loads without
    this package.

    The latents must have the number of channels that the denoiser expects. They must also match the old VAE in size,
    image channels and the scaling that this pipeline applies (`latent_scaling`). No check can detect whether the
    latents mean the same: a VAE that was not fine-tuned from the old one needs a denoiser trained on its latents. Load
    the pipeline of such a denoiser with `vae=None`: without an old `AutoencoderKL`, only the denoiser's channels are
    checked.

    The copy takes the device and dtype of the old VAE (or else of the denoiser), eval mode, and the old VAE's slicing,
    tiling and fused projections. It keeps its config, including force_upcast, except that a sample_size below 256
    becomes 256, because stock uses it as the tile size. `vae` itself does not change.

    Args:
        pipeline: A Stable Diffusion, Stable Diffusion XL, Stable Diffusion 3 or FLUX pipeline (text to image, image to
            image or inpainting), a DiT pipeline, or an instance of a derived class.
        vae: A VAE trained with or without this package.

    Raises:
        TypeError: If `pipeline` is not a pipeline, or `vae` neither a `VAE` nor a stock `AutoencoderKL`.
        ValueError: If the pipeline is unknown, or with a list of every mismatch. The pipeline is then unchanged.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        raise TypeError(f"swap_vae takes a pipeline object of diffusers, got {pipeline!r}")
    _check_class(vae)
    name, stock = _look_up(pipeline)
    old, denoiser = (getattr(pipeline, component, None) for component in ("vae", stock.denoiser))
    reference = next(module for module in (old, denoiser, vae) if module is not None)
    problems = [*_offloaded(pipeline, old, vae), *_misfits(name, stock, vae, old, denoiser)]
    problems += _not_computable(name, stock, vae, reference.dtype)
    if problems:
        raise ValueError("\n- ".join([f"the VAE does not fit this {name}:", *problems]))

    new = without_adapters(vae) if getattr(vae, "peft_config", None) else copy.deepcopy(vae)
    new = with_whole_tiles(new.to_diffusers() if isinstance(new, VAE) else new).to(reference.device).eval()
    if new.dtype != reference.dtype:  # diffusers warns of a cast even where there is none
        new.to(reference.dtype)
    new.use_slicing |= getattr(old, "use_slicing", False)
    new.use_tiling |= getattr(old, "use_tiling", False)
    if getattr(pipeline, "fusing_vae", False):
        new.fuse_qkv_projections()
    pipeline.register_modules(vae=new)
    # the constructors derive these from the VAE; they change only if there was none before
    ratio = compression_ratio(new.config.block_out_channels)
    derived = {"vae_scale_factor": ratio, "latent_channels": new.config.latent_channels}
    for attribute, value in derived.items():
        if hasattr(pipeline, attribute):
            setattr(pipeline, attribute, value)
    for processor in (getattr(pipeline, name, None) for name in ("image_processor", "mask_processor")):
        if processor is not None:
            processor.register_to_config(vae_scale_factor=ratio * stock.packing)
            if stock.use_shift and stock.task:  # the others leave it at 4
                processor.register_to_config(vae_latent_channels=new.config.latent_channels)
    return pipeline


def _check_class(vae: VAE | AutoencoderKL) -> None:
    if isinstance(vae, VAE) or type(vae) is AutoencoderKL:
        return
    reason = "stock pipelines read the config of these two classes only, and load them without other code"
    inside = vae.modules() if isinstance(vae, nn.Module) else ()
    if any(isinstance(each, (VAE, AutoencoderKL)) and each is not vae for each in inside):
        reason = "pass the model inside (compile it afterwards; of a PeftModel, pass merge_and_unload())"
    if isinstance(vae, MLPVAE):
        reason = "its latents are not spatial, and diffusers has no such class, so no stock pipeline can use or load it"
    raise TypeError(
        f"the VAE must be a diffusers_vae.VAE or diffusers' AutoencoderKL, got {type(vae).__name__}: {reason}"
    )


def _look_up(pipeline: DiffusionPipeline | type[DiffusionPipeline] | str) -> tuple[str, _Stock]:
    """Return the name of the stock class and its entry in `STOCK`."""
    kind = pipeline if isinstance(pipeline, (str, type)) else type(pipeline)
    names = [kind] if isinstance(kind, str) else [each.__name__ for each in kind.__mro__]
    for name in names:
        if name in STOCK:
            return name, STOCK[name]
    raise ValueError(f"cannot determine how {names[0]} scales latents; supported are {', '.join(STOCK)}")


def _not_computable(
    name: str, stock: _Stock, vae: VAE | AutoencoderKL, dtype: torch.dtype | None = None
) -> Iterator[str]:
    """Yield why the pipeline would fail with this VAE in `dtype`, or in any dtype if None."""
    config: Any = vae.config
    if reason := unmeasured(config):
        yield reason
    if stock.use_shift and config.shift_factor is None:
        yield (
            f"shift_factor: the VAE has None, and {name} subtracts it; vae.register_to_config(shift_factor=...) sets "
            "it to what the denoiser is trained with, 0.0 for latents that are not shifted"
        )
    mean, std = config.latents_mean, config.latents_std
    by_channel = stock.per_channel and None not in (mean, std)
    if by_channel and not len(mean) == len(std) == config.latent_channels == 4:
        yield (
            f"latents_mean and latents_std: {name} takes them for 4 channels only, and the VAE has "
            f"{config.latent_channels} channels, {len(mean)} means and {len(std)} stds; "
            "vae.register_to_config(latents_mean=None, latents_std=None) scales by scaling_factor alone"
        )
    if stock.per_channel and dtype == torch.float16 and config.force_upcast and not config.use_post_quant_conv:
        yield (
            f"force_upcast: the VAE has True, and no post_quant_conv, which {name} in float16 then looks for; use "
            "bfloat16 or, if the VAE works in float16, vae.register_to_config(force_upcast=False)"
        )


def _offloaded(pipeline: DiffusionPipeline, old: nn.Module | None, vae: nn.Module) -> Iterator[str]:
    """Yield the offloading hooks of the pipeline: a VAE that is added later would have none."""

    def hooked(module: nn.Module) -> bool:
        return any(hasattr(each, "_hf_hook") or hasattr(each, "_diffusers_hook") for each in module.modules())

    if pipeline.hf_device_map or getattr(pipeline, "_all_hooks", []) or (old is not None and hooked(old)):
        yield (
            "offloading: the pipeline moves its components between devices (device_map, enable_model_cpu_offload and "
            "the like); swap the VAE first, in a pipeline that was just loaded, and enable it then"
        )
    if hooked(vae) or any(weight.is_meta for weight in vae.parameters()):
        yield "offloading: the weights of the VAE are not in memory; load it without device_map or offloading"


def _misfits(
    name: str, stock: _Stock, vae: VAE | AutoencoderKL, old: nn.Module | None, denoiser: nn.Module | None
) -> Iterator[str]:
    """Yield each mismatch between the VAE and the denoiser, or the old VAE that the denoiser was trained with."""
    channels = vae.config.latent_channels
    compared = isinstance(old, (VAE, AutoencoderKL))
    taken: Any = None if denoiser is None else cast(Any, denoiser).config.in_channels
    if denoiser is not None and taken not in stock.inputs(channels):
        expected = " or ".join(map(str, stock.inputs(channels)))
        fitting = [each for each in range(1, taken + 1) if taken in stock.inputs(each)]
        yield (
            f"latent channels: the VAE has {channels}, for which the {stock.denoiser} must take {expected} channels, "
            f"and it takes {taken}; train the VAE with model.latent_channels "
            f"{' or '.join(map(str, fitting))}, or take another {stock.denoiser}"
        )
    elif compared and channels != old.config.latent_channels:
        yield (
            f"latent channels: the VAE has {channels}, the old one {old.config.latent_channels}; train the VAE with "
            f"model.latent_channels {old.config.latent_channels}"
        )
    if not compared:
        return
    ratio, old_ratio = (compression_ratio(each.config.block_out_channels) for each in (vae, old))
    if ratio != old_ratio:
        yield (
            f"spatial compression ratio: the VAE has {ratio}, the old one {old_ratio}; train the VAE with "
            f"{len(old.config.block_out_channels)} widths in model.block_out_channels"
        )
    for key in ("in_channels", "out_channels"):
        if vae.config[key] != old.config[key]:
            yield (
                f"image channels, {key}: the VAE has {vae.config[key]}, the old one {old.config[key]}; train the VAE "
                "on such images (data.channels)"
            )
    for key, value in _applied(stock, vae).items():
        old_value = _applied(stock, old)[key]
        if not _close(value, old_value):
            yield (
                f"{key}: the VAE has {value}, the old one, with which the denoiser was trained, {old_value}; if the "
                f"VAE was fine-tuned from the old one, vae.register_to_config({key}={old_value}); if the denoiser was "
                "trained on the new latents, load the pipeline with vae=None before"
            )


def _applied(stock: _Stock, vae: VAE | AutoencoderKL) -> dict[str, float | list[float] | None]:
    """Return the config keys that the pipeline applies to the latents, with their values."""
    config = vae.config
    applied: dict[str, float | list[float] | None] = {"scaling_factor": config.scaling_factor}
    if stock.use_shift:
        applied["shift_factor"] = config.shift_factor
    if stock.per_channel:
        both = config.latents_mean is not None and config.latents_std is not None
        applied |= {key: list(config[key]) if both else None for key in ("latents_mean", "latents_std")}
    return applied


def _close(a: float | list[float] | None, b: float | list[float] | None) -> bool:
    """Return whether two config values are equal in float32 precision."""
    if a is None or b is None:
        return a is b
    first, second = (each if isinstance(each, list) else [each] for each in (a, b))
    return len(first) == len(second) and all(map(partial(math.isclose, rel_tol=1e-6), first, second))
