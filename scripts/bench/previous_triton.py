"""The Triton kernels before their change to log-sum-exp and to streaming: contestants of ``benchmark.py`` beside
``lip_resnet/ops/triton_lip.py`` and ``triton_norm.py`` until a GPU has measured both; then this file is deleted.

``forward``, ``backward``, ``norm_forward`` and ``norm_backward`` have the arguments of today's functions. ``r`` is
1 / sum exp(logits - max logits).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

THREADS = 128  # per program; a thread reads 16 bytes at once forward, 8 backward, where it has several positions
SUMS = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _grid(rows, columns, size, channels, CHANNELS_LAST: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr):
    """This program's tile -> row, column, image or plane, innermost part of the address, and mask of its elements."""
    outer = tl.program_id(0).to(tl.int64) * OUTER + tl.arange(0, OUTER)[:, None]
    inner = tl.program_id(1) * INNER + tl.arange(0, INNER)[None, :]
    if CHANNELS_LAST:
        position, group, lane = (outer % (rows * columns)).to(tl.int32), outer // (rows * columns), inner
        mask = (outer < size) & (inner < channels)
    else:
        position, group, lane = inner, outer, 0
        mask = (outer < size) & (inner < rows * columns)
    return position // columns, position % columns, group, lane, mask


@triton.jit
def _window_top(logits, base, first_row, first_column, mask, H, W, step, KERNEL: tl.constexpr, SUM: tl.constexpr):
    """The largest logit of each window, over its real positions."""
    top = tl.full(mask.shape, -float("inf"), SUM)
    for a in tl.static_range(KERNEL):
        for b in tl.static_range(KERNEL):
            i = first_row + a
            j = first_column + b
            inside = mask & (i >= 0) & (i < H) & (j >= 0) & (j < W)
            value = tl.load(logits + base + (i * W + j) * step, inside, other=-float("inf")).to(SUM)
            top = tl.maximum(top, value, propagate_nan=tl.PropagateNan.ALL)
    return top


