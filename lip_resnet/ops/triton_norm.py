"""Instance norm and the activation after it on GPUs, in Triton: the same sums as ``cpu/norm.cpp``, deterministic.

A program reads a block of channels of one image twice, in tiles of positions x channels: first for the statistics, in
float32 at least and as differences from the first position, so that a large mean costs no precision; then for the
result. Both layouts run the same code with their own strides. Only mean and rstd are saved for the backward pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lip_resnet.ops.triton_lip import SUMS

WARPS = 8
ELEMENTS = 4096  # in a tile: 16 per thread


@triton.jit
def _activate(t, COEFFICIENT: tl.constexpr, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        t = tl.where(t <= 0, 0.0, t)  # keeps NaN
    elif ACTIVATION == 2:
        t = COEFFICIENT / (1.0 + tl.exp(-t))
    return t


@triton.jit
def _slope(t, dout, COEFFICIENT: tl.constexpr, ACTIVATION: tl.constexpr):
    """dout times the activation's derivative at t."""
    if ACTIVATION == 1:
        dout = tl.where(t > 0, dout, 0.0)
    elif ACTIVATION == 2:
        s = 1.0 / (1.0 + tl.exp(-t))
        dout = dout * s * (1.0 - s) * COEFFICIENT
    return dout


@triton.jit
def norm_forward_kernel(
    z, weight, bias, out, mean, rstd, C, area,
    EPS: tl.constexpr, COEFFICIENT: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SUM: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A block of channels of one image: out, mean and rstd."""
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    exists = channel < C
    step = C if CHANNELS_LAST else 1
    base = image * C * area + channel * (1 if CHANNELS_LAST else area)
    reference = tl.load(z + base, exists, other=0.0).to(SUM)
    total = tl.zeros((POSITIONS, CHANNELS), SUM)
    square = tl.zeros((POSITIONS, CHANNELS), SUM)
    for first in range(0, area, POSITIONS):
        position = first + tl.arange(0, POSITIONS)[:, None]
        inside = exists & (position < area)
        value = tl.load(z + base + position * step, inside, other=0.0).to(SUM)
        difference = tl.where(inside, value - reference, 0.0)
        total += difference
        square += difference * difference
    offset = tl.sum(total, 0)[None, :] / area
    variance = tl.maximum(tl.sum(square, 0)[None, :] / area - offset * offset, 0.0)
    centre = reference + offset
    inverse = 1.0 / tl.sqrt(variance + EPS)
    tl.store(mean + image * C + channel, centre, exists)
    tl.store(rstd + image * C + channel, inverse, exists)
    scale = inverse * tl.load(weight + channel, exists, other=0.0).to(SUM)
    shift = tl.load(bias + channel, exists, other=0.0).to(SUM)
    for first in range(0, area, POSITIONS):
        position = first + tl.arange(0, POSITIONS)[:, None]
        inside = exists & (position < area)
        value = tl.load(z + base + position * step, inside, other=0.0).to(SUM)
        result = _activate((value - centre) * scale + shift, COEFFICIENT, ACTIVATION)
        tl.store(out + base + position * step, result.to(out.dtype.element_ty), inside)


@triton.jit
def norm_backward_kernel(
    z, weight, bias, dout, dz, mean, rstd, sum_g, sum_gz, C, area,
    COEFFICIENT: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SUM: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A block of channels of one image: dz, and the sums over positions that make dbias and dweight."""
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    exists = channel < C
    step = C if CHANNELS_LAST else 1
    base = image * C * area + channel * (1 if CHANNELS_LAST else area)
    centre = tl.load(mean + image * C + channel, exists, other=0.0)
    inverse = tl.load(rstd + image * C + channel, exists, other=0.0)
    gain = tl.load(weight + channel, exists, other=0.0).to(SUM)
    shift = tl.load(bias + channel, exists, other=0.0).to(SUM)
    total = tl.zeros((POSITIONS, CHANNELS), SUM)
    product = tl.zeros((POSITIONS, CHANNELS), SUM)
    for first in range(0, area, POSITIONS):
        position = first + tl.arange(0, POSITIONS)[:, None]
        inside = exists & (position < area)
        normed = (tl.load(z + base + position * step, inside, other=0.0).to(SUM) - centre) * inverse
        g = tl.load(dout + base + position * step, inside, other=0.0).to(SUM)
        g = _slope(normed * gain + shift, g, COEFFICIENT, ACTIVATION)
        total += g
        product += tl.where(inside, g * normed, 0.0)
    all_g = tl.sum(total, 0)[None, :]
    all_gz = tl.sum(product, 0)[None, :]
    tl.store(sum_g + image * C + channel, all_g, exists)
    tl.store(sum_gz + image * C + channel, all_gz, exists)
    for first in range(0, area, POSITIONS):
        position = first + tl.arange(0, POSITIONS)[:, None]
        inside = exists & (position < area)
        normed = (tl.load(z + base + position * step, inside, other=0.0).to(SUM) - centre) * inverse
        g = tl.load(dout + base + position * step, inside, other=0.0).to(SUM)
        g = _slope(normed * gain + shift, g, COEFFICIENT, ACTIVATION)
        result = gain * inverse * (g - all_g / area - normed * (all_gz / area))
        tl.store(dz + base + position * step, result.to(dz.dtype.element_ty), inside)


def tile(batch: int, channels: int, area: int, channels_last: bool) -> tuple[int, int]:
    """(positions, channels) of a tile: whole memory sectors in either layout, and enough programs to fill the GPU."""
    if channels_last:
        wide = 32 if batch * channels >= 32 * 256 else 16
        return ELEMENTS // wide, wide
    positions = min(triton.next_power_of_2(area), ELEMENTS)
    return positions, min(ELEMENTS // positions, triton.next_power_of_2(channels))


def norm_forward(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    activation: int,
    eps: float,
    coefficient: float,
) -> None:
    """Fill ``out`` (B, C, H, W), ``mean`` and ``rstd`` (B, C); z and out dense and in one layout."""
    # eps and the coefficient are constants of the compiled kernel: as arguments they would be rounded to float32
    _launch(norm_forward_kernel, (z, weight, bias, out, mean, rstd), z, mean, activation, coefficient, EPS=eps)


def norm_backward(
    dout: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dz: Tensor,
    sum_g: Tensor,
    sum_gz: Tensor,
    activation: int,
    coefficient: float,
) -> None:
    """Fill ``dz`` (B, C, H, W), and ``sum_g`` and ``sum_gz`` (B, C): the parts of dbias and dweight of every image."""
    tensors = (z, weight, bias, dout, dz, mean, rstd, sum_g, sum_gz)
    _launch(norm_backward_kernel, tensors, z, mean, activation, coefficient)


def _launch(kernel, tensors, z: Tensor, mean: Tensor, activation: int, coefficient: float, **constants) -> None:
    (batch, channels), area, channels_last = z.shape[:2], z.shape[2] * z.shape[3], not z.is_contiguous()
    positions, block = tile(batch, channels, area, channels_last)
    with torch.cuda.device_of(z):
        kernel[(batch, triton.cdiv(channels, block))](
            *tensors, channels, area, ACTIVATION=activation, COEFFICIENT=coefficient, CHANNELS_LAST=channels_last,
            SUM=SUMS[mean.dtype], POSITIONS=positions, CHANNELS=block, num_warps=WARPS, **constants,
        )  # fmt: skip
