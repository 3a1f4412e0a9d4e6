"""Instance norm and the activation after it on GPUs, in Triton: the same sums as ``cpu/norm.cpp``, deterministic.

A program reads a block of channels of one image twice, in tiles of positions x channels: first for the statistics, in
float32 at least and as differences from the first position, so that a large mean costs no precision; then for the
result. Both layouts run the same code with their own strides. Only mean and rstd are saved for the backward pass.

The second read should come from the L2 cache, 50 MB on an H100: programs are numbered channel blocks first, so that
those that run at once share memory pages; large maps get few, large programs; and the second pass walks backwards, from
what was read last, and marks what it reads and writes as the first to be evicted.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGE_AREA = 32 * 32  # positions of a map above which a program has 16 warps and half a cache line of channels
SUMS = {torch.float32: tl.float32, torch.float64: tl.float64}
LOG2_E = tl.constexpr(1.4426950408889634)
RELU = tl.constexpr(1)  # as in reference_norm.py
GATE = tl.constexpr(2)


@triton.jit
def _reciprocal(value, APPROXIMATE: tl.constexpr):
    """1 / value; ``APPROXIMATE``: to 1 ulp, without the scaling that a division needs for denormal numbers."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / value


@triton.jit
def _activate(t, COEFFICIENT: tl.constexpr, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr):
    """The activation of t, in ``_unit``s."""
    if ACTIVATION == RELU:
        t = tl.where(t <= 0, 0.0, t)  # keeps NaN
    elif ACTIVATION == GATE:
        t = COEFFICIENT * _reciprocal(1.0 + tl.exp2(t), APPROXIMATE)
    return t


@triton.jit
def _slope(t, dout, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr):
    """dout times the activation's derivative at t, in ``_unit``s; the gate's without its coefficient."""
    if ACTIVATION == RELU:
        dout = tl.where(t > 0, dout, 0.0)
    elif ACTIVATION == GATE:
        s = _reciprocal(1.0 + tl.exp2(t), APPROXIMATE)
        dout = dout * (s - s * s)
    return dout


@triton.jit
def _unit(ACTIVATION: tl.constexpr):
    """What the activation's argument is multiplied by, for the gate: sigmoid(t) = 1 / (1 + exp2(-t * log2(e)))."""
    return -LOG2_E if ACTIVATION == GATE else 1.0


