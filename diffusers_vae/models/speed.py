"""Speed of convolutional autoencoders by device: precision, memory layout of group norms, CPU threads."""

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

COMPILED_VALUES = 2**32
"""Number of pixels to encode on a GPU above which compiling pays off: on an H100 it takes 12 s and saves 0.25 ms per
256x256 image."""

T = TypeVar("T")
U = TypeVar("U")
SMALL = 1024
"""Number of feature map positions below which torch's bfloat16 group norm of channels-last input is slow on a CPU."""


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return torch.bfloat16 if `device` multiplies it in hardware, otherwise torch.float32. NVIDIA GPUs do from compute
    capability 8.0, AMD GPUs with torch's ROCm build, and CPUs with AVX512-BF16, which includes all with AMX.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu: Any = torch.cpu
        supported = device.type == "cpu" and cpu._is_avx512_bf16_supported()  # private in torch 2.7 to 2.14
    return torch.bfloat16 if supported else torch.float32


def speed_up_norms(model: nn.Module) -> nn.Module:
    """Make the group norms of `model` copy non-float32 input on a CPU to contiguous memory, and return it. For
    channels-last input, as after one-channel convolutions and attention, torch's bfloat16 group norm takes up to twenty
    times as long (benchmarks/RESULTS.md).
    """
    modules: list[Any] = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    for module in modules:
        if _contiguous not in module._forward_pre_hooks.values():  # private in torch 2.7 to 2.14
            module.register_forward_pre_hook(_contiguous)
    return model


def _contiguous(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    (images,) = inputs
    return (images.contiguous(),) if images.device.type == "cpu" and images.dtype != torch.float32 else inputs


def several_at_once(
    function: Callable[[T], U], items: Iterable[T], device: torch.device, most: int
) -> Iterator[tuple[T, U]]:
    """Yield (item, function(item)) in order, without gradients.

    On a CPU, up to `most` calls run concurrently and share torch's threads, because several threads in one convolution
    of a small feature map wait for each other. An error is raised in its item's turn, after the running calls.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    each = math.ceil(threads / most)
    workers = threads // each

    @torch.no_grad()  # applies to one thread only
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
            torch.set_num_threads(threads)  # applies to future threads too


def for_inference(model: ModelMixin, dtype: torch.dtype, values: int = 0) -> ModelMixin:
    """Return `model` for fast encoding and decoding in `dtype`: itself, or a copy whose weights are cast once instead
    of by autocast at every call. On a CUDA GPU, the copy's blocks are those of `fast`, compiled if that saves time for
    `values` pixels. In bfloat16 on a CPU, its convolutions are channels-last, which saves two copies of each output,
    and group norms of small feature maps are not.
    """
    on_gpu = model.device.type == "cuda" and hasattr(model.config, "block_out_channels")
    channels_last = model.device.type == "cpu" and dtype == torch.bfloat16
    if model.dtype == dtype and not channels_last and not on_gpu:
        return model
    copied = nn.Module.to(copy.deepcopy(model), dtype)  # diffusers' own method always warns
    if on_gpu:
        from .fast import fast

        fast(copied, compiled=values >= COMPILED_VALUES)
    elif channels_last:
        for module in copied.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
            elif isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(_small_contiguous)
    return cast(ModelMixin, copied)


def _small_contiguous(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    (images,) = inputs
    return (images.contiguous(),) if images.shape[2:].numel() < SMALL else inputs
