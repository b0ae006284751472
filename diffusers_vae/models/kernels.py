"""Triton kernels of `norms`: x is (B, C, positions) with any strides; sums, means and gradients are float32."""

import triton
import triton.language as tl


@triton.jit
def sums(x, sums, channels, positions, x_n, x_c, x_p, each, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sum x - shift and its square per channel, where shift is the channel's first value: a sum of squares loses digits
    when the mean is larger than the deviation.
    """
    split, n = tl.program_id(0), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    column = x + n * x_n + c.to(tl.int64) * x_c
    shift = tl.load(column, mask=inside, other=0.0).to(tl.float32)
    first = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    end = tl.minimum((split + 1) * each, positions)
    for start in range(split * each, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < end)[:, None] & inside[None, :]
        value = tl.load(column[None, :] + p[:, None].to(tl.int64) * x_p, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, value - shift[None, :], 0.0)
        first += value
        second += value * value
    at = sums + (n * tl.num_programs(0) + split) * 2 * channels + c
    tl.store(at, tl.sum(first, 0), mask=inside)
    tl.store(at + channels, tl.sum(second, 0), mask=inside)


@triton.jit
def _totals(sums, n, splits, channels, c, inside, BLOCK: tl.constexpr):
    """Return the two sums of each channel over all splits."""
    first = tl.zeros([BLOCK], tl.float32)
    second = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        at = sums + (n * splits + split) * 2 * channels + c
        first += tl.load(at, mask=inside, other=0.0)
        second += tl.load(at + channels, mask=inside, other=0.0)
    return first, second


@triton.jit
def moments(x, sums, mean, rstd, eps, channels, positions, x_n, x_c, splits, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the mean and reciprocal deviation of a group from the sums of its channels."""
    group, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = group * GROUP + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < GROUP
    first, second = _totals(sums, n, splits, channels, c, inside, BLOCK)
    shift = tl.load(x + n * x_n + c.to(tl.int64) * x_c, mask=inside, other=0.0).to(tl.float32)
    average = tl.where(inside, shift + first / positions, 0.0)
    centre = tl.sum(average, 0) / GROUP
    apart = tl.where(inside, average - centre, 0.0)
    variance = tl.sum(second - first * first / positions + positions * apart * apart, 0) / (GROUP * positions)
    at = n * tl.num_programs(0) + group
    tl.store(mean + at, centre)
    tl.store(rstd + at, 1 / tl.sqrt(variance + eps))


@triton.jit
def apply(
    x, y, mean, rstd, weight, bias, channels, positions, groups, x_n, x_c, x_p,
    SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = c < channels
    mask = (p < positions)[:, None] & inside[None, :]
    group = n * groups + c // (channels // groups)
    centre = tl.load(mean + group, mask=inside, other=0.0)
    scale = tl.load(rstd + group, mask=inside, other=0.0) * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    at = n * x_n + c.to(tl.int64)[None, :] * x_c + p[:, None].to(tl.int64) * x_p
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    inner = (value - centre[None, :]) * scale[None, :] + offset[None, :]
    if SILU:
        inner = inner * tl.sigmoid(inner)
    tl.store(y + at, inner.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _dz(x, dy, centre, deviation, scale, offset, SILU: tl.constexpr):
    """Return the normalised value and the gradient of the input of the SiLU."""
    normal = (x - centre) * deviation
    if SILU:
        inner = normal * scale + offset
        gate = tl.sigmoid(inner)
        dy = dy * gate * (1 + inner * (1 - gate))
    return normal, dy


@triton.jit
def gradient_sums(
    x, dy, sums, mean, rstd, weight, bias, channels, positions, groups, x_n, x_c, x_p, d_n, d_c, d_p, each,
    SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sum dz, and dz times the normalised value, per channel."""
    split, n = tl.program_id(0), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    group = n * groups + c // (channels // groups)
    centre = tl.load(mean + group, mask=inside, other=0.0)[None, :]
    deviation = tl.load(rstd + group, mask=inside, other=0.0)[None, :]
    scale = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    offset = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    first = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    end = tl.minimum((split + 1) * each, positions)
    for start in range(split * each, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < end)[:, None] & inside[None, :]
        wide, channel = p[:, None].to(tl.int64), c.to(tl.int64)[None, :]
        value = tl.load(x + n * x_n + channel * x_c + wide * x_p, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(dy + n * d_n + channel * d_c + wide * d_p, mask=mask, other=0.0).to(tl.float32)
        normal, gradient = _dz(value, gradient, centre, deviation, scale, offset, SILU)
        first += gradient  # 0 outside, like dy
        second += gradient * normal
    at = sums + (n * tl.num_programs(0) + split) * 2 * channels + c
    tl.store(at, tl.sum(first, 0), mask=inside)
    tl.store(at + channels, tl.sum(second, 0), mask=inside)


@triton.jit
def gradient_means(sums, whole, means, weight, channels, positions, splits, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the sums of a channel over all positions, and the two means of a group that its gradient needs."""
    group, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = group * GROUP + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < GROUP
    first, second = _totals(sums, n, splits, channels, c, inside, BLOCK)
    tl.store(whole + n * 2 * channels + c, first, mask=inside)
    tl.store(whole + n * 2 * channels + channels + c, second, mask=inside)
    scale = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32) / (GROUP * positions)
    at = means + (n * tl.num_programs(0) + group) * 2
    tl.store(at, tl.sum(first * scale, 0))
    tl.store(at + 1, tl.sum(second * scale, 0))


@triton.jit
def gradient(
    x, dy, dx, mean, rstd, means, weight, bias, channels, positions, groups, x_n, x_c, x_p, d_n, d_c, d_p,
    SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = c < channels
    mask = (p < positions)[:, None] & inside[None, :]
    group = n * groups + c // (channels // groups)
    centre = tl.load(mean + group, mask=inside, other=0.0)[None, :]
    deviation = tl.load(rstd + group, mask=inside, other=0.0)[None, :]
    scale = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    offset = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    first = tl.load(means + 2 * group, mask=inside, other=0.0)[None, :]
    second = tl.load(means + 2 * group + 1, mask=inside, other=0.0)[None, :]
    wide, channel = p[:, None].to(tl.int64), c.to(tl.int64)[None, :]
    at = n * x_n + channel * x_c + wide * x_p
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(dy + n * d_n + channel * d_c + wide * d_p, mask=mask, other=0.0).to(tl.float32)
    normal, gradient = _dz(value, gradient, centre, deviation, scale, offset, SILU)
    gradient = deviation * (scale * gradient - first - normal * second)
    tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=mask)