@triton.jit
def forward_kernel(
    x, logits, y, r, size, C, H, W, h, w,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SUM: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """A tile of output positions: y and r = 1 / sum exp(logits - top)."""
    row, column, group, lane, mask = _grid(h, w, size, C, CHANNELS_LAST, OUTER, INNER)
    step = C if CHANNELS_LAST else 1
    base = group * H * W * step + lane
    first_row = row * STRIDE - PADDING
    first_column = column * STRIDE - PADDING
    top = _window_top(logits, base, first_row, first_column, mask, H, W, step, KERNEL, SUM)
    top = tl.where(mask, top, 0.0)
    weights = tl.zeros(mask.shape, SUM)
    total = tl.zeros(mask.shape, SUM)
    for a in tl.static_range(KERNEL):
        for b in tl.static_range(KERNEL):
            i = first_row + a
            j = first_column + b
            inside = mask & (i >= 0) & (i < H) & (j >= 0) & (j < W)
            at = base + (i * W + j) * step
            # the second read of the logits comes from the L1 cache
            weight = tl.exp(tl.load(logits + at, inside, other=-float("inf")).to(SUM) - top)
            weights += weight
            total += weight * tl.load(x + at, inside, other=0.0).to(SUM)
    out = group * h * w * step + lane + (row * w + column) * step
    inverse = 1.0 / weights
    tl.store(y + out, (total * inverse).to(y.dtype.element_ty), mask)
    tl.store(r + out, inverse, mask)


@triton.jit
def backward_kernel(
    dy, x, logits, y, r, dx, dl, size, C, H, W, h, w, cell_rows, cell_columns,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SUM: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """A tile of cells: dx and dlogits of their positions. OFFSETS: stride * stride, rounded up to a power of 2."""
    row, column, group, lane, mask = _grid(cell_rows, cell_columns, size, C, CHANNELS_LAST, OUTER, INNER)
    step = C if CHANNELS_LAST else 1
    base = group * H * W * step + lane
    offset = tl.arange(0, OFFSETS)[:, None, None]
    t_row = offset // STRIDE
    t_column = offset % STRIDE
    i = row[None] * STRIDE + t_row - PADDING
    j = column[None] * STRIDE + t_column - PADDING
    inside = mask[None] & (t_row < STRIDE) & (i >= 0) & (i < H) & (j >= 0) & (j < W)
    at = base[None] + (i * W + j) * step
    logit = tl.load(logits + at, inside, other=0.0).to(SUM)
    gathered_u = tl.zeros(inside.shape, SUM)
    gathered_v = tl.zeros(inside.shape, SUM)
    for a in tl.static_range((KERNEL - 1) // STRIDE + 1):
        for b in tl.static_range((KERNEL - 1) // STRIDE + 1):
            o_row = row - a
            o_column = column - b
            exists = mask & (o_row >= 0) & (o_row < h) & (o_column >= 0) & (o_column < w)
            first_row = o_row * STRIDE - PADDING
            first_column = o_column * STRIDE - PADDING
            top = _window_top(logits, base, first_row, first_column, exists, H, W, step, KERNEL, SUM)
            out = group * h * w * step + lane + (o_row * w + o_column) * step
            u = tl.load(r + out, exists, other=0.0) * tl.load(dy + out, exists, other=0.0).to(SUM)
            v = u * tl.load(y + out, exists, other=0.0).to(SUM)
            covered = exists[None] & (t_row + a * STRIDE < KERNEL) & (t_column + b * STRIDE < KERNEL)
            weight = tl.exp(tl.where(covered, logit - top[None], -float("inf")))
            gathered_u += weight * u[None]
            gathered_v += weight * v[None]
    value = tl.load(x + at, inside, other=0.0).to(SUM)
    tl.store(dx + at, gathered_u.to(dx.dtype.element_ty), inside)
    tl.store(dl + at, (value * gathered_u - gathered_v).to(dl.dtype.element_ty), inside)


def lip_tile(inner: int, elements: int) -> tuple[int, int]:
    """Sizes (outer, inner) of a tile of ``elements`` over a contiguous dimension of size ``inner``."""
    width = min(triton.next_power_of_2(inner), 128)
    return max(elements // width, 1), width


def forward(x: Tensor, logits: Tensor, y: Tensor, r: Tensor, window: tuple[int, int, int]) -> None:
    """Fill ``y`` and ``r`` (B, C, h, w); all four tensors dense and in one layout (see ``dispatch.lip2d``)."""
    elements = THREADS * 16 // x.element_size()
    _launch_lip(forward_kernel, (x, logits, y, r), x, y, r, window, tuple(y.shape[-2:]), (), elements)


def backward(
    dy: Tensor, x: Tensor, logits: Tensor, y: Tensor, r: Tensor, dx: Tensor, dl: Tensor, window: tuple[int, int, int]
) -> None:
    """Fill ``dx`` and ``dl`` (B, C, H, W); all seven tensors dense and in one layout."""
    _, stride, padding = window
    cells = tuple((size - 1 + padding) // stride + 1 for size in x.shape[-2:])
    offsets = triton.next_power_of_2(stride * stride)
    elements = THREADS * 8 // x.element_size()
    _launch_lip(
        backward_kernel, (dy, x, logits, y, r, dx, dl), x, y, r, window, cells, cells, elements, OFFSETS=offsets
    )


def _launch_lip(kernel, tensors, x, y, r, window, extent, extra, elements, **constants) -> None:
    """Cover an ``extent`` (rows, columns) of every image with tiles of ``elements``."""
    batch, channels, height, width = x.shape
    channels_last = not x.is_contiguous()
    rows, columns = extent
    outer_size, inner_size = (batch * rows * columns, channels) if channels_last else (batch * channels, rows * columns)
    outer, inner = lip_tile(inner_size, elements)
    grid = (triton.cdiv(outer_size, outer), triton.cdiv(inner_size, inner))
    with torch.cuda.device_of(x):
        kernel[grid](
            *tensors, outer_size, channels, height, width, *y.shape[-2:], *extra,
            KERNEL=window[0], STRIDE=window[1], PADDING=window[2], CHANNELS_LAST=channels_last,
            SUM=SUMS[r.dtype], OUTER=outer, INNER=inner, num_warps=THREADS // 32, **constants,
        )  # fmt: skip


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


def norm_tile(batch: int, channels: int, area: int, channels_last: bool) -> tuple[int, int]:
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
    _launch_norm(norm_forward_kernel, (z, weight, bias, out, mean, rstd), z, mean, activation, coefficient, EPS=eps)


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
    _launch_norm(norm_backward_kernel, tensors, z, mean, activation, coefficient)


def _launch_norm(kernel, tensors, z: Tensor, mean: Tensor, activation: int, coefficient: float, **constants) -> None:
    (batch, channels), area, channels_last = z.shape[:2], z.shape[2] * z.shape[3], not z.is_contiguous()
    positions, block = norm_tile(batch, channels, area, channels_last)
    with torch.cuda.device_of(z):
        kernel[(batch, triton.cdiv(channels, block))](
            *tensors, channels, area, ACTIVATION=activation, COEFFICIENT=coefficient, CHANNELS_LAST=channels_last,
            SUM=SUMS[mean.dtype], POSITIONS=positions, CHANNELS=block, num_warps=WARPS, **constants,
        )  # fmt: skip
