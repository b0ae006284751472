"""Group norm with SiLU as one Triton kernel on a GPU: any layout and floating dtype, float32 inside."""

from __future__ import annotations

from typing import Any

import torch

from . import kernels as _kernels

kernels: Any = _kernels

ELEMENTS = 4096
"""Number of values that a program holds at a time."""
PROGRAMS = 1024
"""Number of programs that share a sum over positions, so that every multiprocessor has several."""


def _flat(x: torch.Tensor) -> torch.Tensor:
    """Return `x` as (B, C, positions): a view, unless rows of positions are not contiguous in memory."""
    return x.flatten(2) if x.ndim > 2 else x[:, :, None]


def _flat_pair(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both as (B, C, positions) with the same strides."""
    flat, out = _flat(x), _flat(y)
    return (flat if flat.stride() == out.stride() else torch.empty_like(out).copy_(flat)), out


def _put(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return `y` with the values of `out`, which is a view or a copy of it."""
    return y if out.data_ptr() == y.data_ptr() else y.copy_(out.view(y.shape))


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _power_of_2(value: int) -> int:
    """Return the smallest power of 2 that is not less than `value`: a block's size."""
    return 1 << (value - 1).bit_length()


def _blocks(x: torch.Tensor) -> tuple[int, int]:
    """Return the channels and positions of a block: values that are adjacent in memory."""
    channels = _power_of_2(x.shape[1])
    wide = min(64 if x.stride(1) == 1 else 4, channels)
    return wide, ELEMENTS // wide


def _split(x: torch.Tensor, block_c: int, block_p: int) -> tuple[tuple[int, ...], int]:
    """Return the grid of programs for a sum over positions, and the positions per program."""
    batch, channels, positions = x.shape
    blocks = _ceil(channels, block_c)
    splits = max(1, min(PROGRAMS // (batch * blocks), _ceil(positions, block_p)))
    each = _ceil(_ceil(positions, splits), block_p) * block_p
    return (_ceil(positions, each), blocks, batch), each


@torch.library.custom_op("diffusers_vae::group_norm", mutates_args=())
def group_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the group norm of `x` (B, C, ...), followed by SiLU if `silu`, in the dtype and layout of `x`, and the
    float32 mean and reciprocal standard deviation (B, groups) of the groups.
    """
    y = torch.empty_like(x)
    flat, out = _flat_pair(x, y)
    batch, channels, positions = flat.shape
    block_c, block_p = _blocks(flat)
    grid, each = _split(flat, block_c, block_p)
    group = channels // groups
    sums = x.new_empty((batch, grid[0], 2, channels), dtype=torch.float32)
    mean, rstd = (x.new_empty((batch, groups), dtype=torch.float32) for _ in range(2))
    kernels.sums[grid](flat, sums, channels, positions, *flat.stride(), each, block_c, block_p)
    kernels.moments[groups, batch](
        flat, sums, mean, rstd, eps, channels, positions, *flat.stride()[:2], grid[0], group,
        _power_of_2(group), num_warps=1,
    )  # fmt: skip
    kernels.apply[_ceil(positions, block_p), grid[1], batch](
        flat, out, mean, rstd, weight, bias, channels, positions, groups, *flat.stride(), silu, block_c, block_p
    )
    return _put(out, y), mean, rstd


@group_norm.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool
) -> tuple[torch.Tensor, ...]:
    return (torch.empty_like(x), *(x.new_empty((len(x), groups), dtype=torch.float32) for _ in range(2)))


@torch.library.custom_op("diffusers_vae::group_norm_backward", mutates_args=())
def group_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor,
    rstd: torch.Tensor, groups: int, silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the gradients of x, weight and bias."""
    dx = torch.empty_like(x)
    flat, out = _flat_pair(x, dx)
    gradient = _flat(dy)
    batch, channels, positions = flat.shape
    block_c, block_p = _blocks(flat)
    grid, each = _split(flat, block_c, block_p)
    group = channels // groups
    sums = x.new_empty((batch, grid[0], 2, channels), dtype=torch.float32)
    whole = x.new_empty((batch, 2, channels), dtype=torch.float32)
    means = x.new_empty((batch, groups, 2), dtype=torch.float32)
    strides = (*flat.stride(), *gradient.stride())
    shape = channels, positions, groups
    kernels.gradient_sums[grid](
        flat, gradient, sums, mean, rstd, weight, bias, *shape, *strides, each, silu, block_c, block_p
    )
    kernels.gradient_means[groups, batch](
        sums, whole, means, weight, channels, positions, grid[0], group, _power_of_2(group), num_warps=1
    )
    kernels.gradient[_ceil(positions, block_p), grid[1], batch](
        flat, gradient, out, mean, rstd, means, weight, bias, *shape, *strides, silu, block_c, block_p
    )
    db, dw = whole.sum(0).to(weight.dtype).unbind()
    return _put(out, dx), dw.clone(), db.clone()  # outputs may not share memory


@group_norm_backward.register_fake
def _(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, ...]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, ctx.groups, _, ctx.silu = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx: Any, dy: torch.Tensor, *others: None) -> tuple[torch.Tensor | None, ...]:
    return (*group_norm_backward(dy, *ctx.saved_tensors, ctx.groups, ctx.silu), None, None, None)


group_norm.register_autograd(_backward, setup_context=_keep)