@triton.jit
def _block(C, area, blocks, CHANNELS_LAST: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's channels -> channel, whether it exists, its place among all planes, first element, and step."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    base = image * C * area + (channel if CHANNELS_LAST else channel.to(tl.int64) * area)
    return channel, channel < C, image * C + channel, base, C if CHANNELS_LAST else 1


@triton.jit
def norm_forward_kernel(
    z, weight, bias, out, mean, rstd, C, area, blocks,
    EPS: tl.constexpr, COEFFICIENT: tl.constexpr, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SUM: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A block of channels of one image: out, mean and rstd."""
    channel, exists, plane, base, step = _block(C, area, blocks, CHANNELS_LAST, CHANNELS)
    tile = tl.arange(0, POSITIONS)[:, None].to(tl.int64)
    reference = tl.load(z + base, exists, other=0.0)
    total = tl.zeros((POSITIONS, CHANNELS), SUM)
    square = tl.zeros((POSITIONS, CHANNELS), SUM)
    for first in range(0, area, POSITIONS):
        position = first + tile
        value = tl.load(z + base + position * step, exists & (position < area), other=reference).to(SUM)
        difference = value - reference.to(SUM)
        total += difference
        square += difference * difference
    offset = tl.sum(total, 0)[None, :] / area
    variance = tl.sum(square, 0)[None, :] / area - offset * offset
    variance = tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL)
    centre = reference.to(SUM) + offset
    inverse = 1.0 / tl.sqrt(variance + EPS)
    tl.store(mean + plane, centre, exists)
    tl.store(rstd + plane, inverse, exists)
    scale = inverse * tl.load(weight + channel, exists, other=0.0).to(SUM) * _unit(ACTIVATION)
    shift = tl.load(bias + channel, exists, other=0.0).to(SUM) * _unit(ACTIVATION)
    last = (area - 1) // POSITIONS * POSITIONS
    for first in range(0, area, POSITIONS):
        position = last - first + tile
        inside = exists & (position < area)
        value = tl.load(z + base + position * step, inside, other=0.0, eviction_policy="evict_first").to(SUM)
        result = _activate((value - centre) * scale + shift, COEFFICIENT, ACTIVATION, APPROXIMATE)
        result = result.to(out.dtype.element_ty)
        tl.store(out + base + position * step, result, inside, eviction_policy="evict_first")


@triton.jit
def norm_backward_kernel(
    z, weight, bias, dout, dz, mean, rstd, sum_g, sum_gz, C, area, blocks,
    COEFFICIENT: tl.constexpr, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SUM: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A block of channels of one image: dz, and the sums over positions that make dbias and dweight."""
    channel, exists, plane, base, step = _block(C, area, blocks, CHANNELS_LAST, CHANNELS)
    tile = tl.arange(0, POSITIONS)[:, None].to(tl.int64)
    centre = tl.load(mean + plane, exists, other=0.0)
    inverse = tl.load(rstd + plane, exists, other=0.0)
    gain = inverse * tl.load(weight + channel, exists, other=0.0).to(SUM)
    scale = gain * _unit(ACTIVATION)
    shift = tl.load(bias + channel, exists, other=0.0).to(SUM) * _unit(ACTIVATION)
    total = tl.zeros((POSITIONS, CHANNELS), SUM)
    product = tl.zeros((POSITIONS, CHANNELS), SUM)
    for first in range(0, area, POSITIONS):
        position = first + tile
        inside = exists & (position < area)
        difference = tl.load(z + base + position * step, inside, other=0.0).to(SUM) - centre
        g = tl.load(dout + base + position * step, inside, other=0.0).to(SUM)
        g = _slope(difference * scale + shift, g, ACTIVATION, APPROXIMATE)
        total += g
        product += g * difference
    coefficient = COEFFICIENT if ACTIVATION == GATE else 1.0
    all_g = tl.sum(total, 0)[None, :] * coefficient
    all_gz = tl.sum(product, 0)[None, :] * (inverse * coefficient)
    tl.store(sum_g + plane, all_g, exists)
    tl.store(sum_gz + plane, all_gz, exists)
    # dz = gain * (g - all_g / area - normed * all_gz / area)
    g_factor = gain * coefficient
    constant = gain * (all_g / area)
    difference_factor = gain * inverse * (all_gz / area)
    last = (area - 1) // POSITIONS * POSITIONS
    for first in range(0, area, POSITIONS):
        position = last - first + tile
        inside = exists & (position < area)
        value = tl.load(z + base + position * step, inside, other=0.0, eviction_policy="evict_first").to(SUM)
        difference = value - centre
        g = tl.load(dout + base + position * step, inside, other=0.0, eviction_policy="evict_first").to(SUM)
        g = _slope(difference * scale + shift, g, ACTIVATION, APPROXIMATE)
        result = g_factor * g - constant - difference_factor * difference
        tl.store(dz + base + position * step, result.to(dz.dtype.element_ty), inside, eviction_policy="evict_first")


def tile(shape: tuple[int, ...], itemsize: int, channels_last: bool, elements: int) -> tuple[int, int, int]:
    """(positions, channels) of a tile of ``elements`` per thread, and warps of a program.

    Channels-last: at most a cache line of channels, and as few as it takes to give every multiprocessor two programs.
    """
    batch, channels, height, width = shape
    area = height * width
    warps = 16 if channels_last and area > LARGE_AREA else 8
    elements *= 32 * warps
    if channels_last:
        block = (64 if area > LARGE_AREA else 128) // itemsize
        while block > 16 // itemsize and batch * channels < 256 * block:
            block //= 2
        return elements // block, block, warps
    positions = min(triton.next_power_of_2(area), elements)
    return positions, min(elements // positions, triton.next_power_of_2(channels)), warps


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
    _launch(norm_forward_kernel, (z, weight, bias, out, mean, rstd), z, mean, 8, activation, coefficient, EPS=eps)


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
    _launch(norm_backward_kernel, tensors, z, mean, 16, activation, coefficient)


def _launch(
    kernel, tensors, z: Tensor, mean: Tensor, elements: int, activation: int, coefficient: float, **constants
) -> None:
    (batch, channels), area, channels_last = z.shape[:2], z.shape[2] * z.shape[3], not z.is_contiguous()
    positions, block, warps = tile(z.shape, z.element_size(), channels_last, elements)
    blocks = triton.cdiv(channels, block)
    # PTX of NVIDIA GPUs, in float32
    approximate = mean.dtype == torch.float32 and torch.version.hip is None and not triton.knobs.runtime.interpret
    with torch.cuda.device_of(z):
        kernel[(batch * blocks,)](
            *tensors, channels, area, blocks, ACTIVATION=activation, COEFFICIENT=coefficient, APPROXIMATE=approximate,
            CHANNELS_LAST=channels_last, SUM=SUMS[mean.dtype], POSITIONS=positions, CHANNELS=block, num_warps=warps,
            **constants,
        )  # fmt: skip
