"""Low-rank adapters on the decoder, through PEFT: trained instead of its weights, and merged into them afterwards."""

from __future__ import annotations

from torch import nn

from .vae import VAE


def add_lora(vae: VAE, rank: int) -> None:
    """Freeze `vae` and add adapters of this rank to the convolutions and attention of its decoder: LoRA, Hu et al.
    2021, W + B A with B = 0 at first, so that nothing changes before training. ImportError without peft.

    `vae.save_lora_adapter(folder)` saves them alone, for `load_lora_adapter(folder, prefix=None, use_safetensors=True)`
    of a stock `AutoencoderKL`.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("model.lora_rank needs PEFT: pip install peft") from error
    layers = vae.decoder.named_modules(prefix="decoder")
    adapted = [name for name, layer in layers if isinstance(layer, (nn.Conv2d, nn.Linear))]
    vae.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=adapted))  # which freezes all else
