"""What makes a convolutional autoencoder fast on a device: the precision, and the memory layout of its group norms."""

from __future__ import annotations

import torch
from torch import nn


def fast_dtype(device: torch.device) -> torch.dtype:
    """torch.bfloat16 where `device` multiplies it in hardware, else torch.float32.

    That is a GPU of NVIDIA's from compute capability 8.0 on, any of AMD's that torch's ROCm build knows as such, and a
    CPU with AVX512-BF16, which every CPU with AMX has, too.
    """
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        supported = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if supported else torch.float32


def speed_up_norms(model: nn.Module) -> nn.Module:
    """The same `model`, whose group norms make their input contiguous on a CPU where it is not float32.

    Convolutions of one channel and attention give channels-last tensors, for which torch's group norm in bfloat16 takes
    up to twenty times as long: benchmarks/RESULTS.md.
    """
    for module in model.modules():
        if isinstance(module, nn.GroupNorm) and _contiguous not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_contiguous)
    return model


def _contiguous(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    (images,) = inputs
    return (images.contiguous(),) if images.device.type == "cpu" and images.dtype != torch.float32 else inputs
