"""Autoencoders in one file, with the parameter names of the latent-diffusion repository, as first published."""

from __future__ import annotations

import logging
import math
import re
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    CHECKPOINT_KEY_NAMES,
    convert_ldm_vae_checkpoint,
    infer_diffusers_model_type,
)
from safetensors import SafetensorError, safe_open

from ..messages import showable
from ..untrusted import check_type, load_pickle, read_json
from .vae import VAE

logger = logging.getLogger(__name__)

SAFE = (".safetensors", ".sft")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
WHOLE = ("first_stage_model.", "vae.")
"""Prefixes of the autoencoder's weights in full checkpoints of the original repositories and of ComfyUI."""
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
FIRST = "encoder.conv_in.weight"
STATED = {
    "scaling_factor": float | None,
    "shift_factor": float | None,
    "latents_mean": list[float] | None,
    "latents_std": list[float] | None,
}
"""Keys that are read from NAME.json beside NAME.safetensors."""

# From the config.json of each model's VAE on the Hub, by diffusers' names of the models.
_SD = {"scaling_factor": 0.18215, "sample_size": 512}
_SDXL = {"scaling_factor": 0.13025, "sample_size": 1024}
_SD3 = {"scaling_factor": 1.5305, "shift_factor": 0.0609, "sample_size": 1024}
_FLUX = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "sample_size": 1024}
_PUBLISHED = {
    **dict.fromkeys(("v1", "v2", "inpainting", "inpainting_v2"), _SD),
    **dict.fromkeys(("xl_base", "xl_refiner", "xl_inpaint"), _SDXL),
    **dict.fromkeys(("sd3", "sd35_medium", "sd35_large"), _SD3),
    **dict.fromkeys(("flux-dev", "flux-schnell", "flux-fill", "flux-depth", "chroma"), _FLUX),
}
_ARCHITECTURES = (
    (r"stable-diffusion-v[12]\b", 4, _SD),
    (r"stable-diffusion-xl\b", 4, _SDXL),
    (r"stable-diffusion-v?3\b", 16, _SD3),
    (r"flux[.-]1\b", 16, _FLUX),
)
"""Prefix of `modelspec.architecture` in the metadata (github.com/Stability-AI/ModelSpec), latent channels, and
values."""


def load_single_file(path: Path, dtype: torch.dtype = torch.float32) -> VAE:
    """Load the VAE of an original checkpoint in eval mode, with weights of `dtype`. Its scaling_factor is None, with a
    warning, if neither the file nor NAME.json beside it states one. ValueError if the file is unreadable or holds no KL
    autoencoder of images.
    """
    config, weights = read_single_file(path)
    with torch.device("meta"):
        vae = VAE.from_config(config)
    weights = {
        name: tensor.to(dtype, copy=True) for name, tensor in weights.items()
    }  # copy, because the file is mapped
    try:
        vae.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds no KL autoencoder that diffusers' AutoencoderKL can represent: {error}"
        ) from error
    if config["scaling_factor"] is None:
        channels = config["latent_channels"]
        examples = {
            4: '{"scaling_factor": 0.18215} for Stable Diffusion 1 and 2, {"scaling_factor": 0.13025} for SDXL',
            16: '{"scaling_factor": 1.5305, "shift_factor": 0.0609} for Stable Diffusion 3, {"scaling_factor": 0.3611, '
            '"shift_factor": 0.1159} for FLUX.1',
        }
        example = f": {examples[channels]}" if channels in examples else ""
        logger.warning(
            f"{showable(path)} does not state the scaling_factor of its model, which is null from here on. Encoding "
            "and decoding do not need it, but diffusion pipelines do. If you know it, write it to "
            f"{showable(path.with_suffix('.json'))}{example}"
        )
    return vae.eval()


