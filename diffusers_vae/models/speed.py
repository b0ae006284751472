"""What makes a convolutional autoencoder fast on a device: the precision, the memory layout of its group norms, and how
a CPU's threads are used."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import torch
from torch import nn

from .stock import ModelMixin

T = TypeVar("T")
U = TypeVar("U")
SMALL = 1024
"""Positions in a feature map below which torch's group norm in bfloat16 is slow for channels-last input on a CPU."""


def fast_dtype(device: torch.device) -> torch.dtype:
    """torch.bfloat16 where `device` multiplies it in hardware, else torch.float32.

    That is a GPU of NVIDIA's from compute capability 8.0 on, any of AMD's that torch's ROCm build knows as such, and a
    CPU with AVX512-BF16, which every CPU with AMX has, too.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        supported = device.type == "cpu" and _has_avx512_bf16()
    return torch.bfloat16 if supported else torch.float32


def _has_avx512_bf16() -> bool:
    cpu: Any = torch.cpu
    return cpu._is_avx512_bf16_supported()  # as torch 2.7 to 2.14 name it


def _has_hook(module: Any) -> bool:
    return _contiguous in module._forward_pre_hooks.values()  # as torch 2.7 to 2.14 name them


def speed_up_norms(model: nn.Module) -> nn.Module:
    """The same `model`, whose group norms make their input contiguous on a CPU where it is not float32.

    Convolutions of one channel and attention give channels-last tensors, for which torch's group norm in bfloat16 takes
    up to twenty times as long: benchmarks/RESULTS.md.
    """
    for module in model.modules():
        if isinstance(module, nn.GroupNorm) and not _has_hook(module):
            module.register_forward_pre_hook(_contiguous)
    return model


def _contiguous(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    (images,) = inputs
    return (images.contiguous(),) if images.device.type == "cpu" and images.dtype != torch.float32 else inputs


def several_at_once(
    function: Callable[[T], U], items: Iterable[T], device: torch.device, most: int
) -> Iterator[tuple[T, U]]:
    """Each of the items with `function` of it, in their order; without gradients.

    On a CPU, at most `most` at a time, which share torch's threads: several threads in one convolution of a small
    feature map wait for each other. An error comes in its item's turn; like an interruption, it waits for those in
    work.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    each = math.ceil(threads / most)
    workers = threads // each

    @torch.no_grad()  # which holds for one thread alone
    def work(item: T) -> tuple[T, U]:
        return item, function(item)

    if workers == 1:
        yield from map(work, items)
        return
    waiting = deque()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(each,))
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        try:
            pool.shutdown(cancel_futures=True)
        finally:
            torch.set_num_threads(threads)  # of the threads that are yet to come, too


def for_inference(model: ModelMixin, dtype: torch.dtype) -> ModelMixin:
    """`model` as it encodes and decodes fast in `dtype`: itself, or a copy whose weights are cast once, where autocast
    would cast them at every call.

    In bfloat16 on a CPU, convolutions of the copy are channels-last, which spares each two copies of its output, and
    group norms of small feature maps are not.
    """
    channels_last = model.device.type == "cpu" and dtype == torch.bfloat16
    if model.dtype == dtype and not channels_last:
        return model
    fast = nn.Module.to(copy.deepcopy(model), dtype)  # that of diffusers warns, whatever the model
    if channels_last:
        for module in fast.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
            elif isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(_small_contiguous)
    return cast(ModelMixin, fast)


def _small_contiguous(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    (images,) = inputs
    return (images.contiguous(),) if images.shape[2:].numel() < SMALL else inputs
