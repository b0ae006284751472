"""Autoencoders in one file, under the names of the latent-diffusion repository, as they were first published."""

from __future__ import annotations

import logging
import re
import zipfile
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
from ..untrusted import load_pickle
from .vae import VAE

logger = logging.getLogger(__name__)

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
PREFIXES = ("first_stage_model.", "vae.", "")  # whole checkpoints, those of ComfyUI, autoencoders alone
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")

# From the config.json of the VAE of each model on the Hub, as diffusers names the models. A file holds none of this.
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


def load_single_file(path: Path, dtype: torch.dtype = torch.float32) -> VAE:
    """The VAE in an original checkpoint, with weights of `dtype`, in eval mode.

    Logs a warning when the file does not tell which model it is of, and so not its scaling factor.

    Raises:
        ValueError: when the file cannot be read, or holds no KL autoencoder of images.
    """
    config, weights = read_single_file(path)
    with torch.device("meta"):
        vae = VAE.from_config(config)
    weights = {name: tensor.to(dtype, copy=True) for name, tensor in weights.items()}  # off the mapped file
    try:
        vae.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path} holds no KL autoencoder that diffusers' AutoencoderKL could be: {error}") from error
    if "scaling_factor" not in config:
        logger.warning(
            "%s does not tell its scaling_factor: its config keeps %s, that of Stable Diffusion 1 and 2 (%s). Encoding "
            "and decoding do not use it, pipelines do: set the right one with "
            "vae.register_to_config(scaling_factor=..., shift_factor=...)",
            showable(path),
            vae.config.scaling_factor,
            "with 16 channels, Stable Diffusion 3 has 1.5305 and the shift 0.0609, Flux 0.3611 and 0.1159"
            if vae.config.latent_channels == 16
            else "SDXL has 0.13025",
        )
    return vae.eval()


def read_single_file(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config, without the keys that the file does not tell, and weights, in diffusers' names, of the VAE in `path`.

    Raises:
        ValueError: when the file cannot be read, or holds no KL autoencoder of images.
    """
    tensors = _read(path)
    prefix = next(prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in tensors) or not prefix)
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(tuple(prefix + part for part in PARTS))
    }
    if complaint := _complaint(tensors, prefix, weights):
        raise ValueError(f"{path} holds no KL autoencoder under the names of latent-diffusion: {complaint}")

    levels = len({name.split(".")[2] for name in weights if name.startswith("encoder.down.")})
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    weights = convert_ldm_vae_checkpoint(weights, blocks)
    first = "encoder.down_blocks.{}.resnets.0.conv1.weight"
    layers = {name.split(".")[4] for name in weights if name.startswith("encoder.down_blocks.0.resnets.")}
    config = {
        **blocks,
        "_class_name": "AutoencoderKL",
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": weights["decoder.conv_out.weight"].shape[0],
        "latent_channels": weights["decoder.conv_in.weight"].shape[1],
        "block_out_channels": tuple(weights[first.format(level)].shape[0] for level in range(levels)),
        "layers_per_block": len(layers),
        "norm_num_groups": 32,  # in the code of latent-diffusion, whatever the widths
        "sample_size": 512,  # the tile size, where no model is known
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in weights,
    }
    if odd := [width for width in config["block_out_channels"] if width % 32]:
        raise ValueError(f"{path}: the widths of latent-diffusion's autoencoders are divisible by 32, got {odd[0]}")
    model = infer_diffusers_model_type(tensors)
    if model == "v1" and CHECKPOINT_KEY_NAMES["v1"] not in tensors:  # diffusers' answer to whatever it does not know
        return config, weights
    return config | _PUBLISHED.get(model, {}), weights


def _read(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of the file; of .safetensors, without their content where they are not of an autoencoder."""
    if path.suffix == ".safetensors":
        wanted = tuple(prefix + part for prefix in PREFIXES for part in PARTS)
        try:
            with safe_open(path, "pt", device="cpu") as file:
                return {
                    name: file.get_tensor(name)
                    if name.startswith(wanted)
                    else torch.empty(file.get_slice(name).get_shape(), device="meta")
                    for name in file.keys()  # noqa: SIM118 it is no mapping
                }
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file, or was cut off: {error}") from error
    if path.suffix not in PICKLES:
        raise ValueError(f"an autoencoder in one file must be .safetensors or {', '.join(PICKLES)}, got {path}")
    # mapped, so that of a whole checkpoint only the autoencoder is read
    content = load_pickle(path, mmap=zipfile.is_zipfile(path))
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}


def _complaint(tensors: dict[str, torch.Tensor], prefix: str, weights: dict[str, torch.Tensor]) -> str | None:
    """What a file is instead, or lacks."""
    if not tensors:
        return "it holds no tensors by name"
    if any(name.startswith(f"{prefix}quantize.") for name in tensors):
        return "it is a VQ-VAE, whose latents are the entries of a codebook"
    if any(".down_blocks." in name or ".up_blocks." in name for name in weights):
        return (
            "its names are those of diffusers, which need the config.json beside them (group norms cannot be told from "
            "the weights); give the folder that holds both"
        )
    needed = [
        "encoder.conv_in.weight",
        "encoder.down.0.block.0.conv1.weight",
        "encoder.conv_out.weight",
        "decoder.conv_in.weight",
        "decoder.conv_out.weight",
    ]
    missing = [name for name in needed if name not in weights]
    if missing and any("lora_" in name or ".lora" in name for name in tensors):
        return "it is a LoRA file, which changes the weights of another model"
    if missing and any("diffusion_model." in name or "time_embed" in name for name in tensors):
        return f"it is a denoiser (U-Net or transformer) without one, and lacks {missing[0]}"
    if missing:
        return f"it lacks {', '.join(missing)}, and begins with {', '.join(list(tensors)[:3])}"
    if weights["encoder.conv_in.weight"].ndim != 4:
        return "it is an autoencoder of video, with convolutions over time"
    if attention := next((name for name in weights if re.match(r"encoder\.down\.\d+\.attn\.", name)), None):
        return (
            "it has attention at other resolutions than the lowest, as f16 and f32 of latent-diffusion have, "
            f"{attention}, which is not supported"
        )
    if weights["encoder.conv_out.weight"].shape[0] != 2 * weights["decoder.conv_in.weight"].shape[1]:
        return "its encoder does not give a mean and a log-variance for each channel of the latents"
    return None