def read_single_file(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the config and weights of the VAE in `path`, with diffusers' names. scaling_factor is None if it is not
    stated. ValueError if the file is unreadable or holds no KL autoencoder of images.
    """
    tensors, metadata = _read(path)
    prefix = _prefix(path, tensors)
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(tuple(prefix + part for part in PARTS))
    }
    if complaint := _complaint(tensors, prefix, weights):
        raise ValueError(f"{path} holds no KL autoencoder under the names of latent-diffusion: {complaint}")

    levels = len({name.split(".")[2] for name in weights if name.startswith("encoder.down.")})
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    weights = convert_ldm_vae_checkpoint(weights, blocks)
    layers = {name.split(".")[4] for name in weights if name.startswith("encoder.down_blocks.0.resnets.")}
    widths = tuple(weights[f"encoder.down_blocks.{n}.resnets.0.conv1.weight"].shape[0] for n in range(levels))
    config: dict[str, Any] = {
        **blocks,
        "_class_name": "AutoencoderKL",
        "in_channels": weights[FIRST].shape[1],
        "out_channels": weights["decoder.conv_out.weight"].shape[0],
        "latent_channels": weights["decoder.conv_in.weight"].shape[1],
        "block_out_channels": widths,
        "layers_per_block": len(layers),
        "norm_num_groups": 32,  # fixed in the code of latent-diffusion
        "sample_size": 512,  # the tile size, if the model is unknown
        "scaling_factor": None,
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in weights,
    }
    if odd := [width for width in widths if width % 32]:
        raise ValueError(f"{path}: widths of latent-diffusion's autoencoders must be divisible by 32, got {odd[0]}")
    config |= _of_its_model(tensors, prefix, metadata, config["latent_channels"])
    return config | _stated(path, config), weights


def _of_its_model(
    tensors: dict[str, torch.Tensor], prefix: str, metadata: dict[str, str], channels: int
) -> dict[str, Any]:
    """Return config values implied by other tensors or the metadata; empty if they identify no known model."""
    root = prefix
    for part in WHOLE:
        root = root.removesuffix(part)
    tensors = {name.removeprefix(root): tensor for name, tensor in tensors.items() if name.startswith(root)}
    model = None
    with suppress(IndexError, KeyError):  # a tensor has the name of a known model's, and another shape
        model = infer_diffusers_model_type(tensors)
    if model == "v1" and CHECKPOINT_KEY_NAMES["v1"] not in tensors:  # diffusers' default for unknown models
        model = None
    architecture = metadata.get("modelspec.architecture", "").lower()
    named = (of for start, of_latents, of in _ARCHITECTURES if of_latents == channels and re.match(start, architecture))
    found = _PUBLISHED.get(model or "") or next(named, {})
    factor = tensors.get("scale_factor")  # latent-diffusion measures it with scale_by_std
    if factor is None or factor.numel() != 1 or not factor.is_floating_point() or factor.is_meta:
        return found
    return found | ({"scaling_factor": factor.item()} if 0 < factor.item() < math.inf else {})


def _stated(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the scaling that NAME.json beside NAME.safetensors states; ValueError for a wrong type or model."""
    file = path.with_suffix(".json")
    if not file.is_file():
        return {}
    stated = read_json(file)
    check_type(stated, dict, str(file))
    scaling = {name: value for name, value in stated.items() if name in STATED}
    check_type(scaling, {name: STATED[name] for name in scaling}, str(file))
    if scaling.get("scaling_factor", 1) == 0:
        raise ValueError(f"{file}: scaling_factor must be a number other than 0, got 0")
    for name in ("latent_channels", "block_out_channels", "in_channels") if scaling else ():
        expected = list(config[name]) if name == "block_out_channels" else config[name]
        if stated.get(name, expected) != expected:
            raise ValueError(
                f"{file} must describe the model in {path.name}, whose {name} is {expected}, got {stated[name]!r:.60}"
            )
    return scaling


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return all tensors of the file by name, dotted for nested dicts, and its metadata. In .safetensors, only tensors
    of the autoencoder have content.
    """
    if path.suffix.lower() in SAFE:
        try:
            with safe_open(path, "pt", device="cpu") as file:
                names = list(file.keys())
                wanted = tuple(start + part for start in _starts(names) for part in PARTS)
                tensors = {
                    name: file.get_tensor(name)
                    if name.startswith(wanted) or name.rpartition(".")[2] == "scale_factor"
                    else torch.empty(file.get_slice(name).get_shape(), device="meta")
                    for name in names
                }
                return tensors, file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file, or is truncated: {error}") from error
    if path.suffix.lower() not in PICKLES:
        raise ValueError(f"an autoencoder in one file must be {', '.join((*SAFE, *PICKLES))}, got {path}")
    # mapped, so that only the autoencoder of a full checkpoint is read
    content = load_pickle(path, mmap=zipfile.is_zipfile(path), foreign=True)
    return _flat(content), {}


def _flat(content: Any, start: str = "", depth: int = 5) -> dict[str, torch.Tensor]:
    """Return the tensors in loaded `content`, and in nested dicts, with names joined by dots."""
    found: dict[str, torch.Tensor] = {}
    for name, value in content.items() if isinstance(content, dict) and depth else ():
        if isinstance(value, torch.Tensor) and isinstance(name, str):
            found[start + name] = value
        elif isinstance(value, dict):
            found |= _flat(value, start if name == "state_dict" else f"{start}{name}.", depth - 1)
    return found


def _starts(names: Iterable[str]) -> list[str]:
    """Return the name prefixes of the autoencoders among `names`, the preferred one first."""

    def rank(start: str) -> tuple[bool, bool, int, str]:
        return (not re.search(r"(^|[._])ema[._]", start), not start.endswith(WHOLE), len(start), start)

    return sorted((name.removesuffix(FIRST) for name in names if f".{name}".endswith(f".{FIRST}")), key=rank)


def _prefix(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Return the name prefix of the autoencoder in a file."""
    starts = _starts(tensors)
    if len(starts) > 1:
        taken, *others = (showable(f"{start}{PARTS[0]}*") for start in starts)
        said = "%s holds several autoencoders: using %s, not %s"
        logger.warning(said, showable(path), taken, ", ".join(others))
    if starts:
        return starts[0]
    return next((start for start in WHOLE if any(name.startswith(start) for name in tensors)), "")


def _complaint(tensors: dict[str, torch.Tensor], prefix: str, weights: dict[str, torch.Tensor]) -> str | None:
    """Return what a file is instead of an autoencoder, or what it lacks."""
    if not tensors:
        return "it holds no named tensors"
    if any(name.startswith(f"{prefix}quantize.") for name in tensors):
        return "it is a VQ-VAE, whose latents are the entries of a codebook"
    if f"{prefix}bn.running_mean" in tensors:
        return (
            "it is an autoencoder of FLUX.2, with a batch norm of the latents (AutoencoderKLFlux2 in diffusers); give "
            "the folder vae of its pipeline"
        )
    if any(".down_blocks." in name or ".up_blocks." in name for name in weights):
        return (
            "its names are those of diffusers, which need the config.json beside them (weights do not determine "
            "the group norms); give the folder that holds both"
        )
    parts = ("encoder.down.0.block.0.conv1", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out")
    needed = [FIRST, *(f"{part}.weight" for part in parts)]
    missing = [name for name in needed if name not in weights]
    if missing and any("lora_" in name or ".lora" in name for name in tensors):
        return "it is a LoRA file, which changes the weights of another model"
    if missing and any("diffusion_model." in name or "time_embed" in name for name in tensors):
        return f"it is a denoiser (U-Net or transformer) without one, and lacks {missing[0]}"
    if missing:
        return f"it lacks {', '.join(missing)}, and begins with {', '.join(list(tensors)[:3])}"
    if weights[FIRST].ndim == 5:
        return "it is an autoencoder of video, with convolutions over time"
    if odd := next((name for name in needed if weights[name].ndim != 4), None):
        return f"{odd} must have 4 dimensions, got the shape {tuple(weights[odd].shape)}"
    if odd := next((name for name, each in weights.items() if not each.is_floating_point() or each.is_meta), None):
        kind = "no values" if weights[odd].is_meta else f"values of the type {weights[odd].dtype}"
        return f"{odd} must hold floating-point values, got {kind}"
    if attention := next((name for name in weights if re.match(r"encoder\.down\.\d+\.attn\.", name)), None):
        return (
            "it has attention at other resolutions than the lowest, as f16 and f32 of latent-diffusion have, "
            f"{attention}, which is not supported"
        )
    if weights["encoder.conv_out.weight"].shape[0] != 2 * weights["decoder.conv_in.weight"].shape[1]:
        return "its encoder does not output a mean and a log-variance per latent channel"
    return None
