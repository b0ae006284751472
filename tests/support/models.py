"""Small models and pipelines with random weights."""

import json
import re

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel

from diffusers_vae import VAE

TINY = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "sample_size": 16,
}


def same(one, other):
    """Whether two state dicts have the same names and equal tensors."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def original_name(key, levels):
    """The latent-diffusion name of a diffusers key."""
    for pattern, replacement in (
        (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d)\.resnets", lambda match: f"up.{levels - 1 - int(match[1])}.block"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda match: f"up.{levels - 1 - int(match[1])}.upsample"),
        (r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_(q|k|v)", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
    ):
        key = re.sub(pattern, replacement, key)
    return key


def make_pipeline(vae, folder):
    """A StableDiffusionPipeline with random weights, saved to `folder` and loaded from there with `vae` in it."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    (folder / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokens = {"vocab_size": 3, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 8}
    layers = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    widths = {"block_out_channels": (8,), "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 4}
    StableDiffusionPipeline(
        vae=AutoencoderKL(**TINY),
        text_encoder=CLIPTextModel(CLIPTextConfig(**tokens, **layers)),
        tokenizer=CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8),
        unet=UNet2DConditionModel(sample_size=8, layers_per_block=1, **blocks, **widths),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "before")
    return DiffusionPipeline.from_pretrained(folder / "before", vae=vae.to_diffusers())


def original(stock):
    """The weights of a stock model as latent-diffusion's `AutoencoderKL` names them: one up block per level, counted
    from the highest resolution, and 1x1 convolutions in the attention.
    """
    levels, state = len(stock.config.block_out_channels), {}
    for key, tensor in stock.state_dict().items():
        name = original_name(key, levels)
        attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        state[name] = (tensor[:, :, None, None] if attention else tensor).clone()
    return state


def tiny_vae(channels=1, **settings):
    torch.manual_seed(0)
    return VAE(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        **settings,
    ).eval()


def make_vae(seed: int = 0) -> VAE:
    torch.manual_seed(seed)
    return VAE(
        in_channels=1,
        out_channels=1,
        latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        scaling_factor=2.5,
        shift_factor=-0.05,
    )


def hooks_of(model: torch.nn.Module) -> list[object]:
    """All forward hooks of a model's modules, under the names that torch 2.14 keeps them by."""
    return [
        hook
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in hooks.values()
    ]
